"""`edge-vlm eval`: models on questions about clips; policies, budgets and paths in one table."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import edge_vlm
from edge_vlm.cli import Command, run_command
from edge_vlm.console.paths import output_file, output_folder
from edge_vlm.console.progress import Progress, duration
from edge_vlm.errors import ConfigError, MissingExtraError
from edge_vlm.json_text import parse_json

if TYPE_CHECKING:
    from edge_vlm.evaluation.log import AnswerLog
    from edge_vlm.evaluation.runs import Evaluator, EvaluatorOptions, Run
    from edge_vlm.formats.qa_set import AskedQuestion, ClipQuestions
    from edge_vlm.pixels.sampling import FrameRule

EXTRAS = {"torch": "train", "bundle": "ort", "served": "ort"}
LOG, TABLE, RECORD, RENDERED = "answers.jsonl", "table.md", "table.json", "questions"
STREAM_FPS, STREAM_FRAMES = 2.0, 64
"""Of one's own videos, for a model that knows no whole clips."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "targets",
        nargs="*",
        metavar="CHECKPOINT|BUNDLE|URL|QUESTIONS",
        help="what to measure, and the questions: a folder written by `edge-vlm world` or a JSONL "
        "file about your own videos (default: the demo bundle; the rendered benchmark)",
    )
    parser.add_argument(
        "--through",
        metavar="PATHS",
        help="of a bundle: served, bundle (in this process, no server) or both with a comma "
        "(default: served)",
    )
    parser.add_argument(
        "--scorer",
        choices=("own", "change"),
        default="own",
        help="of a checkpoint: what its cells are chosen by, as of `export` (default: own)",
    )
    parser.add_argument(
        "--reuse",
        type=float,
        default=0.0,
        metavar="LEVELS",
        help="in front of the scorer compute only what changed by so many grey levels, as sessions "
        "with the setting reuse do (default: 0, everything)",
    )
    table = parser.add_argument_group("rows of the table (default: all)")
    table.add_argument(
        "--policy", metavar="NAMES", help="keep_all,stream,clip,frame_topk,random,..."
    )
    table.add_argument("--keep-ratio", metavar="SHARES", help="1,0.7,0.5,0.3,0.2,0.1")
    table.add_argument("--attention", metavar="MODES", help="frame,all")
    table.add_argument(
        "--run",
        action="append",
        metavar="POLICY:KEEP[:ATTENTION]",
        dest="runs",
        help="just these rows, may be repeated",
    )
    asked = parser.add_argument_group("questions")
    asked.add_argument(
        "--per-kind", type=_positive, default=100, help="of the rendered benchmark (default: 100)"
    )
    asked.add_argument("--seed", type=int, default=1, help="of the rendered benchmark (default: 1)")
    asked.add_argument("--clips", type=_positive, metavar="N", help="only the first N")
    asked.add_argument(
        "--minutes",
        type=_not_negative,
        metavar="M",
        help="stop after the clip asked then; 0: only show the table",
    )
    asked.add_argument(
        "--fps",
        type=_rate,
        metavar="N",
        help="frames a second of your own videos (default: what the model was trained on, else 2)",
    )
    asked.add_argument(
        "--max-frames",
        type=_positive,
        metavar="N",
        help="of one of your videos: a model of whole clips is shown longer ones evenly spread, "
        "for others they are an error (default: what the model was trained on, else 64)",
    )
    asked.add_argument(
        "--quiet-before",
        type=_not_negative,
        default=0.0,
        metavar="SECONDS",
        help="ask late in a stream: show the first picture of each clip for so long before it "
        "(served only)",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=output_folder,
        metavar="FOLDER",
        help=f"keep {LOG}, {TABLE} and {RECORD} there; called again, goes on where it stopped",
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the figures there as well"
    )
    parser.add_argument("--bundle", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument(
        "--threads",
        type=_positive,
        default=min(4, os.cpu_count() or 1),
        help="threads of the engines or of torch (default: %(default)s)",
    )
    parser.add_argument(
        "--backend", default="ort", metavar="NAME", help="runs bundles: ort, openvino or auto (ort)"
    )
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="of the server's URL")
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="certificate for wss://")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value


def _rate(text: str) -> float:
    value = _not_negative(text)
    if not value:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def open_evaluators(
    stack: ExitStack, targets: Mapping[str, str | None], options: EvaluatorOptions
) -> dict[str, Evaluator]:
    """By path, from the entry points. Raises MissingExtraError and what they raise."""
    from edge_vlm.evaluation.runs import EVALUATOR_GROUP

    points = {point.name: point for point in metadata.entry_points(group=EVALUATOR_GROUP)}
    evaluators: dict[str, Evaluator] = {}
    for path, target in targets.items():
        try:
            evaluators[path] = stack.enter_context(points[path].load()(target, options))
        except ModuleNotFoundError as error:
            library = (error.name or "").partition(".")[0]
            if library.startswith("edge_vlm"):
                raise  # a bug, not a library that an extra would bring
            raise MissingExtraError.for_library(library, EXTRAS[path]) from error
    return evaluators


