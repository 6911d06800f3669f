"""`edge-vlm eval`: models on questions about clips; policies, budgets and paths in one table."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import edge_vlm
from edge_vlm.cli import Command, run_command
from edge_vlm.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from edge_vlm.answer_log import AnswerLog
    from edge_vlm.evaluation import Evaluator, EvaluatorOptions, Run
    from edge_vlm.question_set import AskedQuestion, ClipQuestions

EXTRAS = {"torch": "train", "bundle": "ort", "served": "ort"}
LOG, TABLE, RECORD, RENDERED = "answers.jsonl", "table.md", "table.json", "questions"
REPORT_EVERY_S = 60.0


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
    asked.add_argument("--per-kind", type=_positive, default=100, help="of the rendered benchmark")
    asked.add_argument("--seed", type=int, default=1, help="of the rendered benchmark")
    asked.add_argument("--clips", type=_positive, metavar="N", help="only the first N")
    asked.add_argument("--minutes", type=float, metavar="M", help="stop behind the clip then asked")
    asked.add_argument("--fps", type=float, default=2.0, help="frames a second of your own videos")
    asked.add_argument("--max-frames", type=_positive, default=64, help="of one of your videos")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="FOLDER",
        help=f"keep {LOG}, {TABLE} and {RECORD} there; called again, goes on where it stopped",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--bundle", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=_positive, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="of the server's URL")
    parser.add_argument("--tls-ca", type=Path, metavar="FILE", help="certificate for wss://")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


@dataclass(frozen=True)
class Plan:
    """What the arguments name."""

    targets: Mapping[str, str | None]
    """By path; None: the model that comes with it."""
    questions: Path | None


def plan(targets: Sequence[str], through: str | None = None) -> Plan:
    """Tells by its files what each argument is. Raises ConfigError, VideoNotFound."""
    from edge_vlm.evaluation import PATHS

    paths = [] if through is None else through.split(",")
    if unknown := [path for path in paths if path not in PATHS]:
        raise ConfigError(f"--through must name some of {', '.join(PATHS)}, got {unknown[0]!r}")
    found: dict[str, str | None] = {}
    questions: Path | None = None
    for target in targets:
        kind = _kind_of(target)
        if kind == "questions":
            if questions is not None:
                raise ConfigError(f"two question sets: {questions} and {target}")
            questions = Path(target)
            continue
        offered = {"url": ["served"], "checkpoint": ["torch"], "bundle": ["served", "bundle"]}[kind]
        chosen = [path for path in paths if path in offered] or offered[:1]
        for path in chosen:
            if path in found:
                raise ConfigError(
                    f"two models for the path {path}: {found[path]} and {target}",
                    remedy="measure one after the other",
                )
            found[path] = target
    if not found:
        found = dict.fromkeys([path for path in paths if path != "torch"] or ["served"])
    if missing := [path for path in paths if path not in found]:
        raise ConfigError(f"nothing that was named can be measured through {missing[0]}")
    return Plan(found, questions)


def _kind_of(target: str) -> str:
    from edge_vlm.bundle import MANIFEST
    from edge_vlm.question_set import INDEX

    if target.startswith(("ws://", "wss://")):
        return "url"
    path = Path(target)
    if not path.exists():
        raise ConfigError("no such file or folder", where=target)
    if path.is_file() or (path / INDEX).is_file():
        return "questions"
    if (path / MANIFEST).is_file():
        return "bundle"
    if (path / "config.json").is_file():
        return "checkpoint"
    raise ConfigError(
        "neither a checkpoint nor a bundle nor a question set",
        where=target,
        remedy=f"expected is config.json, {MANIFEST} or {INDEX} in it",
    )


def _runs(args: argparse.Namespace) -> list[Run]:
    from edge_vlm.evaluation import ATTENTIONS, KEEP_RATIOS, POLICIES, Run, grid

    if args.runs:
        return list(dict.fromkeys(Run.parse(text) for text in args.runs))
    try:
        ratios = [float(text) for text in _list(args.keep_ratio)] or KEEP_RATIOS
        modes = [type(ATTENTIONS[0])(text) for text in _list(args.attention)] or ATTENTIONS
    except ValueError as error:
        raise ConfigError(f"cannot read the table's rows: {error}") from None
    return grid(_list(args.policy) or POLICIES, ratios, modes)


def _list(text: str | None) -> list[str]:
    return [] if text is None else [part.strip() for part in text.split(",")]


def open_evaluators(
    stack: ExitStack, targets: Mapping[str, str | None], options: EvaluatorOptions
) -> dict[str, Evaluator]:
    """By path, from the entry points. Raises MissingExtraError and what they raise."""
    from edge_vlm.evaluation import EVALUATOR_GROUP

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
    from edge_vlm.evaluation import EvaluatorOptions

    extra = [target for target in (args.bundle, args.url) if target]
    wanted = plan([*args.targets, *extra], args.through)
    runs = _runs(args)
    options = EvaluatorOptions(
        threads=args.threads, api_key_file=args.api_key_file, tls_ca=args.tls_ca
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
        if json.loads(finished.read_text()) != wanted:
            raise ConfigError(
                "the folder holds another benchmark", where=folder, remedy="name another folder"
            )
        return folder
    if folder.exists():
        raise ConfigError("half a benchmark lies there", where=folder, remedy="remove it")
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
    from edge_vlm.answer_log import AnswerLog
    from edge_vlm.evaluation_report import score, table, to_record, wrong_answers
    from edge_vlm.question_file import read_questions

    measured: dict[str, Any] = {"questions": _digest(questions, args)}
    measured |= {path: evaluator.identity for path, evaluator in evaluators.items()}
    clips = islice(read_questions(questions, args.fps, args.max_frames), args.clips)
    log = AnswerLog(out / LOG if args.out else None, measured)
    try:
        asked = _ask(clips, evaluators, runs, log, args.minutes)
    finally:
        log.close()
    scores = score(log, asked, list(evaluators), runs)
    print(table(scores))
    record = {
        "command": f"edge-vlm eval {shlex.join(sys.argv[2:])}" if sys.argv[1:2] == ["eval"] else "",
        "version": edge_vlm.__version__,
        "questions": {"name": questions.name, "clips": len(asked), "sha256": measured["questions"]},
        "models": {
            path: {"name": evaluator.name, "identity": evaluator.identity}
            for path, evaluator in evaluators.items()
        },
        "rows": to_record(scores),
    }
    if args.runs:  # of the whole table they are in the log
        record["wrong"] = wrong_answers(log, asked, scores)
    text = json.dumps(record, indent=1) + "\n"
    if args.out:
        (out / TABLE).write_text(table(scores, markdown=True) + "\n")
        (out / RECORD).write_text(text)
    if args.json is not None:
        args.json.write_text(text)
    return 0


def _digest(questions: Path, args: argparse.Namespace) -> str:
    from edge_vlm.bundle import sha256_of_file
    from edge_vlm.question_set import INDEX

    if questions.is_dir():
        return sha256_of_file(questions / INDEX)
    return f"{sha256_of_file(questions)} at {args.fps:g} fps, {args.max_frames} frames"


def _ask(
    clips: Iterator[ClipQuestions],
    evaluators: Mapping[str, Evaluator],
    runs: Sequence[Run],
    log: AnswerLog,
    minutes: float | None,
) -> dict[str, Sequence[AskedQuestion]]:
    """All runs on all paths, clip by clip; the questions of the clips that were answered."""
    begin = told = time.monotonic()
    asked: dict[str, Sequence[AskedQuestion]] = {}
    for clip in clips:
        if minutes is not None and time.monotonic() - begin > 60 * minutes:
            break
        for path, evaluator in evaluators.items():
            missing = [
                run for run in runs if evaluator.can(run) and (path, run.name, clip.name) not in log
            ]
            for run, answers in evaluator.answers(clip, missing):
                log.add((path, run.name, clip.name), answers)
        asked[clip.name] = clip.questions
        if time.monotonic() - told > REPORT_EVERY_S or sys.stderr.isatty():
            told = time.monotonic()
            passed_s = told - begin
            print(f"{len(asked)} clips, {passed_s:.0f} s", file=sys.stderr, flush=True)
    if not asked:
        raise ConfigError("there is no clip to ask about")
    return asked


evaluate = Command(
    name="eval",
    help="measure models on questions: policies, budgets and paths in one table",
    add_arguments=_arguments,
    run=_run,
)
