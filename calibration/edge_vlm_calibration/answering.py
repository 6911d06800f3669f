"""Right answers against the share that is kept, where answers are known, as `eval` has them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from edge_vlm.config import VisionAttention
from edge_vlm.console.progress import Progress
from edge_vlm.errors import ConfigError
from edge_vlm.evaluation.command import STREAM_FRAMES, open_evaluators
from edge_vlm.evaluation.log import AnswerLog
from edge_vlm.evaluation.qa_jsonl import count_questions, read_questions
from edge_vlm.evaluation.runs import KEEP_ALL, EvaluatorOptions, Run
from edge_vlm.evaluation.table import score
from edge_vlm.formats.calibrated.budget import AccuracyPoint
from edge_vlm.formats.qa_set import AskedQuestion

KEEP_RATIOS = (0.7, 0.5, 0.3, 0.2, 0.1)


def accuracy(
    model: Path, *, is_bundle: bool, questions: Path, fps: float, options: EvaluatorOptions
) -> tuple[AccuracyPoint, ...]:
    """Falling in share. Raises what `read_questions` and the evaluator raise, ConfigError."""
    path = "bundle" if is_bundle else "torch"
    with ExitStack() as stack:
        evaluator = open_evaluators(stack, {path: str(model)}, options)[path]
        attention = VisionAttention(evaluator.attention)
        policy = "stream" if evaluator.has_scores else "difference"
        runs = [Run(KEEP_ALL, 1.0, attention)]
        runs += [Run(policy, ratio, attention) for ratio in KEEP_RATIOS]
        runs = [run for run in runs if evaluator.can(run)]
        log = AnswerLog(None, {})
        asked: dict[str, Sequence[AskedQuestion]] = {}
        with Progress("questions: clips", count_questions(questions)[0]) as progress:
            for clip in read_questions(questions, fps, STREAM_FRAMES):
                for run, answers in evaluator.answers(clip, runs):
                    log.add((path, run.name, clip.name), answers)
                asked[clip.name] = clip.questions
                progress.advance()
    if not asked:
        raise ConfigError("there are no questions in it", where=questions)
    points = []
    for total in score(log, asked, [path], runs):
        low, high = total.mean_interval()
        points.append(
            AccuracyPoint(
                keep_ratio=total.run.keep_ratio,
                share=total.kept_share,
                accuracy=total.mean,
                low=low,
                high=high,
                asked=total.asked,
            )
        )
    return tuple(sorted(points, key=lambda point: -point.share))