def _run(args: argparse.Namespace) -> int:
    from edge_vlm.evaluation.plan import plan, rows
    from edge_vlm.evaluation.runs import EvaluatorOptions

    extra = [target for target in (args.bundle, args.url) if target]
    wanted = plan([*args.targets, *extra], args.through)
    if args.quiet_before and set(wanted.targets) != {"served"}:
        raise ConfigError(
            "only a served bundle has a stream that a question can come late in",
            remedy="--through served",
        )
    runs = rows(args.runs, args.policy, args.keep_ratio, args.attention)
    if args.scorer != "own" and "torch" not in wanted.targets:
        raise ConfigError(
            f"--scorer {args.scorer} is for a checkpoint; a bundle has that of its export",
            remedy="name a checkpoint, or export with --scorer change",
        )
    if args.backend != "ort" and not set(wanted.targets) & {"bundle", "served"}:
        raise ConfigError(f"--backend {args.backend} is for bundles", remedy="name a bundle")
    if not 0.0 <= args.reuse <= 255.0:
        raise ConfigError(f"--reuse {args.reuse:g} must be in 0..255")
    options = EvaluatorOptions(
        reuse=args.reuse,
        threads=args.threads,
        backend=args.backend,
        scorer=args.scorer,
        api_key_file=args.api_key_file,
        tls_ca=args.tls_ca,
    )
    with ExitStack() as stack:
        out = args.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        questions = wanted.questions or _rendered(out / RENDERED, args)
        evaluators = open_evaluators(stack, wanted.targets, options)
        return _evaluate(args, out, questions, evaluators, runs)


def _rendered(folder: Path, args: argparse.Namespace) -> Path:
    """The rendered benchmark of that seed and size; another stage's command writes it."""
    finished = folder / "finished.json"
    wanted = {"per_kind": args.per_kind, "seed": args.seed}
    if finished.is_file():
        try:
            found = parse_json(finished.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot be read: {error}", where=finished, remedy="remove the folder"
            ) from error
        if found != wanted:
            raise ConfigError(
                "the folder holds another benchmark", where=folder, remedy="name another folder"
            )
        return folder
    if folder.exists():
        raise ConfigError("half a benchmark lies there", where=folder, remedy="remove it")
    print(
        f"first the benchmark is rendered, {args.per_kind} questions of each kind",
        file=sys.stderr,
        flush=True,
    )
    command = ["world", "--benchmark", "--out", str(folder)]
    run_command([*command, "--per-kind", str(args.per_kind), "--seed", str(args.seed)])
    finished.write_text(json.dumps(wanted) + "\n")
    return folder


def _evaluate(
    args: argparse.Namespace,
    out: Path,
    questions: Path,
    evaluators: Mapping[str, Evaluator],
    runs: Sequence[Run],
) -> int:
    from edge_vlm.evaluation.late import after_quiet
    from edge_vlm.evaluation.log import AnswerLog
    from edge_vlm.evaluation.notes import notes_on
    from edge_vlm.evaluation.qa_jsonl import count_questions, read_questions
    from edge_vlm.evaluation.table import overview, score, table, to_record, wrong_answers

    for note in notes_on(evaluators, runs):
        print(f"note: {note}", file=sys.stderr)
    rule = None if questions.is_dir() else _frame_rule(evaluators, args.fps, args.max_frames)
    fps, max_frames = args.fps or STREAM_FPS, args.max_frames or STREAM_FRAMES
    measured: dict[str, Any] = {"questions": _digest(questions, fps, max_frames, rule)}
    measured |= {path: evaluator.identity for path, evaluator in evaluators.items()}
    every = read_questions(questions, fps, max_frames, rule)
    clips: Iterator[ClipQuestions] = islice(every, args.clips)
    if args.quiet_before:
        measured["questions"] += f" after {args.quiet_before:g} quiet seconds"
        clips = (after_quiet(clip, args.quiet_before) for clip in clips)
    log = AnswerLog(out / LOG if args.out else None, measured)
    try:
        size = count_questions(questions, args.clips)
        asked = _ask(clips, size, evaluators, runs, log, args.minutes)
    finally:
        log.close()
    scores = score(log, asked, list(evaluators), runs)
    print("\n\n".join(part for part in (overview(scores), table(scores)) if part))
    record = {
        "command": f"edge-vlm eval {shlex.join(sys.argv[2:])}" if sys.argv[1:2] == ["eval"] else "",
        "version": edge_vlm.__version__,
        "questions": {"name": questions.name, "sha256": measured["questions"]},
        "models": {
            path: {"name": evaluator.name, "identity": evaluator.identity}
            for path, evaluator in evaluators.items()
        },
    }
    if args.runs:  # of the whole table they are in the log
        record["wrong"] = wrong_answers(log, asked, scores)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in to_record(scores))  # each on one line
    text = json.dumps(record, indent=1).removesuffix("\n}") + f',\n "rows": [\n{lines}\n ]\n}}\n'
    if args.out:
        parts = overview(scores, markdown=True), table(scores, markdown=True)
        (out / TABLE).write_text("\n\n".join(part for part in parts if part) + "\n")
        (out / RECORD).write_text(text)
    if args.json is not None:
        args.json.write_text(text)
    return 0


