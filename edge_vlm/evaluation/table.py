"""Scores of runs as one table for people and one JSON record for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from edge_vlm.console import tables
from edge_vlm.evaluation.grading import judge
from edge_vlm.evaluation.log import AnswerLog
from edge_vlm.evaluation.runs import ATTENTIONS, KEEP_ALL, PATHS, POLICIES, Run
from edge_vlm.evaluation.score import HEADLINE, KindScore, RunScore, difference, order_runs
from edge_vlm.formats.qa_set import AskedQuestion

Questions = Mapping[str, Sequence[AskedQuestion]]
"""Those of each clip, by its name."""
KIND_ORDER = (*HEADLINE, "point")


def score(
    log: AnswerLog, questions: Questions, paths: Sequence[str], runs: Sequence[Run]
) -> list[RunScore]:
    """Judges the logged answers. Of each path only clips that all of its runs have answered count,
    so that runs are compared on the same questions."""
    scores = []
    for path in paths:
        answered = [run for run in runs if any((path, run.name, clip) in log for clip in questions)]
        common = [
            clip for clip in questions if all((path, run.name, clip) in log for run in answered)
        ]
        scores += [_score(log, questions, path, run, common) for run in answered if common]
    return order_runs(scores)


def _score(
    log: AnswerLog, questions: Questions, path: str, run: Run, clips: Sequence[str]
) -> RunScore:
    total = RunScore(path, run, clips=len(clips))
    for clip in clips:
        answers = log[path, run.name, clip]
        for question, text in zip(questions[clip], answers.texts, strict=True):
            total.kinds.setdefault(question.kind, KindScore()).add(clip, judge(question, text))
        total.cells_seen += answers.cells_seen
        total.cells_kept += answers.cells_kept
    return total


def wrong_answers(
    log: AnswerLog, questions: Questions, scores: Sequence[RunScore]
) -> dict[str, list[dict[str, str]]]:
    """What was said wrongly, by path and run."""
    found: dict[str, list[dict[str, str]]] = {}
    for total in scores:
        lines = found.setdefault(f"{total.path} {total.run.name}", [])
        for clip, asked in questions.items():
            if (total.path, total.run.name, clip) not in log:
                continue
            answers = log[total.path, total.run.name, clip]
            for question, text in zip(asked, answers.texts, strict=True):
                if not judge(question, text).right:
                    told = {"clip": clip, "kind": question.kind, "question": question.text}
                    lines.append({**told, "answer": question.answer, "said": text})
    return found


def kinds_of(scores: Sequence[RunScore]) -> list[str]:
    """Kinds of question in the order of the table's columns."""
    there = {kind for total in scores for kind in total.kinds}
    return [kind for kind in KIND_ORDER if kind in there] + sorted(there - set(KIND_ORDER))


def to_record(scores: Sequence[RunScore]) -> list[dict[str, Any]]:
    """One entry a row; shares in percent."""
    return [
        {
            "path": total.path,
            "policy": total.run.policy,
            "keep_ratio": total.run.keep_ratio,
            "attention": total.run.attention.value,
            "kept_percent": _percent(total.kept_share),
            "clips": total.clips,
            "questions": total.asked,
            "mean_percent": _percent(total.mean),
            "mean_interval_95": [_percent(end) for end in total.mean_interval()],
            "mean_of": total.headline_kinds(),
            **_differences(total, scores),
            "kinds": {kind: _kind(total.kinds[kind]) for kind in sorted(total.kinds)},
        }
        for total in scores
    ]


def unpruned(total: RunScore, scores: Sequence[RunScore]) -> RunScore | None:
    """The row with the same path and attention in which everything is kept."""
    return _peer(total, scores, Run(KEEP_ALL, 1.0, total.run.attention))


def _peer(total: RunScore, scores: Sequence[RunScore], run: Run) -> RunScore | None:
    same = (other for other in scores if (other.path, other.run) == (total.path, run))
    return next((other for other in same if other is not total), None)


def _differences(total: RunScore, scores: Sequence[RunScore]) -> dict[str, list[float]]:
    """In points, with half the 95 % interval of each."""
    random = Run("random", total.run.keep_ratio, total.run.attention)
    peers = {"keep_all": unpruned(total, scores), "random": _peer(total, scores, random)}
    return {
        f"points_over_{name}": [round(100 * value, 2) for value in difference(total, peer)]
        for name, peer in peers.items()
        if peer is not None
    }


