"""Questions about a street through a real server, graded by what the street knows of itself."""

from __future__ import annotations

import json
import random
from pathlib import Path

from benchmarks.runtime import street as benchmark
from edge_vlm.evaluation.grading import judge
from edge_vlm.world.questions import ABSENT, QUESTION_KINDS
from edge_vlm.world.street import Street

NOW = ("presence", "name", "colour", "count", "where", "point")


def test_answers_about_now_are_right(tmp_path: Path) -> None:
    out = tmp_path / "street.json"
    record = benchmark.main(["--streets", "1", "--times", "10", "--out", str(out)])
    assert json.loads(out.read_text()) == record
    (kinds,) = record["by_time_s"].values()
    assert set(kinds) <= {*QUESTION_KINDS, ABSENT}
    now = [kinds[kind] for kind in NOW]
    assert sum(each["asked"] for each in now) >= 20
    assert sum(each["right"] for each in now) >= 0.9 * sum(each["asked"] for each in now)
    for kind in benchmark.REMEMBERED:
        others = kinds[kind]["bounded"] + kinds[kind]["not_seen"]
        assert 0 <= others <= kinds[kind]["asked"] - kinds[kind]["right"]
    by_age = [each for group in record["by_age_s"].values() for each in group.values()]
    assert sum(each["asked"] for each in by_age) == sum(each["asked"] for each in kinds.values())


def test_questions_are_clear_and_their_truths_are_right() -> None:
    seen, bounded = set(), 0
    for seed in range(4):
        for asked in benchmark.questions_at(Street(seed), 300, random.Random(seed)):
            seen.add(asked.question.kind)
            assert judge(asked.question, asked.question.answer).right
            assert asked.question.frame == 300
            assert asked.age_s is None or 0 <= asked.age_s <= 150
            assert not any(judge(asked.question, bound).right for bound in asked.bounds)
            bounded += asked.question.answer.replace("at", "by") in asked.bounds
            assert f"by {asked.question.frame / 2 + 0.5:.1f} s" not in asked.bounds
    assert seen == {*QUESTION_KINDS, ABSENT}
    assert bounded > 3  # it was there when it came
