"""`edge-vlm calibrate`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_vlm.cli import Command
from edge_vlm.console.paths import input_footage, output_file
from edge_vlm.console.usage import thread_count
from edge_vlm.errors import ConfigError
from edge_vlm.formats.calibration import Calibration

if TYPE_CHECKING:
    from edge_vlm.watching import Watcher
    from edge_vlm_calibration.alerts.make import AlertRequest
    from edge_vlm_calibration.budget import Wanted
    from edge_vlm_calibration.rows import WorkFolder
    from edge_vlm_calibration.run import Request

SECTIONS = ("change", "budget", "reuse", "ranges", "precision", "alerts")
USUAL = ("change", "budget")
LOOKED = (*USUAL, "reuse")
"""Sections that are made of one pass over the footage."""
OF_CHECKPOINTS = ("ranges", "precision")
"""Sections that a bundle cannot give."""
MERGE, REPORT = Path("merge"), Path("report")
RANGE_FRAMES = 64
OPTIONS_OF = (
    (("budget",), {"keep_ratio", "tokens_per_second", "measure", "questions", "plot"}),
    (("alerts",), {"marks", "false_alarms_per_hour", "slack", "one_rule", "toml", "camera"}),
    (OF_CHECKPOINTS, {"max_frames"}),
)
"""What only some sections have a use for."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "%(prog)s [-h] CHECKPOINT|BUNDLE CLIPS... -o calibration.json [options]\n"
        "       %(prog)s merge CALIBRATION CALIBRATION... -o calibration.json\n"
        "       %(prog)s report CALIBRATION [CLIPS...] --report FILE.html"
    )
    parser.add_argument(
        "model",
        type=Path,
        metavar="CHECKPOINT|BUNDLE",
        help="exported bundle (needs no torch), checkpoint or published folder; or the word merge "
        "or report",
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
        help="share of cells kept (default: what the model was made for; 0.5 if that is all)",
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
    budget.add_argument(
        "--questions",
        type=input_footage,
        metavar="FILE",
        help="questions with known answers, as of `eval` (JSONL or a question-set folder): right "
        "answers at each share",
    )
    budget.add_argument(
        "--plot", type=output_file, metavar="FILE.png", help="draw the curves into a picture"
    )
    alerts = parser.add_argument_group("alerts on footage with known events (section alerts)")
    alerts.add_argument(
        "--marks",
        type=Path,
        metavar="FILE",
        help="CSV or JSON: alert,question,clip,start,end, see docs/calibration.md (event-set "
        "folders have their own)",
    )
    alerts.add_argument(
        "--false-alarms-per-hour",
        type=float,
        default=1.0,
        metavar="N",
        help="of each alert at most (1)",
    )
    alerts.add_argument(
        "--slack",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="how far outside its marks an event may be noticed: people mark a little late (1)",
    )
    alerts.add_argument(
        "--one-rule",
        action="store_true",
        help="one rule for all questions, where each has too few events",
    )
    alerts.add_argument(
        "--toml",
        type=output_file,
        metavar="FILE",
        help="write the alerts as [[alert]] tables for `serve` (default: print them)",
    )
    alerts.add_argument(
        "--camera", default="camera", metavar="NAME", help="of these tables (camera)"
    )
    parser.add_argument(
        "--report", type=output_file, metavar="FILE.html", help="write a page to look at, too"
    )
    parser.add_argument("--fps", type=float, default=2.0, help="frames a second of a video (2)")
    parser.add_argument(
        "--max-frames",
        type=int,
        default=RANGE_FRAMES,
        help="most of each clip for the sections ranges and precision (64)",
    )
    parser.add_argument(
        "--threads", type=thread_count, default=0, help="CPU threads (default: all)"
    )
    parser.add_argument(
        "--backend", default="ort", metavar="NAME", help="runs bundles: ort, openvino, auto (ort)"
    )


def _calibrate(args: argparse.Namespace) -> int:
    if args.model == MERGE:
        _refuse_others(args, "merge", {"model", "footage", "out"})
        return _merge(args)
    if args.model == REPORT:
        _refuse_others(args, "report", {"model", "footage", "report", "fps"})
        return _only_report(args)
    from edge_vlm_calibration.alerts.make import watched
    from edge_vlm_calibration.rows import WorkFolder, only_run
    from edge_vlm_calibration.run import made_with, make, names_of, opened
    from edge_vlm_calibration.telling.text import summary

    if not args.footage:
        raise ConfigError(
            "there are no clips",
            remedy="name footage of what the camera will see, behind the model",
        )
    resolved = [path.resolve() for path in args.footage]
    if twice := [path for path in args.footage if resolved.count(path.resolve()) > 1]:
        raise ConfigError(
            "a clip is named twice and would count twice", where=twice[0], remedy="name it once"
        )
    if not 0 < args.fps <= 1000 or args.max_frames < 2 or not 0 <= args.measure <= 1e9:
        raise ConfigError(
            "--fps must be in 0..1000, --max-frames at least 2 and --measure not negative"
        )
    request = _request(args)
    for sections, names in OPTIONS_OF:
        if not set(sections) & set(request.sections):
            what = f"what is made here ({', '.join(request.sections)})"
            _refuse_others(args, what, _defaults().keys() - names)
    if "alerts" in request.sections:  # what is wrong with the marks is said at once
        watched(_alert_request(args), names_of(request.clips))
    made: Calibration | None = None
    work = args.out.with_name(f"{args.out.name}.work")
    try:
        with ExitStack() as stack:
            stack.enter_context(only_run(args.out))
            if args.out.is_file() and args.out.stat().st_size:
                made = Calibration.read(args.out)
            watcher = stack.enter_context(opened(request))
            if args.keep_ratio is None and args.tokens_per_second is None:
                request = dataclasses.replace(request, wanted=share_of(watcher.defaults))
            if made is None:
                made = Calibration(model=watcher.model)
            made = made.merged(Calibration(model=watcher.model), args.out)
            folder = stack.enter_context(WorkFolder(work, made_with(request, watcher)))
            if set(request.sections) & set(LOOKED):
                made = make(request, watcher, folder, made)
            made = _more(args, request, watcher, folder, made)
            made.write(args.out)
    except KeyboardInterrupt:
        if work.is_dir():
            print(f"stopped: the same command goes on where it was ({work.name}/)", file=sys.stderr)
        raise
    print(summary(made, request.sections))
    _tell_disagreements(made)
    _plot(args, made)
    _report(args, made, request.clips)
    if "alerts" in request.sections:
        _tell_alerts(args, made)
    print(f"\ncalibration: {args.out}")
    return 0


def _plot(args: argparse.Namespace, made: Calibration) -> None:
    from edge_vlm.formats.calibrated import BudgetSection
    from edge_vlm_calibration.telling.plot import write_png

    if args.plot is None:
        return
    section = made.find(BudgetSection)
    if section is None or not write_png(section, args.plot):
        raise ConfigError(
            "there is nothing to plot: no scores were taken down",
            where=args.plot,
            remedy="ask for the section budget of a model that has a scorer",
        )
    print(f"\nplot: {args.plot}")


def _report(args: argparse.Namespace, made: Calibration, clips: Sequence[Path]) -> None:
    from edge_vlm_calibration.run import names_of
    from edge_vlm_calibration.telling.report import write_report

    if args.report is not None:
        write_report(made, names_of(clips), args.report, args.fps)
        print(f"\nreport: {args.report}")


def _only_report(args: argparse.Namespace) -> int:
    """`edge-vlm calibrate report CALIBRATION [CLIPS...] --report FILE.html`."""
    if args.report is None or not args.footage:
        raise ConfigError(
            "a report needs a calibration and a file to write",
            remedy="edge-vlm calibrate report calibration.json CLIPS... --report report.html",
        )
    _report(args, Calibration.read(args.footage[0]), args.footage[1:])
    return 0


def _tell_alerts(args: argparse.Namespace, made: Calibration) -> None:
    from edge_vlm.formats.calibrated import AlertsSection
    from edge_vlm_calibration.alerts.make import alert_lines

    section = made.find(AlertsSection)
    if section is None:
        return
    lines = alert_lines(section, args.camera)
    if args.toml is None:
        print(f"\n{lines}", end="")
    else:
        args.toml.write_text(lines)
        print(f"\nalerts: {args.toml}")


def _more(
    args: argparse.Namespace,
    request: Request,
    watcher: Watcher,
    work: WorkFolder,
    made: Calibration,
) -> Calibration:
    """The sections with a pass of their own."""
    from edge_vlm_calibration.alerts.make import make_alerts
    from edge_vlm_calibration.footage import Looked
    from edge_vlm_calibration.provenance import provenance_of
    from edge_vlm_calibration.run import names_of

    settings = {"fps": args.fps, "max_frames": args.max_frames}
    if "ranges" in request.sections:
        from edge_vlm_calibration.collect import calibrate as collect

        looked = Looked(request.clips)
        table = collect(request.model, request.clips, args.fps, args.max_frames, looked)
        came_from = provenance_of(request.clips, settings, skipped=looked.skipped)
        made = made.with_section(table, came_from)
    if "precision" in request.sections:
        from edge_vlm_calibration.precision.commands import make as plan

        looked = Looked(request.clips)
        planned, notes = plan(
            request.model, request.clips, args.fps, args.max_frames, args.out, looked
        )
        came_from = provenance_of(request.clips, settings, skipped=looked.skipped)
        made = made.with_section(planned, came_from, notes)
    if "alerts" in request.sections:
        clips = names_of(request.clips)
        made = make_alerts(_alert_request(args), watcher, work, clips, made)
    return made


def _defaults() -> dict[str, object]:
    parser = argparse.ArgumentParser()
    _arguments(parser)
    return vars(parser.parse_args(["."]))


def _refuse_others(args: argparse.Namespace, what: str, used: Set[str]) -> None:
    """Raises ConfigError for options that were given and would be ignored."""
    usual = _defaults()
    given = [name for name in usual if name not in used and getattr(args, name) != usual[name]]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(f"{what} has no use for {options}", remedy="leave it out")


def _tell_disagreements(made: Calibration) -> None:
    from edge_vlm_calibration.agreeing import disagreements

    for line in disagreements(made):
        print(f"edge-vlm: {line}", file=sys.stderr)


def share_of(defaults: Mapping[str, Any]) -> Wanted:
    """The share or rate that a model comes with; half of the cells where it keeps all."""
    from edge_vlm_calibration.budget import Wanted

    if rate := float(defaults.get("vision_tokens_per_s") or 0.0):
        return Wanted("vision_tokens_per_s", rate)
    ratio = float(defaults.get("keep_ratio", 1.0))
    return Wanted("keep_ratio", ratio if ratio < 1 else 0.5)


def _alert_request(args: argparse.Namespace) -> AlertRequest:
    """Raises ConfigError."""
    from edge_vlm_calibration.alerts.make import AlertRequest

    if not args.false_alarms_per_hour > 0 or not 0 <= args.slack <= 3600:
        raise ConfigError("--false-alarms-per-hour must be above 0 and --slack in 0..3600")
    return AlertRequest(
        marks=args.marks,
        false_per_h=args.false_alarms_per_hour,
        slack_s=args.slack,
        one_rule=args.one_rule,
        fps=args.fps,
    )


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
        questions=args.questions,
    )
    return dataclasses.replace(request, sections=_sections(args, request.is_bundle))


