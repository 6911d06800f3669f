"""Answers drawn at random: repeated by their seed, and by nothing else changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from edge_vlm_runtime import protocol
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from tests.runtime.session.fake_engines import FakeClock
from tests.runtime.session.viewer import Viewer
from tests.tiny import tiny_bundle

QUESTION = "how many cars are there now ?"


@pytest.fixture(scope="module")
def engines() -> Iterator[LoadedBundle]:
    with LoadedBundle.open(tiny_bundle(), threads=1) as opened:
        yield opened


def texts(engines: LoadedBundle, questions: int = 1, **changes: Any) -> list[str]:
    viewer = Viewer(engines, FakeClock(), max_answer_tokens=8, **changes)
    viewer.show(1, 2, 3)
    for _ in range(questions):
        viewer.ask(QUESTION)
        viewer.run()
    return [done.text for done in viewer.of(protocol.ResponseDone)]


def test_temperature_0_is_greedy_whatever_the_seed(engines: LoadedBundle) -> None:
    assert texts(engines) == texts(engines, temperature=0.0, top_p=0.5, seed=9)


def test_a_seed_repeats_the_answer_and_another_one_does_not(engines: LoadedBundle) -> None:
    answers = [texts(engines, 2, temperature=2.0, seed=seed) for seed in (1, 1, 2, 3)]
    assert answers[0] == answers[1]
    assert all(first == second for first, second in answers)  # each answer begins anew
    assert len({first for first, _ in answers}) == 3
    assert texts(engines) != answers[0][:1]


def test_an_update_applies_to_questions_behind_it(engines: LoadedBundle) -> None:
    viewer = Viewer(engines, FakeClock(), max_answer_tokens=8)
    viewer.show(1, 2, 3)
    viewer.ask(QUESTION)
    viewer.update(temperature=2.0, seed=1)
    viewer.ask(QUESTION)
    viewer.run()
    said = [done.text for done in viewer.of(protocol.ResponseDone)]
    assert said == [*texts(engines), *texts(engines, temperature=2.0, seed=1)]


def test_an_answer_stops_at_any_of_the_last_tokens(engines: LoadedBundle) -> None:
    """Several `eos_token_id`: here every word is one, and the first of them the usual one."""
    before = engines.prompt.eos_ids
    (whole,) = texts(engines)
    words = range(engines.bundle.config.language.base_vocab)
    try:
        engines.prompt.eos_ids = (*before, *words)
        assert texts(engines) == [""] != [whole]
    finally:
        engines.prompt.eos_ids = before
