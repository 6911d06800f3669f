"""A record as a page for people, and as a table for a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from edge_vlm.console.tables import markdown

Record = Mapping[str, Any]
NONE = "-"


def figure(value: float | None, unit: str = "") -> str:
    """Three digits, or all in front of the point; `-` for what is not there."""
    if value is None:
        return NONE
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text}{unit}"


def middle(summary: Mapping[str, Any] | None) -> str:
    """Median and how far apart the turns were."""
    if summary is None:
        return NONE
    return f"{figure(summary['p50'])} ± {summary['spread'] * 50:.0f} %"


def spread_of(summary: Mapping[str, Any] | None) -> str:
    """p50 / p90 / p99."""
    if summary is None:
        return NONE
    return " / ".join(figure(summary[name]) for name in ("p50", "p90", "p99"))


def as_markdown(record: Record) -> str:
    """The page: what, where, then a table for each section that was reached."""
    lines = [f"# edge-vlm bench: {title(record)}", "", *head_lines(record), ""]
    for section in (frames, answers, stream, memory, energy, start, roofline, layers):
        part = section(record)
        if part:
            lines += [*part, ""]
    lines += notes(record)
    return "\n".join(lines).rstrip() + "\n"


def title(record: Record) -> str:
    model = record["model"]
    return f"{model['name']} on {record['device']['name']}, {model['backend']}"


def head_lines(record: Record) -> list[str]:
    device, model, workload = record["device"], record["model"], record["workload"]
    versions = ", ".join(f"{name} {number}" for name, number in device["versions"].items())
    lines = [
        f"`{record['command']}`",
        "",
        f"- device: {device['name']} ({device['cpu']}, {device['cores']} cores, "
        f"{figure(device['memory_gb'])} GB, {device['system']} {device['architecture']})",
        f"- {versions}",
        _model_line(model),
        f"- workload: {workload['repeat']} turns of A B A, {workload['samples']} samples of a "
        f"point in a turn behind {workload['warmups']} warm-ups, {workload['source']} pictures "
        f"{workload['picture'][0]}x{workload['picture'][1]}",
    ]
    for name, key in (("driver", "driver"), ("Jetson Linux", "jetson_linux")):
        if device.get(key):
            lines.append(f"- {name}: {device[key]}")
    for name, text in (device.get("power_mode") or {}).items():
        lines.append(f"- {name}: {text}")
    run = record.get("run")
    if run:
        clocks = ", ".join(
            f"{name} {mhz:g} -> {run['clocks_after_mhz'].get(name, mhz):g} MHz"
            for name, mhz in run["clocks_before_mhz"].items()
        )
        lines.append(
            f"- while it ran ({run['seconds']:.0f} s): clocks {clocks or 'unknown'}; own "
            f"{figure(run['own_cores'])} cores, others {figure(run['others_cores'])}"
        )
    return lines


def _model_line(model: Mapping[str, Any]) -> str:
    parts = [str(model[name]) for name in ("name", "precision", "variant") if model[name]]
    parts.append(f"backend {model['backend']}")
    if model["threads"]:
        parts.append(f"{model['threads']} threads")
    if model["sha256"]:
        parts.append(f"sha256 of the manifest {model['sha256'][:12]}")
    if model.get("runs_on"):
        parts.append(model["runs_on"])
    return f"- model: {', '.join(parts)}"


def frames(record: Record) -> list[str]:
    points = record.get("frames")
    if not points:
        return []
    rows: list[Sequence[str]] = [
        (
            *("keep", "cells", "tokens", "vit_stem", "select", "vit_trunk", "prefill"),
            *("frame p50 / p90 / p99", "n", "processor", "frames/s"),
            *("speed-up", "in processor time"),
        )
    ]
    for point in points:
        stages, speed_up = point["stages_ms"], point.get("speed_up") or {}
        frame = stages["frame"]
        rows.append(
            (
                f"{point['keep_ratio']:g}",
                str(point["cells"]),
                str(point["tokens"] or NONE),
                *(middle(stages.get(n)) for n in ("vit_stem", "select", "vit_trunk", "prefill")),
                spread_of(frame),
                str(frame["n"]) if frame else NONE,
                figure((point["processor_ms"] or {}).get("p50")),
                figure(point["frames_per_s"]),
                *(_range(speed_up.get(name)) for name in ("frame", "processor")),
            )
        )
    return [
        "## A frame (milliseconds)",
        "",
        f"{_place(record)} Median ± half the spread of the turns' medians; processor: "
        "computing of all threads, to which waiting for other programs does not count; speed-up: "
        "median (least to most) of the turns, against the frames before and behind.",
        "",
        *markdown(rows, ">"),
    ]


def _place(record: Record) -> str:
    if not record["frames"][0]["tokens"]:  # of a server, which is asked for sessions only
        return "In sessions that start empty, each frame sent when the one before is in the memory."
    return f"Prefilled behind {record['workload']['frame_context']} tokens."


def _range(ratio: Mapping[str, float] | None) -> str:
    if ratio is None:
        return NONE
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"


def answers(record: Record) -> list[str]:
    points = record.get("answers")
    if not points:
        return []
    rows: list[Sequence[str]] = [
        ("context", "TTFT p50 / p90 / p99 ms", "n", "ITL p50 / p90 / p99 ms", "n", "tokens/s")
    ]
    for point in points:
        ttft, itl = point["ttft_ms"], point["itl_ms"]
        rows.append(
            (
                str(point["context"]),
                spread_of(ttft),
                str(ttft["n"]) if ttft else NONE,
                spread_of(itl),
                str(itl["n"]) if itl else NONE,
                figure(point["tokens_per_s"]),
            )
        )
    return ["## An answer", "", *markdown(rows, ">")]


def stream(record: Record) -> list[str]:
    part = record.get("stream")
    if not part:
        return []
    rows: list[Sequence[str]] = [
        (
            *("frames/s in", "sent", "processed", "duplicates", "dropped", "cells kept"),
            "recomputed",
            *("lag p50 / p90 / p99 ms", "most", "frames/s done"),
        )
    ]
    for point in part["rates"]:
        lag = point["lag_ms"]
        dropped = {k: v for k, v in point["dropped"].items() if k != "duplicate"}
        rows.append(
            (
                str(point["rate"]),
                str(point["sent"]),
                str(point["processed"]),
                str(point["dropped"].get("duplicate", 0)),
                ", ".join(f"{count} {why}" for why, count in dropped.items()) or "0",
                *(
                    NONE if point.get(share) is None else f"{point[share]:.0%}"
                    for share in ("kept_share", "recomputed_share")
                ),
                spread_of(lag),
                figure(lag["max"]) if lag else NONE,
                figure(point["processed_per_s"]),
            )
        )
    lines = [
        "## A live stream",
        "",
        f"{part['path']}; lag is from a picture's capture to the event that it is in the memory.",
        "",
        *markdown(rows, ">"),
    ]
    if later := sum(point["in_memory_later"] for point in part["rates"]):
        lines += [
            "",
            f"{later} pictures joined the memory later, together with others, and have no lag.",
        ]
    session = part.get("session")
    if session and session["ttft_ms"]:
        lines += [
            "",
            f"Asked in the session: TTFT {spread_of(session['ttft_ms'])} ms (p50 / p90 / p99 of "
            f"{session['ttft_ms']['n']}) with {session['kv_tokens']} tokens in memory.",
        ]
    return lines


def memory(record: Record) -> list[str]:
    part = record.get("memory")
    if not part:
        return []
    rows: list[Sequence[str]] = [("memory", "MB")]
    for name, value in part.items():
        if name.endswith("_bytes") and name != "cache_token_bytes":
            text = NONE if value is None else f"{value / 1e6:.1f}"
            rows.append((name.removesuffix("_bytes").replace("_", " "), text))
    return ["## Memory", "", *markdown(rows, "<>")]


def energy(record: Record) -> list[str]:
    part = record.get("energy")
    if not part:
        return []
    lines = ["## Energy", ""]
    if part["readings"]:
        rows: list[Sequence[str]] = [
            ("meter", "idle W", "frames W", "J a frame", "J an answer", "tokens a joule")
        ]
        for reading in part["readings"]:
            names = ("idle_w", "frames_w", "j_per_frame", "j_per_answer", "tokens_per_j")
            rows.append((reading["meter"], *(figure(reading.get(name)) for name in names)))
        lines += markdown(rows, "<>")
    lines += [f"- {name}: {why}" for name, why in part["absent"].items()]
    return lines


def start(record: Record) -> list[str]:
    part = record.get("start")
    if not part:
        return []
    return [
        "## Start",
        "",
        f"Loading the engines took {figure(part['load_s'])} s in this process; a new process needs "
        f"{figure(part['cold_s'])} s until its first frame is encoded and the first token chosen.",
    ]


def roofline(record: Record) -> list[str]:
    part = record.get("roofline")
    if not part:
        return []
    rows: list[Sequence[str]] = [
        (
            *("stage", "MFLOP", "MB moved", "bound", "by", "measured", "reached", "share", "saved"),
            "frame gains at most",
        )
    ]
    rows += [
        (
            stage["stage"],
            figure(stage["flops"] / 1e6),
            figure(stage["bytes"] / 1e6),
            figure(stage["bound_ms"], " ms"),
            stage["by"],
            figure(stage["measured_ms"], " ms"),
            _percent(stage["reached"]),
            _percent(stage["share"]),
            _percent(stage["saving"]),
            figure(stage["gain_at_most"], "x"),
        )
        for stage in part["stages"]
    ]
    return [
        "## Against the machine's bounds",
        "",
        f"{part['source'].capitalize()}: copies {figure(part['copy_gb_s'])} GB/s, reads "
        f"{figure(part['read_gb_s'])} GB/s, matrix products {figure(part['matrix_gflop_s'])} "
        "GFLOP/s.",
        "",
        *markdown(rows, "<>"),
        "",
        part["sentence"],
    ]


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{share:.0%}"


def layers(record: Record) -> list[str]:
    part = record.get("layers")
    if not part:
        return []
    lines = ["## Layers", "", "In a run of its own: profiling slows a graph down.", ""]
    for graph in part:
        rows: list[Sequence[str]] = [(graph["graph"], "calls", "ms a run", "share")]
        rows += [
            (op["op"], str(op["calls"]), figure(op["ms"]), f"{op['share']:.0%}")
            for op in graph["ops"]
        ]
        lines += [*markdown(rows, "<>"), ""]
    return lines[:-1]


def notes(record: Record) -> list[str]:
    found = [*(record.get("run") or {}).get("warnings", []), *record["notes"]]
    if not record["complete"]:
        found.append(f"not complete: {record['ended_by']}")
    return ["## Notes", "", *(f"- {note}" for note in found)] if found else []


def as_csv(record: Record) -> str:
    """One line for each figure: section, point, figure, value."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("section", "point", "figure", "value"))
    for section, point, name, value in rows_of(record):
        writer.writerow((section, point, name, "" if value is None else value))
    return out.getvalue()


def rows_of(record: Record) -> list[tuple[str, str, str, Any]]:
    rows: list[tuple[str, str, str, Any]] = []
    for section in ("device", "model", "workload", "run"):
        _walk(rows, section, "", "", record.get(section))
    for section, key in (("frames", "keep_ratio"), ("answers", "context"), ("layers", "graph")):
        for point in record.get(section) or ():
            _walk(rows, section, f"{key}={point[key]}", "", point)
    for point in (record.get("stream") or {}).get("rates", ()):
        _walk(rows, "stream", f"rate={point['rate']}", "", point)
    for section in ("memory", "energy", "start", "roofline"):
        _walk(rows, section, "", "", record.get(section))
    return rows


def _walk(
    rows: list[tuple[str, str, str, Any]], section: str, point: str, name: str, value: Any
) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _walk(rows, section, point, f"{name}.{key}" if name else str(key), inner)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _walk(rows, section, point, f"{name}.{index}" if name else str(index), inner)
    elif value is not None or name:
        rows.append((section, point, name, value))
