"""`edge-vlm calibrate`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from edge_vlm.cli import Command
from edge_vlm.console.paths import input_footage, output_file
from edge_vlm.errors import ConfigError
from edge_vlm.formats.calibration import Calibration

if TYPE_CHECKING:
    from edge_vlm.watching import Watcher
    from edge_vlm_calibration.run import Request

SECTIONS = ("change", "budget", "ranges", "alerts")
LOOKED = ("change", "budget")
"""Sections that are made of one pass over the footage."""
MERGE = Path("merge")
RANGE_FRAMES = 64


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "%(prog)s [-h] CHECKPOINT|BUNDLE CLIPS... -o calibration.json [options]\n"
        "       %(prog)s merge CALIBRATION CALIBRATION... -o calibration.json"
    )
    parser.add_argument(
        "model",
        type=Path,
        metavar="CHECKPOINT|BUNDLE",
        help="exported bundle (needs no torch), checkpoint or published folder; or the word merge",
    )
    parser.add_argument(
        "footage",
        type=input_footage,
        nargs="*",
        metavar="CLIPS",
        help="video files, question-set or event-set folders of what the camera will see",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=output_file,
        default="calibration.json",
        metavar="FILE",
        help="the file to write; sections are put into one that is there (default: %(default)s)",
    )
    parser.add_argument(
        "--sections",
        metavar="NAMES",
        help=f"of {','.join(SECTIONS)} (default: change,budget, of a checkpoint ranges too, and "
        "alerts with --marks)",
    )
    budget = parser.add_argument_group("what the footage may cost (section budget)")
    share = budget.add_mutually_exclusive_group()
    share.add_argument(
        "--keep-ratio",
        type=float,
        metavar="R",
        help="share of cells kept (default: what the model was made for)",
    )
    share.add_argument(
        "--tokens-per-second", type=float, metavar="N", help="or cells kept a second of video"
    )
    budget.add_argument(
        "--measure",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="of each clip that a real session is shown with the settings; 0: none (60)",
    )
    parser.add_argument("--fps", type=float, default=2.0, help="frames a second of a video (2)")
    parser.add_argument(
        "--max-frames",
        type=int,
        default=RANGE_FRAMES,
        help="most of each clip for the section ranges (64)",
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    parser.add_argument(
        "--backend", default="ort", metavar="NAME", help="runs bundles: ort, openvino, auto (ort)"
    )


def _calibrate(args: argparse.Namespace) -> int:
    if args.model == MERGE:
        return _merge(args)
    from edge_vlm_calibration.rows import WorkFolder
    from edge_vlm_calibration.run import made_with, make, opened
    from edge_vlm_calibration.text import summary

    if not args.footage:
        raise ConfigError(
            "there are no clips",
            remedy="name footage of what the camera will see, behind the model",
        )
    if not 0 < args.fps <= 1000 or args.max_frames < 2 or not args.measure >= 0:
        raise ConfigError(
            "--fps must be in 0..1000, --max-frames at least 2 and --measure not negative"
        )
    request = _request(args)
    made: Calibration | None = None
    if args.out.is_file() and args.out.stat().st_size:
        made = Calibration.read(args.out)
    work = args.out.with_name(f"{args.out.name}.work")
    try:
        with ExitStack() as stack:
            watcher = stack.enter_context(opened(request))
            if made is None:
                made = Calibration(model=watcher.model)
            made = made.merged(Calibration(model=watcher.model), args.out)
            if set(request.sections) & set(LOOKED):
                folder = stack.enter_context(WorkFolder(work, made_with(request, watcher)))
                made = make(request, watcher, folder, made)
            made = _more(args, request, watcher, made)
            made.write(args.out)
    except KeyboardInterrupt:
        if work.is_dir():
            print(f"stopped: the same command goes on where it was ({work.name}/)", file=sys.stderr)
        raise
    print(summary(made, request.sections))
    print(f"\ncalibration: {args.out}")
    return 0


def _more(
    args: argparse.Namespace, request: Request, watcher: Watcher, made: Calibration
) -> Calibration:
    """The sections with a pass of their own."""
    if "ranges" in request.sections:
        from edge_vlm_calibration.collect import calibrate as collect
        from edge_vlm_calibration.provenance import provenance_of

        table = collect(request.model, request.clips, args.fps, args.max_frames)
        settings = {"fps": args.fps, "max_frames": args.max_frames}
        made = made.with_section(table, provenance_of(request.clips, settings))
    return made


def _request(args: argparse.Namespace) -> Request:
    """Raises ConfigError."""
    from edge_vlm_calibration.budget import Wanted
    from edge_vlm_calibration.run import Request

    wanted = Wanted("keep_ratio", 0.5 if args.keep_ratio is None else args.keep_ratio)
    if args.tokens_per_second is not None:
        wanted = Wanted("vision_tokens_per_s", args.tokens_per_second)
    if not 0 < wanted.value <= (1.0 if wanted.name == "keep_ratio" else 1e6):
        raise ConfigError(
            "--keep-ratio must be in (0, 1], --tokens-per-second above 0",
            where=f"{wanted.value:g}",
        )
    request = Request(
        model=args.model,
        clips=args.footage,
        sections=(),
        wanted=wanted,
        fps=args.fps,
        measure_s=args.measure,
        threads=args.threads,
        backend=args.backend,
    )
    import dataclasses

    return dataclasses.replace(request, sections=_sections(args.sections, request.is_bundle))


def _sections(text: str | None, is_bundle: bool) -> Sequence[str]:
    """Raises ConfigError."""
    if text is None:
        return LOOKED if is_bundle else (*LOOKED, "ranges")
    names = tuple(dict.fromkeys(name for name in text.replace(" ", "").split(",") if name))
    unknown = [name for name in names if name not in SECTIONS]
    if unknown or not names:
        raise ConfigError(
            f"there is no section {', '.join(unknown) or text!r}",
            where="--sections",
            remedy=f"of {', '.join(SECTIONS)}",
        )
    if is_bundle and "ranges" in names:
        raise ConfigError(
            "ranges of activations are those of a checkpoint, not of a bundle",
            where="--sections",
            remedy="name the checkpoint that the bundle was exported from",
        )
    return names


def _merge(args: argparse.Namespace) -> int:
    """`edge-vlm calibrate merge A B -o C`."""
    if len(args.footage) < 2:
        raise ConfigError("merge takes two calibrations or more", remedy="name their files")
    merged = Calibration.read(args.footage[0])
    for path in args.footage[1:]:
        merged = merged.merged(Calibration.read(path), path)
    merged.write(args.out)
    print(f"calibration: {args.out} with {', '.join(sorted(merged.sections))}")
    return 0


calibrate = Command(
    add_arguments=_arguments,
    run=_calibrate,
)
