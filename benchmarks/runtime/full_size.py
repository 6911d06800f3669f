"""Molmo2-4B whole, weights made up, on a CPU: frames a second and tokens a second.

    python -m benchmarks.runtime.full_size                       # exports it first: 8 GB of disk
    python -m benchmarks.runtime.full_size --bundle BUNDLE       # one that is there

Before: every graph by ONNX Runtime, a token by the graph that joins new and old cache. Now: what
`--backend auto` runs, a token by the graph that leaves the cache where it lies (`--variant
portable` exports both). Pictures are float32 in the bundle, the language model int4. In turn, time
that passes; a frame is its stem, its trunk and its tokens behind 512 others.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.export.full_size_export import TOKENIZER
from benchmarks.harness import (
    RESULTS,
    in_turn,
    made_folder,
    progress,
    result_head,
    script_parser,
    summary,
    write_result,
)
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.precision import Precision
from edge_vlm.presets import molmo2_4b, tiny
from edge_vlm_export.graphs.graphs import KVForm
from edge_vlm_export.graphs.weights import made_up_weights
from edge_vlm_export.to_onnx import ExportOptions, export_source
from edge_vlm_runtime.engines.base import Engine
from edge_vlm_runtime.engines.names import Backend
from edge_vlm_runtime.engines.open import open_graphs
from edge_vlm_runtime.engines.ort import OrtEngine
from edge_vlm_runtime.planning.check import bind_noise

RATIOS = (1.0, 0.5, 0.2)
MARKERS = 6
"""Tokens of a frame that are no cells: its time and its marks."""
DEVICE = torch.device("cpu")


def exported(is_tiny: bool, folder: Path) -> Path:
    cfg = tiny(179, 3) if is_tiny else molmo2_4b()
    options = ExportOptions(
        precision=Precision.parse("int4"), kv_form=KVForm.BOTH, thorough=False, threads=2
    )
    export_source(made_up_weights(cfg, 0, TOKENIZER, "full-size"), folder, options)
    return folder


def measured(bundle: EngineBundle, threads: int, rounds: int, past: int) -> dict[str, Any]:
    """Medians by stage and form, and what follows from them."""
    cells = bundle.config.vision.num_cells
    counts = {ratio: max(1, round(ratio * cells)) for ratio in RATIOS}
    now = open_graphs(bundle, Backend.AUTO, threads=threads)
    before = {n: OrtEngine(bundle, n, threads=threads) for n in ("vit_stem", "vit_trunk", "llm")}
    stages: dict[str, dict[str, Any]] = {}

    def turns(stage: str, engines: Mapping[str, Engine], dims: Mapping[str, int]) -> None:
        for engine in engines.values():
            bind_noise(engine, dims)
        seconds = in_turn(
            {form: engine.run for form, engine in engines.items()},
            rounds=rounds,
            warmups=1,
            device=DEVICE,
            say=progress,
            clock=time.perf_counter,
        )
        stages[stage] = {form: summary(taken) for form, taken in seconds.items()}
        progress(stage)

    def pair(name: str) -> dict[str, Engine]:
        return {"before": before[name], "now": now.graphs[name]}

    try:
        turns("vit_stem", pair("vit_stem"), {"F": 1})
        for ratio, count in counts.items():
            turns(f"vit_trunk {ratio:g}", pair("vit_trunk"), {"F": 1, "G": count})
            sizes = {"s": count + MARKERS, "p": past, "n": 1}
            turns(f"prefill {ratio:g}", pair("llm"), sizes)
        token = {"before": before["llm"], "now": now.graphs["llm_decode"]}
        turns("decode", token, {"s": 1, "p": past, "n": 1})
    finally:
        for engine in (*now.graphs.values(), *before.values()):
            engine.close()

    table = {
        form: {
            "frames_a_second": {
                f"{ratio:g}": round(
                    1 / sum(stages[stage][form]["median_s"] for stage in stages_of(ratio)), 4
                )
                for ratio in RATIOS
            },
            "tokens_a_second": round(1 / stages["decode"][form]["median_s"], 3),
        }
        for form in ("before", "now")
    }
    return {"runs_on": now.runs_on, "past": past, "stages": stages, "table": table}


def stages_of(ratio: float) -> tuple[str, ...]:
    return "vit_stem", f"vit_trunk {ratio:g}", f"prefill {ratio:g}"


def lines(table: Mapping[str, Any]) -> list[str]:
    """The table as text."""
    found = [f"{'':8}{''.join(f'keep {ratio:<8g}' for ratio in RATIOS)}tokens a second"]
    for form, row in table.items():
        frames = "".join(f"{value:<13g}" for value in row["frames_a_second"].values())
        found.append(f"{form:8}{frames}{row['tokens_a_second']:g}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "full_size.json")
    parser.add_argument("--bundle", type=Path, help="int4, of --variant portable")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--past", type=int, default=512)
    parser.add_argument("--tiny", action="store_true", help="the test model instead")
    parser.add_argument("--scratch", type=made_folder, help="folder with room for the bundle")
    args = parser.parse_args(argv)
    with ExitStack() as stack:
        folder = args.bundle
        if folder is None:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=args.scratch))
            progress("exporting ...")
            folder = exported(args.tiny, Path(scratch) / "bundle")
        found = measured(EngineBundle.open(folder), args.threads, args.rounds, args.past)
    result = {**result_head(__file__, argv, DEVICE), "clock": "wall", "threads": args.threads}
    write_result(args.out, result | found)
    print("\n".join(lines(found["table"])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
