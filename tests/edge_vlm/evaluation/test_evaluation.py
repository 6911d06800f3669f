"""Rows of the table, and how good a row's answers are."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edge_vlm.config import VisionAttention
from edge_vlm.errors import ConfigError
from edge_vlm.evaluation.grading import Verdict
from edge_vlm.evaluation.intervals import wilson
from edge_vlm.evaluation.runs import KEEP_RATIOS, TABLE_POLICIES, Run, grid
from edge_vlm.evaluation.score import KindScore, RunScore, difference

RIGHT, WRONG = Verdict(1, 1, 1), Verdict(0, 1, 1)


def kind(rows: list[list[int]]) -> KindScore:
    """A list of right (1) and wrong (0) answers for each clip."""
    score = KindScore()
    for number, answers in enumerate(rows):
        for right in answers:
            score.add(str(number), RIGHT if right else WRONG)
    return score


def run_score(rows: list[list[int]], policy: str = "stream") -> RunScore:
    return RunScore("torch", Run(policy, 0.5), {"name": kind(rows)}, clips=len(rows))


def test_the_table_has_every_combination_and_the_whole_once_for_each_attention() -> None:
    runs = grid()
    pruned = len(TABLE_POLICIES) - 1, len(KEEP_RATIOS) - 1, len(VisionAttention)
    assert len(runs) == len(set(runs)) == math.prod(pruned) + len(VisionAttention)
    assert {run.policy for run in runs if run.keep_ratio == 1} == {"keep_all"}


@pytest.mark.parametrize("run", grid())
def test_a_run_is_read_from_its_name(run: Run) -> None:
    assert Run.parse(run.name) == run


@pytest.mark.parametrize(
    "text", ["", "best:0.5", "stream:0", "stream:1.5", "stream:x", "stream:0.5:some", "a:b:c:d"]
)
def test_a_run_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot read run"):
        Run.parse(text)


def test_an_unknown_policy_of_a_table_is_refused() -> None:
    with pytest.raises(ConfigError, match="policy must be one of"):
        grid(["best"])


@pytest.mark.parametrize("keep", KEEP_RATIOS)
@pytest.mark.parametrize("num_frames", [1, 2, 8, 50])
def test_fewer_frames_cost_what_was_asked_for(keep: float, num_frames: int) -> None:
    run = Run("fewer_frames", keep)
    shown = [run.shows_frame(i) for i in range(num_frames)]
    assert shown[0]
    assert keep * num_frames - 1e-6 <= sum(shown) < keep * num_frames + 1


def test_wilson_is_the_textbook_interval() -> None:
    # scipy.stats.binomtest(81, 263).proportion_ci(method="wilson") with z = 1.96
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert repr(wilson(0.0, 2)[0]) == "0.0"
    low, high = wilson(1.0, 10)
    assert high == pytest.approx(1.0)
    assert 0.6 < low < 0.8
    assert wilson(0.0, 0) == (0.0, 1.0)


def test_one_question_a_clip_is_as_good_as_independent() -> None:
    score = kind([[1]] * 30 + [[0]] * 10)
    assert score.effective == 40
    assert score.interval() == wilson(0.75, 40)


def test_questions_that_are_right_or_wrong_together_count_once_a_clip() -> None:
    score = kind([[1] * 5] * 30 + [[0] * 5] * 10)
    assert score.share == 0.75
    assert score.effective == 40


def test_the_effective_number_is_that_of_the_spread_between_clips() -> None:
    """Against clips drawn again and again (the bootstrap)."""
    rng = np.random.default_rng(0)
    ease = rng.beta(4, 2, 200)
    right = rng.random((200, 6)) < ease[:, None]
    score = kind(right.astype(int).tolist())
    means = [right[rng.integers(0, 200, 200)].mean() for _ in range(4000)]
    share = score.share
    assert share * (1 - share) / score.effective == pytest.approx(np.var(means), rel=0.15)
    assert 200 < score.effective < 1200


def test_f1_counts_parts() -> None:
    score = KindScore()
    score.add("a", Verdict(1, 2, 2))
    score.add("b", Verdict(2, 3, 2))
    assert score.share == pytest.approx(2 * 3 / 9)
    assert (score.right, score.asked, score.partial) == (0, 2, True)


def test_the_mean_weighs_kinds_alike_and_takes_the_headline_ones() -> None:
    kinds = {"name": kind([[1], [1]]), "count": kind([[0], [1]]), "point": kind([[0], [0]])}
    score = RunScore("torch", Run("stream", 0.5), kinds)
    assert score.mean == 0.75
    assert sum(score.deviations().values()) == pytest.approx(0)


def test_kinds_of_ones_own_are_all_in_the_mean() -> None:
    score = RunScore("torch", Run("stream", 0.5), {"a": kind([[1]]), "b": kind([[0]])})
    assert score.mean == 0.5


def test_a_difference_on_the_same_clips_is_sharper_than_two_intervals() -> None:
    rng = np.random.default_rng(1)
    answers = (rng.random((100, 3)) < rng.beta(1, 1, 100)[:, None]).astype(int)
    worse = answers.copy()
    worse[:10, 0] = 0
    value, half = difference(run_score(worse.tolist()), run_score(answers.tolist()))
    assert value == pytest.approx(worse.mean() - answers.mean())
    low, high = run_score(answers.tolist()).mean_interval()
    assert 0 < half < (high - low) / 4


def test_equal_answers_do_not_prove_equal_models() -> None:
    same = run_score([[1], [0], [1]])
    assert difference(same, same)[0] == 0
    assert difference(same, same)[1] > 0.3
