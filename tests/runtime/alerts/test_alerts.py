"""Alerts inside a session, without sockets: when they are checked, what is told, what it costs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_vlm.errors import (
    ConfigError,
    EdgeVlmError,
    QuestionTooLong,
    TooManyAlerts,
    TooManyQuestions,
    UnknownAlert,
)
from edge_vlm.pixels.frames import decode_jpeg
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol import alerts as messages
from edge_vlm_runtime.protocol.base import UNSET
from edge_vlm_runtime.protocol.settings import Attention
from edge_vlm_runtime.session.alerts import MAX_WAITING_LISTS
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.session.fake_engines import FakeBundle, FakeClock
from tests.runtime.session.viewer import LIMITS, Viewer

QUESTION = "is there a red ball ?"


class Watcher(Viewer):
    """A viewer with alerts; `yes` sets what the model makes of the frames from now on."""

    def create(self, question: str = QUESTION, **rule: Any) -> None:
        message = messages.AlertCreate(question=question, event_id="new", **rule)
        self.take(message)

    def delete(self, alert_id: str) -> None:
        self.take(messages.AlertDelete(alert_id=alert_id, event_id="gone"))

    def ask_list(self, event_id: str = "list") -> None:
        self.take(messages.AlertList(event_id=event_id))

    def yes(self, probability: float) -> None:
        self.engines.language.yes = probability

    @property
    def measured(self) -> list[int]:
        found: list[int] = self.engines.language.measured
        return found

    def story(self) -> list[tuple[str, int]]:
        """Begins and ends with the frame that each rests on."""
        return [
            (protocol.tag_of(type(event)), event.frame_sequence)
            for event in self.events
            if isinstance(event, (messages.AlertTriggered, messages.AlertCleared))
        ]

    def status(self) -> messages.AlertStatus:
        self.ask_list()
        self.run()
        return self.of(messages.AlertListed)[-1].alerts[0]


BEGIN, END = "alert.triggered", "alert.cleared"


def test_an_alert_may_have_a_name_of_its_own() -> None:
    watcher = Watcher()
    watcher.create(name="visitor")
    with pytest.raises(ConfigError, match="an alert called 'visitor' already"):
        watcher.create(name="visitor")
    watcher.create()
    named, nameless = (event.alert for event in watcher.of(messages.AlertCreated))
    assert named.name == "visitor"
    assert "name" not in json.loads(protocol.encode(messages.AlertCreated(alert=nameless)))["alert"]
    watcher.yes(0.9)
    watcher.show(1)
    begun = watcher.of(messages.AlertTriggered)
    assert [event.alert_name for event in begun] == ["visitor", UNSET]


def test_an_alert_begins_and_ends_with_what_is_seen_and_leaves_no_trace() -> None:
    watcher = Watcher()
    watcher.create()
    (created,) = watcher.of(messages.AlertCreated)
    assert created.event_id == "new"
    assert created.alert.rule.question == QUESTION
    for sequence, probability in enumerate([0.1, 0.9, 0.95, 0.5, 0.1], start=1):
        watcher.yes(probability)
        watcher.show(sequence)
        context = watcher.context
        assert watcher.context.kv_tokens == context.video_tokens
    assert watcher.story() == [(BEGIN, 2), (END, 5)]
    (triggered,) = watcher.of(messages.AlertTriggered)
    (cleared,) = watcher.of(messages.AlertCleared)
    assert (triggered.alert_id, triggered.episode) == (cleared.alert_id, cleared.episode)
    assert triggered.question == cleared.question == QUESTION
    assert triggered.probability == pytest.approx(0.9, abs=1e-4)
    assert (triggered.time_s, cleared.time_s) == (0.5, 2.0)
    assert (cleared.reason, cleared.lasted_s) == ("probability", 1.5)
    # one picture of 10 ms, its prefill and the check of 20 ms each
    assert triggered.age_s == pytest.approx(0.05, abs=1e-6)
    evidence = triggered.evidence
    assert evidence is not None
    assert evidence.exact
    assert (evidence.frame_sequence, evidence.time_s) == (2, 0.5)
    assert evidence.jpeg == jpeg(2)


def test_nothing_is_decoded_and_an_idle_session_is_not_asked() -> None:
    watcher = Watcher()
    watcher.create()
    watcher.show(1, 2)
    assert watcher.measured == [1, 1]
    assert [blocks for _, blocks in watcher.engines.language.prefills] == [1, 1]  # frames only
    for _ in range(5):
        assert not watcher.step()
    assert watcher.measured == [1, 1]


def test_a_session_without_alerts_measures_nothing() -> None:
    watcher = Watcher()
    watcher.show(1, 2, 3)
    assert watcher.measured == []


def test_alerts_are_measured_together_and_the_same_question_once() -> None:
    watcher = Watcher()
    watcher.show(1)
    watcher.create("is there a red ball ?")
    watcher.create("is there a cube ?")
    watcher.create("is there a red ball ?", on_threshold=0.95, off_threshold=0.5)
    watcher.yes(0.9)
    watcher.run()  # a new alert looks at the newest frame
    assert watcher.measured == [2]
    assert [event.alert_id for event in watcher.of(messages.AlertTriggered)] == [
        "alert_1",
        "alert_2",
    ]
    watcher.show(2)
    assert watcher.measured == [2, 2]


def test_one_step_is_one_run_and_a_question_comes_between_two() -> None:
    engines = FakeBundle(FakeClock())
    dims = engines.bundle.specs["llm"].dims
    dims["s"] = dataclasses.replace(dims["s"], opt=16, max=40)
    watcher = Watcher(engines, engines.vision._clock)
    watcher.show(1)
    watcher.yes(0.9)
    texts = ["is it red ?", "is it blue ?", "is there a cube ?", "is there a dog ?", "no ."]
    for text in texts:
        watcher.create(text)
    watcher.step()
    first = len(watcher.of(messages.AlertTriggered))
    assert 0 < first < len(texts)
    watcher.ask()
    watcher.run()
    kinds = [type(event) for event in watcher.events]
    done = kinds.index(protocol.ResponseDone)
    assert kinds[:done].count(messages.AlertTriggered) == first
    begun = [event.question for event in watcher.of(messages.AlertTriggered)]
    assert begun == texts
    assert sum(watcher.measured) == len(texts)
    assert len(watcher.measured) > 1


def test_questions_come_before_alerts_and_alerts_before_the_next_frame() -> None:
    watcher = Watcher()
    watcher.yes(0.9)
    watcher.create()
    watcher.put(1)
    watcher.step()
    watcher.put(2)
    watcher.ask()
    watcher.run()
    kinds = [
        (type(event), getattr(event, "frame_sequence", None))
        for event in watcher.events
        if isinstance(
            event, (protocol.ResponseDone, messages.AlertTriggered, protocol.FrameAccepted)
        )
    ]
    assert kinds[0] == (protocol.FrameAccepted, 1)
    answered = kinds.index((protocol.ResponseDone, None))
    assert answered < kinds.index((messages.AlertTriggered, 2))


def test_frames_that_come_during_an_answer_are_checked_when_it_ends() -> None:
    watcher = Watcher()
    watcher.create()
    watcher.show(1)
    watcher.ask()
    watcher.step()
    watcher.yes(0.9)
    for sequence in (2, 3):
        watcher.put(sequence)
        watcher.step()
    watcher.ask_list()
    assert watcher.measured == [1]
    assert not watcher.of(messages.AlertListed)
    watcher.run()
    assert watcher.measured == [1, 1]
    assert watcher.story() == [(BEGIN, 3)]
    (listed,) = watcher.of(messages.AlertListed)
    assert listed.alerts[0].frame_sequence == 3
    triggered = watcher.of(messages.AlertTriggered)[0]
    assert triggered.evidence is not None
    assert triggered.evidence.jpeg == jpeg(3)


def test_a_picture_that_stays_completes_a_hold_without_the_engines() -> None:
    watcher = Watcher(delivery="live", heartbeat_s=60.0, fps_cap=2.0)
    watcher.create(hold_s=1.5)
    watcher.yes(0.9)
    for sequence in range(1, 7):
        watcher.put(sequence, data=jpeg(1))
        watcher.run()
    assert watcher.drop_reasons() == dict.fromkeys(range(2, 7), "duplicate")
    assert watcher.measured == [1]
    (triggered,) = watcher.of(messages.AlertTriggered)
    assert (triggered.frame_sequence, triggered.time_s) == (1, 1.5)


def test_an_interval_spares_checks() -> None:
    watcher = Watcher()
    watcher.create(interval_s=2.0)
    watcher.show(*range(1, 10))
    assert len(watcher.measured) == 3


def test_checks_are_reported_on_request() -> None:
    watcher = Watcher()
    watcher.create(report_checks=True)
    watcher.yes(0.25)
    watcher.show(1, 2)
    checks = watcher.of(messages.AlertChecked)
    assert [check.frame_sequence for check in checks] == [1, 2]
    assert checks[0].probability == pytest.approx(0.25, abs=1e-4)
    assert checks[0].answer_mass == pytest.approx(1.0, abs=1e-6)


def test_evidence_is_as_small_as_the_limit_asks_and_may_be_left_out() -> None:
    limit = LIMITS.max_evidence_bytes
    big = jpeg(3, 700)
    assert len(big) > limit
    watcher = Watcher()
    watcher.create()
    watcher.create(evidence=False)
    watcher.yes(0.9)
    watcher.put(1, data=big)
    watcher.run()
    first, second = watcher.of(messages.AlertTriggered)
    assert first.evidence is not None
    assert not first.evidence.exact
    assert len(first.evidence.jpeg) <= limit
    assert max(decode_jpeg(first.evidence.jpeg).shape) <= 700
    assert second.evidence is None


# ---- create, list, delete --------------------------------------------------------------------


def test_lists_tell_where_alerts_stand() -> None:
    watcher = Watcher()
    watcher.ask_list()
    assert watcher.of(messages.AlertListed)[0].alerts == []
    watcher.create()
    watcher.yes(0.9)
    status = watcher.status()
    assert (status.state, status.episodes, status.probability) == ("idle", 0, None)
    watcher.show(1)
    status = watcher.status()
    assert (status.state, status.episodes, status.frame_sequence) == ("active", 1, 1)
    assert status.probability == pytest.approx(0.9, abs=1e-4)


def test_deleting_an_active_alert_ends_it_first() -> None:
    watcher = Watcher()
    watcher.create()
    watcher.yes(0.9)
    watcher.show(1, 2)
    watcher.delete("alert_1")
    kinds = [type(event) for event in watcher.events[-2:]]
    assert kinds == [messages.AlertCleared, messages.AlertDeleted]
    cleared = watcher.of(messages.AlertCleared)[0]
    assert (cleared.reason, cleared.lasted_s) == ("deleted", 0.5)
    assert watcher.of(messages.AlertDeleted)[0].event_id == "gone"
    watcher.show(3)
    assert watcher.measured == [1, 1]
    assert len(watcher.story()) == 2


def test_the_end_of_a_session_ends_its_alerts() -> None:
    watcher = Watcher()
    watcher.create()
    watcher.create(on_threshold=0.99)
    watcher.yes(0.9)
    watcher.show(1)
    watcher.close()
    assert [event.reason for event in watcher.of(messages.AlertCleared)] == ["session_closed"]


@pytest.mark.parametrize(
    ("action", "kind", "words"),
    [
        (lambda w: w.delete("alert_7"), UnknownAlert, "alert_7"),
        (lambda w: w.delete("x" * 10_000), UnknownAlert, "known are: alert_1"),
        (lambda w: w.create(""), ConfigError, "question"),
        (lambda w: w.create("is it red ? " * 100), QuestionTooLong, "tokens"),
        (lambda w: w.create(on_threshold=0.3, off_threshold=0.6), ConfigError, "off_threshold"),
        (lambda w: w.create(hold_s=-1.0), ConfigError, "hold_s"),
        (lambda w: [w.create() for _ in range(20)], TooManyAlerts, "16 alerts"),
    ],
)
def test_what_cannot_be_done_is_refused_and_the_rest_goes_on(
    action: Callable[[Watcher], Any], kind: type[EdgeVlmError], words: str
) -> None:
    watcher = Watcher()
    watcher.create()
    with pytest.raises(kind, match=words) as caught:
        action(watcher)
    assert len(str(caught.value)) < 300
    watcher.yes(0.9)
    watcher.show(1)
    assert watcher.story()[0] == (BEGIN, 1)


def test_lists_that_wait_are_bounded() -> None:
    watcher = Watcher()
    watcher.create()
    watcher.put(1)
    watcher.step()
    with pytest.raises(TooManyQuestions):
        for _ in range(MAX_WAITING_LISTS + 1):
            watcher.ask_list()
    watcher.run()
    assert len(watcher.of(messages.AlertListed)) == MAX_WAITING_LISTS


def test_a_check_that_fails_is_told_once_and_ends_nothing() -> None:
    watcher = Watcher()
    watcher.create()
    watcher.yes(0.9)
    watcher.show(1)
    watcher.yes(math.nan)
    watcher.show(2, 3, 4)
    assert [event.error.code for event in watcher.of(protocol.Error)] == ["E-NONFINITE"]
    watcher.ask()
    watcher.run()
    assert watcher.of(protocol.ResponseDone)[0].status == "completed"
    watcher.yes(0.1)
    watcher.show(5)
    assert watcher.story() == [(BEGIN, 1), (END, 5)]


@pytest.mark.parametrize("attention", list(Attention))
def test_alerts_work_in_every_mode(attention: Attention) -> None:
    watcher = Watcher(attention=attention, last_n=2)
    watcher.create()
    watcher.create("is there a cube ?")
    watcher.yes(0.9)
    watcher.show(1, 2, 3)
    assert watcher.measured == [2, 2, 2]
    assert len(watcher.of(messages.AlertTriggered)) == 2


@settings(max_examples=60)
@given(
    st.lists(
        st.sampled_from(["frame", "same", "bad", "ask", "step", "step", "update"])
        | st.sampled_from(["create", "delete", "list", "cancel"])
        | st.floats(0, 1),
        max_size=60,
    ),
    st.sampled_from(["live", "wait"]),
    st.sampled_from(list(Attention)),
)
def test_whatever_happens_begins_and_ends_alternate(
    actions: list[str | float], delivery: str, attention: Attention
) -> None:
    watcher = Watcher(delivery=delivery, attention=attention, window_tokens=70)
    asked = 0
    for number, action in enumerate(actions, start=1):
        watcher.clock.pass_s(0.4)
        try:
            if isinstance(action, float):
                watcher.yes(action)
            elif action in ("frame", "bad", "same"):
                data = {"bad": b"junk", "same": jpeg(1)}.get(action)
                watcher.put(number, data=data, at_s=number * 0.4)
            elif action == "ask":
                watcher.ask()
            elif action == "create":
                watcher.create(hold_s=0.4, clear_hold_s=0.4, cooldown_s=0.8)
            elif action == "delete":
                watcher.delete("alert_1")
            elif action == "list":
                watcher.ask_list()
                asked += 1
            elif action == "cancel":
                watcher.cancel(None)
            elif action == "update":
                watcher.update(keep_ratio=0.4)
            else:
                watcher.step()
        except EdgeVlmError:
            continue
    watcher.run()
    assert len(watcher.of(messages.AlertListed)) == asked
    watcher.close()
    assert watcher.outcomes() == watcher.put_frames
    for created in watcher.of(messages.AlertCreated):
        name = created.alert.alert_id
        story = [
            (type(event), event.episode)
            for event in watcher.events
            if isinstance(event, (messages.AlertTriggered, messages.AlertCleared))
            and event.alert_id == name
        ]
        rounds = len(story) // 2
        assert story == [
            (kind, episode)
            for episode in range(1, rounds + 1)
            for kind in (messages.AlertTriggered, messages.AlertCleared)
        ]
