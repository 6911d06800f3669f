"""The script about attackers: at small size, and what its judgement depends on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.runtime import attacks
from benchmarks.runtime.loads import attack_clients

HEALTHY = {"is_cut": False, "unanswered": 0, "lost": 0, "told_twice": 0}
ALONE, WITH_IT = [(0.0, 10.0), (20.0, 30.0)], [(10.0, 20.0)]


def answers(alone_s: float, with_s: float) -> list[dict[str, float]]:
    return [
        {"at_s": at_s, "ttft_s": with_s if 10 <= at_s < 20 else alone_s}
        for at_s in map(float, range(30))
    ]


def goals(*times: float, **told: Any) -> dict[str, bool]:
    found = attacks.row(answers(*times), {**HEALTHY, **told}, ALONE, WITH_IT)
    return dict(found["goals"])


def test_attacks_are_judged_by_what_the_viewer_felt() -> None:
    assert all(goals(0.05, 0.09).values())
    assert goals(0.05, 0.11) == {
        "ttft": False,
        "one_outcome_each": True,
        "all_answered": True,
        "stays": True,
    }
    assert not goals(0.05, 0.05, lost=1)["one_outcome_each"]
    assert not goals(0.05, 0.05, told_twice=1)["one_outcome_each"]
    assert not goals(0.05, 0.05, unanswered=1)["all_answered"]
    assert not goals(0.05, 0.05, is_cut=True)["stays"]
    silent = [each for each in answers(0.05, 0.05) if not 10 <= each["at_s"] < 20]
    assert not attacks.row(silent, HEALTHY, ALONE, WITH_IT)["goals"]["ttft"]


def test_attacks_states_what_it_measured(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    kind = "questions: asked and cancelled"
    assert attacks.main(["--only", kind, "--seconds", "1", "--turns", "2", "--out", str(path)]) == 0
    result = json.loads(path.read_text())
    (found,) = result["attacks"].values()
    assert found["viewer"] == HEALTHY, result
    assert [each["number"] > 0 for each in found["ttft_ms"]["with_by_turn"]] == [True, True]
    assert len(found["ttft_ms"]["without_by_turn"]) == 3
    assert result["all_within_goals"] == all(found["goals"].values())


def test_every_kind_of_attack_has_something_to_send() -> None:
    assert len(set(attack_clients.KINDS)) == len(attack_clients.KINDS)
    cheap = [kind for kind in attack_clients.WITH_KEY if "megapixels" not in kind]
    for kind in cheap:
        assert next(iter(attack_clients.WITH_KEY[kind]()))
