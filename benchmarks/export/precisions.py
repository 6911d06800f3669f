"""What each precision of an export costs: size, distance from torch, answers, on real pictures.

    python -m benchmarks.export.precisions --footage bikes.mp4 bigbuckbunny.mp4

For every precision and operator variant a bundle is exported, ranges measured on the first
`--measured` frames of each video where the precision asks for them, and then verified against torch
in float32: every graph at its smallest, usual and largest sizes, the clip in the bundle, and the
first `--frames` frames of each video, which have to give finite values throughout. The videos'
answers are compared word by word up to the first that differs: a model that was not trained on such
pictures is unsure of its words, so that agreement there is a hard test and no accuracy.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import (
    CHECKPOINT,
    RESULTS,
    progress,
    result_head,
    script_parser,
    write_result,
)
from edge_vlm.errors import EdgeVlmError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.precision import PRESETS, Precision, Variant
from edge_vlm_export.graphs.weights import open_weights
from edge_vlm_export.to_onnx import ExportOptions, export_bundle
from edge_vlm_export.verify.verify import Report, verify_bundle
from edge_vlm_runtime.demo.paths import DEMO_FOLDER

ORT_PRECISIONS = ("fp32", "int8", "int4")
DEMO_CLIP = DEMO_FOLDER / "clip.mp4"
CASES = [f"portable {name}" for name in PRESETS] + [f"ort {name}" for name in ORT_PRECISIONS]


def run_case(case: str, args: argparse.Namespace, footage: list[Path], scratch: Path) -> Any:
    """Sizes and comparisons of one precision and variant; an export that fails says why."""
    variant, _, name = case.partition(" ")
    options = ExportOptions(
        precision=Precision.parse(name),
        variant=Variant(variant),
        footage=tuple(footage),
        max_frames=args.measured,
        threads=args.threads,
    )
    began = time.monotonic()
    try:
        bundle = export_bundle(args.checkpoint, scratch / case.replace(" ", "-"), options)
        export_s = round(time.monotonic() - began, 1)
        source = open_weights(args.checkpoint)
        report = verify_bundle(
            bundle, source, threads=args.threads, footage=footage, max_frames=args.frames
        )
        report.require()
    except EdgeVlmError as error:
        return {"failed": f"{error.code}: {error}"}
    return {"export_s": export_s, **sizes(bundle), **comparisons(report)}


def sizes(bundle: EngineBundle) -> dict[str, float]:
    def megabytes(pattern: str) -> float:
        files = [path for path in bundle.path.rglob(pattern) if path.is_file()]
        return round(sum(path.stat().st_size for path in files) / 1e6, 2)

    graphs = {
        f"{name}_mb": round(megabytes(f"{name}.onnx") + megabytes(f"{name}.weights"), 2)
        for name in bundle.specs
    }
    return {**graphs, "bundle_mb": megabytes("*")}


def comparisons(report: Report) -> dict[str, Any]:
    """Worst of every graph over its sizes, then clip and videos."""
    graphs: dict[str, Any] = {}
    for found in report.graphs:
        worst = graphs.setdefault(found.graph, {"max_difference": 0.0, "least_cosine": 1.0})
        worst["max_difference"] = max(worst["max_difference"], float(f"{found.difference:.3g}"))
        worst["least_cosine"] = min(worst["least_cosine"], round(found.cosine, 6))
    clip = report.pipelines[0]
    return {
        "graphs": graphs,
        "clip": {
            "same_cells": f"{clip.same_cells} of {clip.frames}",
            "logits_cosine": round(clip.logits, 6),
            "same_tokens": f"{clip.same_tokens} of {clip.tokens}",
        },
        "footage": {
            check.name: {
                "finite": True,  # or verifying would have raised NonFinite
                "frames": check.frames,
                "same_cells": f"{check.same_cells} of {check.frames}",
                "least_features_cosine": _rounded(check.features),
                "least_logits_cosine": _rounded(check.logits),
                "same_tokens": f"{check.same_tokens} of {check.tokens}",
            }
            for check in report.footage
        },
    }


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)


def line(case: str, found: dict[str, Any]) -> str:
    """A row of the table in docs/export.md."""
    if "failed" in found:
        return f"| `{case}` | {found['failed']} |"
    graphs = found["graphs"]
    videos = [
        f"{video['same_cells']}, {video['same_tokens']}".replace(" of ", "/")
        for video in found["footage"].values()
    ]
    vision = f"{found['vit_stem_mb'] + found['vit_trunk_mb']:.1f}"
    return " | ".join(
        [
            f"| `{case}`",
            f"{vision} + {found['llm_mb']:.1f}",
            *(
                f"{graphs[name]['least_cosine']:.6f} / {graphs[name]['max_difference']:.1e}"
                for name in ("vit_stem", "vit_trunk", "llm")
            ),
            *videos,
            f"{found['export_s']:.0f} s |",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "precisions.json")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--footage", type=Path, nargs="*", default=[], metavar="VIDEO")
    parser.add_argument("--measured", type=int, default=16, help="frames that ranges are taken of")
    parser.add_argument("--frames", type=int, default=32, help="frames that are checked")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    footage = [DEMO_CLIP, *args.footage]
    result: dict[str, Any] = {
        **result_head(__file__, argv, torch.device("cpu")),
        "checkpoint": open_weights(args.checkpoint).identity,
        "frames_measured": args.measured,
        "frames_checked": args.frames,
        "cases": {},
    }
    with tempfile.TemporaryDirectory(prefix="precisions-", dir=args.out.parent) as scratch:
        for case in args.cases:
            progress(f"{case} ...")
            found = result["cases"][case] = run_case(case, args, footage, Path(scratch))
            print(line(case, found), flush=True)
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
