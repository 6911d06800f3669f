"""The forecast of `edge-vlm plan` for this machine's processor, against two bundles that run on it.

    python -m benchmarks.runtime.plan_check

The demo bundle, and Molmo2-4B with two language layers and six vision blocks at full width, weights
made up, which is exported first. Rates and graphs are measured in turn in processor time, see
`edge_vlm_runtime.planning.check`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks.export.wide_engines import export
from benchmarks.harness import (
    RESULTS,
    made_folder,
    progress,
    result_head,
    script_parser,
    write_result,
)
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.planning.check import ALLOWED, check_bundles


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "plan_check.json")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="the test model instead")
    parser.add_argument("--scratch", type=made_folder, help="folder with room for the bundle, 3 GB")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="plan-", dir=args.scratch) as scratch:
        progress("exporting ...")
        wide = Path(scratch) / "bundle"
        export(args.tiny, "fp32", wide)
        checks = check_bundles(
            [DEMO_BUNDLE, wide], threads=args.threads, turns=args.turns, say=progress
        )
    for check in checks:
        print(f"{check.bundle} {check.stage}: forecast / measured {check.ratio:.2f}")
    write_result(
        args.out,
        {
            **result_head(__file__, argv, torch.device("cpu")),
            "clock": "processor time",
            "threads": args.threads,
            "turns": args.turns,
            "allowed": ALLOWED,
            "checks": [check.to_dict() for check in checks],
        },
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
