"""Instructions stand before each question, inside its room, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from edge_vlm.errors import ConfigError, QuestionTooLong
from edge_vlm_runtime import protocol
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.protocol.alerts import AlertChecked, AlertCreate
from edge_vlm_runtime.session.budget import question_capacity
from tests.runtime.session.fake_engines import FakeClock
from tests.runtime.session.viewer import LIMITS, Viewer
from tests.tiny import tiny_bundle

QUESTION = "what colour is the cube ?"
INSTRUCTIONS = "is there a red ball ?"


@pytest.fixture(scope="module")
def engines() -> Iterator[LoadedBundle]:
    with LoadedBundle.open(tiny_bundle(), threads=1) as opened:
        yield opened


def answered(viewer: Viewer, question: str) -> protocol.ResponseDone:
    viewer.ask(question)
    viewer.run()
    return viewer.of(protocol.ResponseDone)[-1]


def test_they_are_the_begin_of_the_users_turn(engines: LoadedBundle) -> None:
    """The same as asking both at once; the event names the question alone."""
    by_hand = Viewer(engines, FakeClock(), max_answer_tokens=8)
    instructed = Viewer(engines, FakeClock(), max_answer_tokens=8, instructions=INSTRUCTIONS)
    for viewer in (by_hand, instructed):
        viewer.show(1, 2, 3)
    plain = answered(by_hand, QUESTION)
    wanted = answered(by_hand, f"{INSTRUCTIONS}\n{QUESTION}")
    got = answered(instructed, QUESTION)
    assert (got.text, got.usage) == (wanted.text, wanted.usage)
    assert got.text != plain.text
    assert instructed.of(protocol.ResponseCreated)[0].text == QUESTION
    instructed.update(instructions="")
    back = answered(instructed, QUESTION)
    assert (back.text, back.usage) == (plain.text, plain.usage)


def test_what_was_asked_before_is_not_changed_and_history_is_without(engines: LoadedBundle) -> None:
    plain = Viewer(engines, FakeClock(), max_answer_tokens=8, history_turns=1)
    changed = Viewer(engines, FakeClock(), max_answer_tokens=8, history_turns=1)
    for viewer in (plain, changed):
        viewer.show(1, 2)
    wanted = [answered(plain, QUESTION), answered(plain, f"{INSTRUCTIONS}\n{QUESTION}")]
    changed.ask(QUESTION)
    changed.update(instructions=INSTRUCTIONS)
    changed.ask(QUESTION)
    changed.run()
    got = changed.of(protocol.ResponseDone)
    assert [done.text for done in got] == [done.text for done in wanted]
    assert [done.usage for done in got] == [done.usage for done in wanted]
    third = [answered(viewer, QUESTION).usage.text_tokens for viewer in (plain, changed)]
    # shown before: the question with its instructions, or alone; asked: alone, or with them
    assert third[0] == third[1]


def test_question_and_instructions_share_their_room() -> None:
    viewer = Viewer()
    viewer.show(1)
    session, prompt = viewer.session, viewer.engines.prompt
    most = question_capacity(session._model, LIMITS)
    words = prompt.tokenizer.encode
    fits = "is " * (most // 2)
    while len(words(fits)) > most // 2:
        fits = fits[3:]
    viewer.update(instructions=fits)
    with pytest.raises(ConfigError, match="instructions have"):
        viewer.update(instructions=fits + "is " * 2)
    assert session.settings.instructions == fits
    long = "red " * (most // 2)
    assert len(prompt.question_ids(long)) <= most
    with pytest.raises(QuestionTooLong, match="with the session's instructions"):
        viewer.ask(long)
    assert answered(viewer, QUESTION).usage.text_tokens <= most
    with pytest.raises(ConfigError, match="instructions have"):
        Viewer(instructions=fits + "is " * 2)


def test_blank_instructions_are_none(engines: LoadedBundle) -> None:
    done = []
    for instructions in ("", " \n "):
        viewer = Viewer(engines, FakeClock(), max_answer_tokens=8, instructions=instructions)
        viewer.show(1, 2)
        done.append(answered(viewer, QUESTION))
    assert (done[0].text, done[0].usage) == (done[1].text, done[1].usage)


def test_alerts_are_asked_without(engines: LoadedBundle) -> None:
    checks = []
    for instructions in ("", INSTRUCTIONS):
        viewer = Viewer(engines, FakeClock(), instructions=instructions)
        viewer.take(AlertCreate(question=QUESTION, report_checks=True))
        viewer.show(1, 2, 3)
        checks.append([check.probability for check in viewer.of(AlertChecked)])
    assert np.array_equal(checks[0], checks[1])
    assert len(checks[0]) == 3
