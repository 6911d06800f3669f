"""`edge-vlm calibrate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_vlm.cli import Command
from edge_vlm.console.paths import input_footage, output_file
from edge_vlm.errors import ConfigError
from edge_vlm.formats.calibration import FP16_LIMIT, Calibration, CalibrationTable

RANGES_SHOWN = 5


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder with config.json and weights")
    parser.add_argument(
        "footage", type=input_footage, nargs="+", help="video file or question-set folder"
    )
    parser.add_argument(
        "-o",
        "--out",
        type=output_file,
        default="calibration.json",
        metavar="FILE",
        help="the table to write (default: %(default)s)",
    )
    parser.add_argument("--fps", type=float, default=2.0, help="frames a second of a video (2)")
    parser.add_argument("--max-frames", type=int, default=64, help="most of each footage (64)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")


def _calibrate(args: argparse.Namespace) -> int:
    import torch

    from edge_vlm_calibration.collect import calibrate as run
    from edge_vlm_calibration.provenance import identity_of, provenance_of

    if not args.fps > 0 or args.max_frames < 2:
        raise ConfigError("--fps must be above 0 and --max-frames at least 2")
    if args.threads:
        torch.set_num_threads(args.threads)
    table = run(args.checkpoint, args.footage, args.fps, args.max_frames)
    settings = {"fps": args.fps, "max_frames": args.max_frames}
    made = Calibration(model=identity_of(args.checkpoint)).with_section(
        table, provenance_of(args.footage, settings)
    )
    made.write(args.out)
    print(format_table(table))
    print(f"calibration: {args.out}")
    return 0


def format_table(table: CalibrationTable) -> str:
    """What a person wants to know first: scores, thresholds, the largest ranges, the verdict."""
    lines = [f"{table.num_frames} frames of {', '.join(table.footage)}"]
    if table.num_scores:
        lines.append(
            f"score      mean {table.score_mean:.4f}, std {table.score_std:.4f}, "
            f"5..95 % {table.score_quantiles[5]:.4f}..{table.score_quantiles[95]:.4f}"
        )
    else:
        lines.append("score      none: the model has no token scorer")
    lines += [
        f"keep {t.keep_ratio:4.0%}  score >= {t.score:.4f} (keeps {t.kept_share:.1%})"
        for t in table.thresholds
    ]
    found = [(x, f"{name} (in)") for name, x in table.input_ranges.items()]
    found += [(x, f"{name} (out)") for name, x in table.output_ranges.items()]
    lines.append("largest |x|")
    lines += [f"{x:10.4g}  {name}" for x, name in sorted(found, reverse=True)[:RANGES_SHOWN]]
    unsafe = table.fp16_unsafe
    verdict = f"UNSAFE in {len(unsafe)} modules: {', '.join(unsafe)}" if unsafe else "safe"
    lines.append(f"fp16 (vision side, limit {FP16_LIMIT:.0f}): {verdict}")
    return "\n".join(lines)


calibrate = Command(
    add_arguments=_arguments,
    run=_calibrate,
)
