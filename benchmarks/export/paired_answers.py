"""Right answers of one bundle against another's, question by question: what a precision costs.

    edge-vlm eval fp32 questions --through served --run stream:0.5 --threads 1 -o answers-fp32
    edge-vlm eval planned questions --through served --run stream:0.5 --threads 1 -o answers-planned
    python -m benchmarks.export.paired_answers questions answers-fp32 answers-planned

Clips that both have answered; the difference of the means has an interval of its own, because what
a clip does
to both cancels out (`edge_vlm.evaluation.score.difference`).
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, command_line, script_parser, write_result
from edge_vlm import __version__
from edge_vlm.evaluation.log import AnswerLog
from edge_vlm.evaluation.runs import Run
from edge_vlm.evaluation.score import RunScore, difference
from edge_vlm.evaluation.table import Questions, score
from edge_vlm.formats.qa_set import read_question_set


def answers_of(folder: Path, scratch: Path) -> AnswerLog:
    """Of a copy: the evaluation may still be writing there."""
    copied = scratch / f"{folder.resolve().name}.jsonl"
    shutil.copyfile(folder / "answers.jsonl", copied)
    return AnswerLog(copied, {})


def scored(log: AnswerLog, questions: Questions, path: str, run: Run) -> RunScore:
    (found,) = score(log, questions, [path], [run])
    return found


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "paired_answers.json")
    parser.add_argument("questions", type=Path)
    parser.add_argument("reference", type=Path, help="folder of answers, `eval -o`")
    parser.add_argument("other", type=Path)
    parser.add_argument("--path", default="served")
    parser.add_argument("--run", default="stream:0.5")
    args = parser.parse_args(argv)
    run = Run.parse(args.run)
    with tempfile.TemporaryDirectory() as scratch:
        logs = [answers_of(folder, Path(scratch)) for folder in (args.reference, args.other)]
        questions = {
            clip.name: clip.questions
            for clip in read_question_set(args.questions)
            if all((args.path, run.name, clip.name) in log for log in logs)
        }
        reference, other = (scored(log, questions, args.path, run) for log in logs)
        changed = sum(
            a != b
            for clip in questions
            for a, b in zip(*(log[args.path, run.name, clip].texts for log in logs), strict=True)
        )
    moved, half = difference(other, reference)
    result: dict[str, Any] = {
        "command": command_line(__file__, argv),
        "edge_vlm": __version__,
        "path": args.path,
        "run": run.name,
        "clips": len(questions),
        "questions": reference.asked,
        "answers_that_differ": changed,
        "difference_points": round(100 * moved, 2),
        "difference_half_interval_95": round(100 * half, 2),
    }
    for name, found in ((args.reference.name, reference), (args.other.name, other)):
        low, high = found.mean_interval()
        result[name] = {
            "mean_percent": round(100 * found.mean, 2),
            "mean_interval_95": [round(100 * low, 2), round(100 * high, 2)],
            "kinds": {k: round(100 * s.share, 2) for k, s in sorted(found.kinds.items())},
        }
    write_result(args.out, result)
    print(
        f"{reference.asked} questions: {100 * moved:+.2f} points (± {100 * half:.2f}), "
        f"{100 * reference.mean:.2f} -> {100 * other.mean:.2f}, {changed} answers differ"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
