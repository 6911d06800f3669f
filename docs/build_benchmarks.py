"""Writes docs/benchmarks.md from the committed results: python -m docs.build_benchmarks PAGE

With `--readme` it prints the table that README shows instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_vlm.console.tables import markdown
from edge_vlm_runtime.bench import report
from edge_vlm_runtime.planning.devices import DEVICES, KERNEL_US, MATRIX_SHARE, READ_SHARE

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FOLDER = RESULTS / "bench"
"""Results of `edge-vlm bench --json`, one a device and model."""
PEERS = tuple(
    RESULTS / f"peers{kind}.json"
    for kind in ("", "_full_size", "_full_size_without_amx", "_full_size_two_threads")
)
PLAN_CHECK = RESULTS / "plan_check.json"
Record = Mapping[str, Any]

HEAD = """# Benchmarks

*Made from the JSON files in `benchmarks/results` by `python -m docs.build_benchmarks
docs/benchmarks.md`; do not edit.*

How fast is it on my device?

```sh
edge-vlm bench                                  # takes a minute: the demo model
edge-vlm bench --json mine.json --layers        # takes three minutes
edge-vlm plan --device orin-nano --model 4b     # a forecast, nothing is run
```

`bench` needs no torch and no recording: it shows pictures that are made up, or those of a file
(`--source`), to a bundle on this machine, or to a running server (`--url`). `-o` gives the result
as a page, JSON or CSV; the JSON's schema is `runtime/edge_vlm_runtime/bench/schema.json`. Ctrl-C,
SIGTERM or a server that goes away ends it with what was measured until then. `--compare FILE` puts
an earlier result beside it, and refuses one of another shape. `--trace FILE` writes what ran when
for ui.perfetto.dev, `--nvtx` marks the graphs for Nsight Systems, and `--layers` profiles each
graph by operator in a run of its own, because that slows it down.

## How it is measured

- Every keep ratio and every context is timed as A B A, turn after turn: the first one before and
  behind each of the others. Ratios are of one turn; a machine whose speed drifts slows both alike.
- Medians, with half the distance of the turns' medians behind ±. A 99th percentile is given from
  100 samples on and is `-` before.
- Warm-ups are not counted, and their number is printed. Cold start is a process of its own.
- A frame: `vit_stem` looks at the whole picture, `select` chooses cells, `vit_trunk` and `prefill`
  see those that are kept. Its tokens are the cells, a time stamp and two markers.
- TTFT: from a question's text to the text of the first token. ITL: every later token. In a session
  TTFT is from the question's arrival to the first text.
- Lag: from the moment when a picture was due to the event that it is in the model's memory.
- Energy: NVML's counter, RAPL, or the rail of a Jetson that feeds the whole board; a meter that is
  not there is named with the reason. Idle watts are not taken off.
- Clocks before and behind, what other programs took of the processor, nvpmodel, jetson_clocks,
  driver and versions stand in the result; a clock that moved and a busy machine are warned of.
- A stage's bound is the larger of its operations at the machine's best rate for matrix products,
  and what it has to move once (weights, cache, inputs, outputs) at its best bandwidth. Weights that
  stay in a cache are read faster than that. End to end, a saving in one stage gains at most
  1 / (1 - share x saving).
"""

MISSING = """## Never measured

Nobody has run this on a Jetson, on any consumer GPU, or with Molmo2's published weights at full
size on a GPU: there are no figures of those here, and none of `edge-vlm plan` has been checked
there. No power has been measured: the machines below have no meter that may be read. Accuracy is
another matter, see [evaluation](evaluation.md).

## Submit your device

`edge-vlm bench --json mine.json`, and put that file into a new issue ("Submit your device"). It
holds the machine's model, driver and versions, no names, paths or addresses.
"""

PLAN = f"""## The forecast, and how far it holds

`edge-vlm plan` adds up what a stage computes and moves, from the model's shapes alone. For a device
by name: operations at {MATRIX_SHARE:.0%} of the dense peak its maker publishes, or what has to be
read at {READ_SHARE:.0%} of its bandwidth, whichever is slower, and {KERNEL_US:g} us a kernel.
These shares are of published runs of other software; **the forecast was checked on none of these
devices**.