def _sections(args: argparse.Namespace, is_bundle: bool) -> Sequence[str]:
    """Raises ConfigError."""
    text: str | None = args.sections
    if text is None:
        more = () if is_bundle else ("ranges",)
        return (*USUAL, *more, *(("alerts",) if args.marks is not None else ()))
    names = tuple(dict.fromkeys(name for name in text.replace(" ", "").split(",") if name))
    unknown = [name for name in names if name not in SECTIONS]
    if unknown or not names:
        raise ConfigError(
            f"there is no section {', '.join(unknown) or text!r}",
            where="--sections",
            remedy=f"of {', '.join(SECTIONS)}",
        )
    if is_bundle and (wrong := [name for name in OF_CHECKPOINTS if name in names]):
        raise ConfigError(
            f"{' and '.join(wrong)}: activations are measured of a checkpoint, not of a bundle",
            where="--sections",
            remedy="name the checkpoint that the bundle was exported from",
        )
    if args.marks is not None and "alerts" not in names:
        raise ConfigError(
            "--marks are for the section alerts, which is not asked for", where="--sections"
        )
    return names


def _merge(args: argparse.Namespace) -> int:
    """`edge-vlm calibrate merge A B -o C`."""
    if len(args.footage) < 2:
        raise ConfigError("merge takes two calibrations or more", remedy="name their files")
    from edge_vlm.formats.calibrated.precision import carry_arrays
    from edge_vlm_calibration.rows import only_run

    merged = Calibration.read(args.footage[0])
    for path in args.footage[1:]:
        other = Calibration.read(path)
        for name in sorted(merged.sections.keys() & other.sections.keys()):
            if merged.sections[name] != other.sections[name]:
                print(f"edge-vlm: {name} is that of {path}, the last one named", file=sys.stderr)
        merged = merged.merged(other, path)
    with only_run(args.out):
        for path in args.footage:
            merged = carry_arrays(path, merged, args.out)
        merged.write(args.out)
    _tell_disagreements(merged)
    print(f"calibration: {args.out} with {', '.join(sorted(merged.sections))}")
    return 0


calibrate = Command(
    add_arguments=_arguments,
    run=_calibrate,
)
