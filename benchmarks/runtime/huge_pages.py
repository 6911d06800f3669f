"""Each stage with weights on small pages and on huge ones, in turn.

    python -m benchmarks.runtime.huge_pages

Molmo2-4B with two language layers and six vision blocks at full width, weights made up, in fp32 and
with the language model in int4. Two engines of each graph, of which one is gathered on huge pages.
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import (
    RESULTS,
    in_turn,
    made_folder,
    progress,
    result_head,
    script_parser,
    speed_up,
    summary,
    write_result,
)
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm_runtime.engines import huge_pages
from edge_vlm_runtime.engines.ort import OrtEngine
from edge_vlm_runtime.planning.check import bind_noise, cases_of

DEVICE = torch.device("cpu")


def unheard(line: str) -> None:
    """Milliseconds of single runs are no news."""


def measured(path: Path, stage: str, threads: int, rounds: int) -> dict[str, Any]:
    """One stage of a bundle. In a process of its own: what another one freed is on huge pages."""
    bundle = EngineBundle.open(path)
    case = next(case for case in cases_of(bundle) if case.stage == stage)
    small = OrtEngine(bundle, case.graph, threads=threads)
    left = huge_pages.areas()
    huge = OrtEngine(bundle, case.graph, threads=threads)
    gathered = huge_pages.gather(leave=left)
    for engine in (small, huge):
        bind_noise(engine, case.dims)
    runs = {"small": small.run, "huge": huge.run}
    seconds = in_turn(
        runs, rounds=rounds, warmups=2, device=DEVICE, clock=time.process_time, say=unheard
    )
    small.close()
    huge.close()
    return {
        "stage": stage,
        "huge_mb": round(gathered / 1e6),
        "times_as_fast": round(speed_up(seconds["small"], seconds["huge"]), 3),
        **{name: summary(taken) for name, taken in seconds.items()},
    }


def stages(path: Path, threads: int, rounds: int) -> list[dict[str, Any]]:
    found = []
    for case in cases_of(EngineBundle.open(path)):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            row = process.submit(measured, path, case.stage, threads, rounds).result()
        progress(
            f"{case.stage}: {row['times_as_fast']} times as fast, {row['huge_mb']} MB gathered"
        )
        found.append(row)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "huge_pages.json")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--precisions", default="fp32,int4")
    parser.add_argument("--tiny", action="store_true", help="the test model instead")
    parser.add_argument("--scratch", type=made_folder, help="folder with room for a bundle, 3 GB")
    args = parser.parse_args(argv)
    from benchmarks.export import wide_engines  # large, and each stage's process loads this module

    found = {}
    for precision in args.precisions.split(","):
        with tempfile.TemporaryDirectory(prefix="pages-", dir=args.scratch) as scratch:
            progress(f"{precision}: exporting ...")
            wide_engines.export(args.tiny, precision, Path(scratch) / "bundle")
            found[precision] = stages(Path(scratch) / "bundle", args.threads, args.rounds)
    result = {**result_head(__file__, argv, DEVICE), "clock": "processor", "threads": args.threads}
    write_result(args.out, result | {"stages": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