def _frame_rule(
    evaluators: Mapping[str, Evaluator], fps: float | None, max_frames: int | None
) -> FrameRule | None:
    """By which all models are shown a whole clip; None if they are shown it as a stream.

    Raises ConfigError when they were trained on different frames.
    """
    from edge_vlm.pixels.sampling import FrameRule

    found: dict[str, FrameRule | None] = dict.fromkeys(evaluators)
    for path, evaluator in evaluators.items():
        if (rule := evaluator.frames) is not None:
            most, rate = max_frames or rule.num_frames, fps or rule.max_fps
            found[path] = FrameRule(num_frames=most, max_fps=rate)
    if len(set(found.values())) > 1:
        raise ConfigError(
            "the models were trained on different frames of a clip: "
            + ", ".join(f"{path} {_told(rule)}" for path, rule in found.items()),
            remedy="measure one after the other, or name --fps and --max-frames",
        )
    return next(iter(found.values()))


def _told(rule: FrameRule | None) -> str:
    return "as a stream" if rule is None else f"{rule.num_frames} at {rule.max_fps:g} fps"


def _digest(questions: Path, fps: float, max_frames: int, rule: FrameRule | None) -> str:
    from edge_vlm.formats.bundle import sha256_of_file
    from edge_vlm.formats.qa_set import INDEX

    if questions.is_dir():
        return sha256_of_file(questions / INDEX)
    digest = sha256_of_file(questions)
    if rule is not None:
        return f"{digest} as whole clips, {rule.num_frames} frames at {rule.max_fps:g} fps"
    return f"{digest} at {fps:g} fps, {max_frames} frames"


def _ask(
    clips: Iterator[ClipQuestions],
    size: tuple[int, int],
    evaluators: Mapping[str, Evaluator],
    runs: Sequence[Run],
    log: AnswerLog,
    minutes: float | None,
) -> dict[str, Sequence[AskedQuestion]]:
    """All runs on all paths, clip by clip; the questions of all clips. `size`: clips, questions."""
    begin = time.monotonic()
    asked: dict[str, Sequence[AskedQuestion]] = {}
    with Progress("eval: clips", size[0]) as progress:
        for clip in clips:
            if minutes is None or time.monotonic() - begin < 60 * minutes:
                if not asked:
                    _announce(clip, size, evaluators, runs, log, minutes)
                _ask_clip(clip, evaluators, runs, log)
            asked[clip.name] = clip.questions
            progress.advance()
    if not asked:
        raise ConfigError("there is no clip to ask about")
    return asked


def _announce(
    clip: ClipQuestions,
    size: tuple[int, int],
    evaluators: Mapping[str, Evaluator],
    runs: Sequence[Run],
    log: AnswerLog,
    minutes: float | None,
) -> None:
    """What will be done and about how long it takes: by the first clip in the first row of each
    path, whose answers are kept."""
    num_clips, num_questions = size
    num_rows, seconds = 0, 0.0
    for path, evaluator in evaluators.items():
        possible = [run for run in runs if evaluator.can(run)]
        missing = [run for run in possible if (path, run.name, clip.name) not in log]
        num_rows += len(possible)
        if missing:
            began = time.monotonic()
            for run, answers in evaluator.answers(clip, missing[:1]):
                log.add((path, run.name, clip.name), answers)
            seconds += (time.monotonic() - began) * len(possible) * num_clips
    limit = "" if minutes is None else f", --minutes {minutes:g} at most"
    long = "" if not seconds else f": about {duration(seconds)} by the first clip{limit}"
    clips = "clip" if num_clips == 1 else "clips"
    print(
        f"{num_questions:,} questions about {num_clips:,} {clips} in {num_rows} rows "
        f"({', '.join(evaluators)}), {num_questions * num_rows:,} answers{long}",
        file=sys.stderr,
        flush=True,
    )


def _ask_clip(
    clip: ClipQuestions, evaluators: Mapping[str, Evaluator], runs: Sequence[Run], log: AnswerLog
) -> None:
    """What the log does not hold yet."""
    for path, evaluator in evaluators.items():
        missing = [
            run for run in runs if evaluator.can(run) and (path, run.name, clip.name) not in log
        ]
        if missing:
            for run, answers in evaluator.answers(clip, missing):
                log.add((path, run.name, clip.name), answers)


evaluate = Command(
    add_arguments=_arguments,
    run=_run,
)
