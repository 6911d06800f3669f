"""What is lost when things break? Real processes, killed and starved at random moments.

    python -m benchmarks.runtime.faults                            # 1000 kills, most of an hour
    python -m benchmarks.runtime.faults --kills 20 --out small.json
    python -m benchmarks.runtime.faults --cases full_disk sigterm --out small.json

`kills`: kill -9 of the server, its viewer, a webhook receiver and an MQTT broker, each started
again. Counted is what a viewer was told, what the queue's file held after each kill of the server,
and what arrived. Goals: all that the file held arrives, and all that a viewer was told but for a
moment before the server was killed; what arrives twice is the same and has the same key; a viewer
who is killed and comes back misses no event and gets none twice.

`full_disk`, `frozen_disk`: of the alert queue and the recordings. `clock`: the time of day jumps by
hours and days. `sigterm`: in the middle of answers. Goals: every frame has one outcome, every
answer ends, every alert that was told arrives. What this machine cannot show is left out by name.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RESULTS, commit, progress, result_head, script_parser, write_result
from benchmarks.runtime.fault_parts.cases import (
    NotHere,
    clock_jumps,
    frozen_disk,
    full_disk,
    sigterm_in_answers,
)
from benchmarks.runtime.fault_parts.kills import kill_at_random
from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm.pixels.video import read_video
from edge_vlm_runtime.demo.paths import DEMO_FOLDER

CASES = ("kills", "full_disk", "frozen_disk", "clock", "sigterm")


def write_pictures(folder: Path) -> None:
    folder.mkdir()
    for number, (_, rgb) in enumerate(read_video(DEMO_FOLDER / "clip.mp4", 2.0)):
        (folder / f"{number:03}.jpg").write_bytes(encode_jpeg(rgb))


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "faults.json")
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--most-seconds", type=float, default=7200.0, help="of killing")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--stops", type=int, default=20, help="by SIGTERM, one answer each")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    args = parser.parse_args(argv)
    cases: dict[str, Callable[[Path], dict[str, Any]]] = {
        "kills": lambda folder: kill_at_random(folder, args.kills, args.seed, args.most_seconds),
        "full_disk": full_disk,
        "frozen_disk": frozen_disk,
        "clock": clock_jumps,
        "sigterm": lambda folder: sigterm_in_answers(folder, args.stops),
    }
    head = result_head(__file__, argv, torch.device("cpu"))
    result: dict[str, Any] = {**head, "commit": commit()}
    for name in args.cases:
        progress(name)
        with tempfile.TemporaryDirectory() as folder:
            write_pictures(Path(folder, "pictures"))
            try:
                result[name] = cases[name](Path(folder))
            except NotHere as reason:
                result[name] = {"left_out": str(reason), "goals": {}}
        write_result(args.out, result)
    print(json.dumps(result, indent=1))
    return 0 if all(all(result[name]["goals"].values()) for name in args.cases) else 1


if __name__ == "__main__":
    sys.exit(main())