def _kind(kind: KindScore) -> dict[str, Any]:
    return {
        "asked": kind.asked,
        "right": kind.right,
        "measure": "f1" if kind.partial else "accuracy",
        "percent": _percent(kind.share),
        "interval_95": [_percent(end) for end in kind.interval()],
        "effective_questions": round(kind.effective, 1),
    }


def _percent(share: float) -> float | None:
    return None if math.isnan(share) else round(100 * share, 1)


def overview(scores: Sequence[RunScore], markdown: bool = False) -> str:
    """Means of the headline kinds by share kept, a row for each policy; "" with one share only."""
    ratios = sorted({total.run.keep_ratio for total in scores} - {1.0}, reverse=True)
    if len(ratios) < 2:
        return ""
    head = ["path", "attention", "policy", "1", *(f"{ratio:g}" for ratio in ratios)]
    rows = []
    groups = {(total.path, total.run.attention, total.run.policy): None for total in scores}
    for path, attention, policy in sorted(
        groups,
        key=lambda key: (PATHS.index(key[0]), ATTENTIONS.index(key[1]), POLICIES.index(key[2])),
    ):
        if policy == KEEP_ALL:
            continue
        names = [Run(KEEP_ALL, 1.0, attention), *(Run(policy, r, attention) for r in ratios)]
        found = {total.run: total for total in scores if total.path == path}
        rows.append([path, attention.value, policy, *(_mean(found.get(run)) for run in names)])
    return "\n".join(_lines(head, rows, markdown))


def _mean(total: RunScore | None) -> str:
    if total is None:
        return "-"
    low, high = total.mean_interval()
    return f"{100 * total.mean:.1f} ±{50 * (high - low):.1f}"


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> list[str]:
    """Three columns of names, then figures."""
    draw = tables.markdown if markdown else tables.columns
    return draw([head, *rows], "<<<>")


def table(scores: Sequence[RunScore], markdown: bool = False) -> str:
    """One row a run, one column a kind, in percent; the mean with its 95 % interval."""
    kinds = kinds_of(scores)
    if not scores:
        return "nothing was answered"
    head = ["path", "attention", "policy", "keep", "kept", "questions", "mean", "change", *kinds]
    rows = [_row(total, scores, kinds) for total in scores]
    return "\n".join([*_lines(head, rows, markdown), "", *_notes(scores, kinds)])


def _row(total: RunScore, scores: Sequence[RunScore], kinds: Sequence[str]) -> list[str]:
    low, high = total.mean_interval()
    peer = unpruned(total, scores)
    change, half = difference(total, peer) if peer else (0.0, 0.0)
    cells = [
        *(total.path, total.run.attention.value, total.run.policy),
        f"{total.run.keep_ratio:g}",
        f"{100 * total.kept_share:.1f}",
        str(total.asked),
        f"{100 * total.mean:.1f} ({100 * low:.1f}-{100 * high:.1f})",
        f"{100 * change:+.1f} ±{100 * half:.1f}" if peer else "-",
    ]
    for kind in kinds:
        there = total.kinds.get(kind)
        cells.append("-" if there is None else f"{100 * there.share:.1f}")
    return cells


def _notes(scores: Sequence[RunScore], kinds: Sequence[str]) -> list[str]:
    """What the columns mean, and how exact each kind is."""
    widest: Mapping[str, tuple[int, float]] = {
        kind: max(
            (
                (total.kinds[kind].asked, (high - low) / 2)
                for total in scores
                if kind in total.kinds
                for low, high in [total.kinds[kind].interval()]
            ),
            key=lambda pair: pair[1],
        )
        for kind in kinds
    }
    exact = ", ".join(f"{kind} {n} ±{100 * half:.1f}" for kind, (n, half) in widest.items())
    parts = [
        kind for kind in kinds if any(t.kinds[kind].partial for t in scores if kind in t.kinds)
    ]
    notes = [
        f"percent right, mean over {', '.join(scores[0].headline_kinds())} with its 95 % interval;"
        " keep: asked for, kept: of all cells of the clips; change: of the mean against keep_all"
        " on the same questions.",
        f"questions of a kind in each row and its widest 95 % interval: {exact}.",
    ]
    return notes + ([f"F1 instead of the share right: {', '.join(parts)}."] if parts else [])