For `this` machine's processor rates are measured first, in ONNX Runtime: products of 1 to 729 rows
with weights of three sizes, more of the large ones than caches hold, products of two activations,
softmax, GELU, sums, transposed heads and copied caches in four sizes, and what a small node costs.
Checked is that forecast, in fp32 and one thread, against the demo bundle and against Molmo2-4B at
full width with two language layers (`wide`, weights made up): forecast and run in turn, in
processor time. On a crowded machine rates change between the two by more than is asked of the
forecast: see the turns.
"""


def records() -> list[tuple[Path, dict[str, Any]]]:
    return [(path, json.loads(path.read_text())) for path in sorted(FOLDER.glob("*.json"))]


def page() -> str:
    found = records()
    parts = [HEAD, "## Results", "", *table(found), "", MISSING, PLAN, *plan_check(), ""]
    parts += ["### Devices of the forecast", "", *devices(), ""]
    for path, record in found:
        text = report.as_markdown(record)
        title, _, rest = text.partition("\n")
        parts += [
            f"## {title.removeprefix('# edge-vlm bench: ')}",
            "",
            f"`{path.relative_to(ROOT)}`",
            rest.replace("\n## ", "\n### ").rstrip(),
            "",
        ]
    parts += ["## Beside other software", "", *peers(), ""]
    parts += ["## Other measurements", "", *others()]
    return "\n".join(parts).rstrip() + "\n"


def table(found: Sequence[tuple[Path, Record]]) -> list[str]:
    """One line a result, with the command that makes it again."""
    rows: list[Sequence[str]] = [
        (
            *("device", "model", "backend", "ms a frame", "with fewest cells", "frames/s then"),
            *("TTFT ms", "tokens/s", "lag p99 ms", "command"),
        )
    ]
    rows += [line(record) for _, record in found]
    if len(rows) == 1:
        return ["None yet."]
    return markdown(rows)


def line(record: Record) -> Sequence[str]:
    frames, answers = record["frames"] or [], record["answers"] or []
    rates = (record["stream"] or {"rates": []})["rates"]
    model = record["model"]
    lags = [
        f"{report.figure(point['lag_ms']['p99'])} at {point['rate']} frames/s"
        for point in rates
        if point["rate"] != "max" and point["lag_ms"] and point["lag_ms"]["p99"] is not None
    ]
    warnings = (record["run"] or {}).get("warnings")
    return (
        record["device"]["name"] + (" (disturbed, see its notes)" if warnings else ""),
        f"{model['name']} {model['precision'] or ''}".strip(),
        model["backend"],
        *(_frame(frames, place) for place in (0, -1)),
        report.figure(frames[-1]["frames_per_s"]) if frames else report.NONE,
        report.figure(_p50(answers[-1]["ttft_ms"])) if answers else report.NONE,
        report.figure(answers[-1]["tokens_per_s"]) if answers else report.NONE,
        lags[0] if lags else report.NONE,
        f"`{record['command']}`",
    )


def _frame(frames: Sequence[Record], place: int) -> str:
    if not frames:
        return report.NONE
    value = report.figure(_p50(frames[place]["stages_ms"]["frame"]))
    return f"{value} (keep {frames[place]['keep_ratio']:g})"


def _p50(summary: Record | None) -> float | None:
    return None if summary is None else float(summary["p50"])


def plan_check() -> list[str]:
    if not PLAN_CHECK.exists():
        return ["Not checked yet: `python -m benchmarks.runtime.plan_check`."]
    data = json.loads(PLAN_CHECK.read_text())
    rows: list[Sequence[str]] = [
        ("bundle", "stage", "measured", "forecast", "forecast / measured (turns)", "within 25 %")
    ]
    rows += [
        (
            check["bundle"],
            check["stage"],
            report.figure(check["measured_ms"], " ms"),
            report.figure(check["forecast_ms"], " ms"),
            f"{check['ratio']:.2f} ({check['least']:.2f} to {check['most']:.2f})",
            "yes" if check["holds"] else "**no**",
        )
        for check in data["checks"]
    ]
    return [
        f"`{data['command']}` on {data['device']}, {data['turns']} turns:",
        "",
        *markdown(rows, "<<>>><"),
    ]


def devices() -> list[str]:
    rows: list[Sequence[str]] = [
        ("name", "device", "GB", "GB/s", "dense fp16 TFLOP/s", "W", "published by")
    ]
    rows += [
        (
            device.name,
            device.label,
            f"{device.memory_gb:g}",
            f"{device.bandwidth_gb_s:g}",
            f"{device.fp16_tflop_s:g}",
            f"{device.watts:g}",
            device.source,
        )
        for device in DEVICES
    ]
    return markdown(rows, "<<>>>><")


def peers() -> list[str]:
    """A paragraph and a table for each part that was measured, a line for each that was not."""
    shown = {"transformers": _transformers, "openvino": _openvino, "llama.cpp": _llama_cpp}
    lines = [
        "In turn; medians in milliseconds of the processor, all threads together. Weights are made "
        "up, so this says nothing of answers.",
    ]
    for data in (json.loads(path.read_text()) for path in PEERS if path.exists()):
        lines += ["", f"`{data['command']}` on {data['device']}, {data['threads']} threads:"]
        for name, part in data["parts"].items():
            versions = ", ".join(f"{name} {is_at}" for name, is_at in part["versions"].items())
            lines += ["", f"### {name}", "", *shown[name](part, versions)]
        lines += [f"\n{name} was left out: {why}" for name, why in data["skipped"].items()]
    return lines


def _ms(seconds: float) -> str:
    return report.figure(seconds * 1e3)


def _transformers(part: Record, versions: str) -> list[str]:
    names = list(part["rows"][0]["cases"])
    rows: list[Sequence[str]] = [("frames", "tokens of the prompt", *names, "logits differ by")]
    for row in part["rows"]:
        cells = [
            f"{_ms(case['median_s'])} ({case['times_faster']:g} x)"
            for case in (row["cases"][name] for name in names)
        ]
        tokens, difference = str(row["prompt_tokens"]), f"{row['largest_logit_difference']:.0e}"
        rows.append((str(row["frames"]), tokens, *cells, difference))
    return [
        f"The same weights, pictures and tokens ({part['shape']}; {versions}). For every question "
        "transformers reads the whole prompt again, a session only the question: its frames were "
        "read once, when they came, at the cost of the last columns. The logits are compared where "
        "ours reads all at once as it does, so that frames see each other; in a session they do "
        "not, and at less than keep 1 some cells are gone: that is a gain by another computation. "
        "In brackets, how many times less than transformers' question.",
        "",
        *markdown(rows, ">"),
    ]


def _openvino(part: Record, versions: str) -> list[str]:
    rows: list[Sequence[str]] = [("graph", "sizes", "engine", "ms", "times less", "cosine")]
    for name, points in part["graphs"].items():
        for point in points:
            sizes = ", ".join(f"{dim} {size}" for dim, size in point["sizes"].items())
            for engine, case in point["cases"].items():
                figures = (f"{case['ratio']:g}", f"{case['cosine']:.5f}")
                rows.append((name, sizes, engine, _ms(case["median_s"]), *figures))
    return [
        f"The graphs of the bundle {part['bundle']} ({versions}).",
        "",
        *markdown(rows, "<<<>>>"),
    ]


def _llama_cpp(part: Record, versions: str) -> list[str]:
    rows: list[Sequence[str]] = [
        ("work", "ours", "llama.cpp", "times its", "ours, wall", "llama.cpp, wall", "times its")
    ]
    for name, row in part["rows"].items():
        cells: list[str] = []
        for clock in ("processor", "wall"):
            found = row[clock]
            pair = (_ms(found[who]["median_s"]) for who in ("ours", "llama.cpp"))
            cells += [*pair, f"{found['times_its_time']:.2f}"]
        rows.append((name, *cells))
    return [
        f"Molmo2-4B's language model ({part['shape']}) in four bits: our portable int4 bundle by "
        "ONNX Runtime, and by OpenVINO where it says so, and Q4_0 by llama.cpp "
        f"{part['llama.cpp']} ({versions}). The head has eight bits in both. Decoding is one "
        f"token, of pieces of {part['steps']}. Its cache is fp16, ours fp32; its step "
        "holds the choice of the token, our prefill the head.",
        "",
        *markdown(rows, "<>"),
    ]


def others() -> list[str]:
    """Every other result file that says how it was made."""
    rows: list[Sequence[str]] = [("file", "device", "command")]
    for path in sorted(RESULTS.rglob("*.json")):
        data = json.loads(path.read_text())
        if FOLDER in path.parents or path in (PLAN_CHECK, *PEERS) or not isinstance(data, dict):
            continue
        command = data.get("command")
        commands = [command] if isinstance(command, str) else command or []
        if commands:
            shown = "<br>".join(f"`{each}`" for each in commands)
            device = data.get("device") or report.NONE
            name = device if isinstance(device, str) else device.get("name", report.NONE)
            rows.append((str(path.relative_to(RESULTS)), name, shown))
    return markdown(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("page", type=Path, nargs="?", help="file to write")
    parser.add_argument("--readme", action="store_true", help="print README's table")
    args = parser.parse_args(argv)
    if args.readme:
        print("\n".join(table(records())))
    if args.page is not None:
        args.page.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
