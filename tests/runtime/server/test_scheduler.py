"""Whose turn it is: the order of work on one set of engines, on a clock that stands still."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm_runtime import protocol
from edge_vlm_runtime.engine_thread.scheduler import Scheduler
from edge_vlm_runtime.protocol import alerts as alert_messages
from edge_vlm_runtime.session.frames import EncodedFrame
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.session.fake_engines import FakeBundle, FakeClock
from tests.runtime.session.viewer import Viewer


class Table:
    """Players who have so many units of each kind to do, and what was done in which order."""

    def __init__(
        self, max_answer_slowdown: float = 0.2, answer_s: float = 0.02, watch_s: float = 0.01
    ) -> None:
        self.clock = FakeClock()
        self.answers: Counter[str] = Counter()
        self.videos: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self.begins: set[str] = set()
        self.done: list[tuple[str, str]] = []
        self.takes_s = {"answer": answer_s, "watch": watch_s, "message": 0.02}
        self.turns: Scheduler[str] = Scheduler(
            answer=lambda player: self._do("answer", self.answers, player),
            watch=lambda player: self._do("watch", self.videos, player),
            clock_ns=self.clock,
            max_answer_slowdown=max_answer_slowdown,
            obey=lambda player: self._do("message", self.messages, player),
            begins=lambda player: player in self.begins,
        )

    def _do(self, what: str, left: Counter[str], player: str) -> bool:
        if not left[player]:
            return False
        left[player] -= 1
        self.clock.pass_s(self.takes_s[what])
        self.done.append((what, player))
        return True

    def seat(self, *players: str) -> None:
        for player in players:
            self.turns.add(player)

    def play(self, rounds: int) -> None:
        for _ in range(rounds):
            self.turns.round()

    def order(self, what: str) -> str:
        return "".join(player for kind, player in self.done if kind == what)

    def spent_s(self, what: str) -> float:
        return sum(self.takes_s[kind] for kind, _ in self.done if kind == what)


def test_answers_advance_token_by_token_and_video_in_turn() -> None:
    table = Table()
    table.seat("a", "b", "c")
    table.answers.update({"a": 3, "c": 5})
    table.play(5)
    assert table.order("answer") == "acacaccc"
    table.done.clear()
    table.videos.update({"a": 3, "b": 3, "c": 3})
    table.play(3)
    assert sorted(table.order("watch")[:3]) == ["a", "b", "c"]
    assert table.order("watch")[:3] * 3 == table.order("watch")


def test_questions_come_before_frames() -> None:
    table = Table()
    table.seat("a", "b")
    table.videos.update({"a": 50, "b": 50})
    table.play(1)
    assert table.order("watch") == "ab"
    table.answers["b"] = 1
    table.done.clear()
    table.play(1)
    assert table.done[0] == ("answer", "b")


@settings(deadline=None, max_examples=20)
@given(
    share=st.sampled_from([0.1, 0.2, 0.5]),
    watch_s=st.sampled_from([0.001, 0.01, 0.1]),
    watchers=st.integers(1, 5),
    uneven=st.booleans(),
)
def test_video_takes_its_share_of_the_answers_time_and_no_more(
    share: float, watch_s: float, watchers: int, uneven: bool
) -> None:
    table = Table(max_answer_slowdown=share, watch_s=watch_s)
    names = "abcdefg"[: watchers + 1]
    table.seat(*names)
    table.videos.update(dict.fromkeys(names, 100_000))
    table.play(2)  # what a frame costs is known before the first question
    table.done.clear()
    table.answers[names[0]] = 600
    if uneven:
        table.takes_s["watch"] *= 0.1
        table.play(100)
        table.takes_s["watch"] = watch_s
        table.play(500)
    else:
        table.play(600)
    num_units = len(table.order("watch"))
    allowed_s = share * table.spent_s("answer")
    if not uneven:
        possible_s = min(allowed_s, 600 * len(names) * watch_s)
        assert 0.95 * possible_s - 3 * watch_s <= table.spent_s("watch") <= allowed_s + 1e-9
    assert num_units > 0
    served = Counter(table.order("watch"))
    assert len(served) == min(num_units, len(names))
    assert max(served.values()) - min(served[name] for name in names) <= 1


def test_an_unexpectedly_long_frame_is_paid_back() -> None:
    table = Table(max_answer_slowdown=0.2)
    table.seat("a")
    table.videos["a"] = 1000
    table.play(2)
    table.done.clear()
    table.answers["a"] = 400
    table.play(20)
    table.takes_s["watch"] = 0.5
    before = table.order("watch")
    while table.order("watch") == before:
        table.play(1)
    table.takes_s["watch"] = 0.01
    long_ago = len(table.done)
    table.play(100)
    assert all(kind == "answer" for kind, _ in table.done[long_ago:])
    table.play(200)
    assert any(kind == "watch" for kind, _ in table.done[long_ago:])


def test_without_an_allowance_answers_have_the_engines_for_themselves() -> None:
    table = Table(max_answer_slowdown=0.0)
    table.seat("a", "b")
    table.videos.update({"a": 9, "b": 9})
    table.answers["a"] = 5
    table.play(5)
    assert table.order("watch") == ""
    table.play(1)
    assert table.order("watch") == "ab"


def test_a_round_ends_early_for_news_and_the_next_goes_on_where_it_was() -> None:
    table = Table()
    table.seat("a", "b", "c")
    table.videos.update({"a": 9, "b": 9, "c": 9})
    for _ in range(6):
        table.turns.round(interrupted=lambda: True)
    assert table.order("watch") == "abcabc"


def test_a_session_may_leave_in_its_own_turn() -> None:
    table = Table()
    seen: list[str] = []

    def watch(player: str) -> bool:
        seen.append(player)
        if player == "b":
            turns.remove("b")
            turns.remove("c")
        return True

    turns: Scheduler[str] = Scheduler(
        answer=lambda player: False,
        watch=watch,
        clock_ns=table.clock,
        max_answer_slowdown=0.2,
    )
    for player in "abcd":
        turns.add(player)
    turns.round()
    assert seen == ["a", "b", "d"]
    assert set(turns.sessions) == {"a", "d"}
    assert turns.round()
    assert seen[3:] == ["a", "d"]


# ---- what a viewer can ask for without end ---------------------------------------------------


@pytest.mark.parametrize("without_end", ["messages", "beginnings"])
def test_whoever_asks_without_end_has_a_share_while_others_have_something_to_do(
    without_end: str,
) -> None:
    table = Table()
    table.seat("a", "b")
    if without_end == "messages":
        table.messages["a"] = 100_000
    else:
        table.begins.add("a")
        table.answers["a"] = 100_000
    table.play(50)  # alone
    spent_s = table.spent_s("message") + table.spent_s("answer")
    assert spent_s == pytest.approx(table.clock.ns * 1e-9 - 1.0)  # nothing is held back then
    table.done.clear()
    begin_ns = table.clock()
    table.messages["b"], table.answers["b"] = 1, 1000
    table.play(1)  # what was under way is done
    assert table.done[:2] == [("message", "b"), ("answer", "b")]
    while table.answers["b"]:
        table.play(1)
    took_s = (table.clock() - begin_ns) * 1e-9
    of_a = [entry for entry in table.done if entry[1] == "a"]
    assert 0.2 * took_s <= 0.02 * len(of_a) <= 0.26 * took_s  # a quarter, and not nothing


def test_two_who_ask_without_end_are_equals() -> None:
    table = Table()
    table.seat("a", "b")
    table.messages.update({"a": 1000, "b": 1000})
    table.play(100)
    asked = Counter(table.order("message"))
    assert abs(asked["a"] - asked["b"]) <= 6  # what may be saved up
    assert sum(asked.values()) >= 100


def test_cheap_messages_are_done_at_once_and_dear_ones_one_by_one() -> None:
    table = Table()
    table.seat("a", "b")
    table.takes_s["message"] = 0.0001
    table.messages.update({"a": 15, "b": 15})
    table.play(1)
    assert Counter(table.order("message")) == {"a": 15, "b": 15}
    table.takes_s["message"] = 0.01
    table.messages.update({"a": 3, "b": 3})
    table.play(1)
    assert Counter(table.order("message"))["a"] == 16


def test_a_session_that_leaves_has_no_debts() -> None:
    table = Table()
    table.seat("a", "b")
    table.messages["a"] = 100
    table.play(20)
    table.turns.remove("a")
    table.turns.remove("a")
    table.turns.add("a")
    table.answers["b"] = 5
    table.done.clear()
    table.play(1)
    assert ("message", "a") in table.done


# ---- pictures that take long -----------------------------------------------------------------


class SlowThread:
    """Decodes when it is told to."""

    def __init__(self) -> None:
        self.given: list[tuple[EncodedFrame, Any]] = []

    def decode(self, frame: EncodedFrame, done: Any) -> None:
        self.given.append((frame, done))

    def work(self) -> None:
        given, self.given = self.given, []
        for frame, done in given:
            done(frame.decoded_ahead(1 << 18))


LARGE = encode_jpeg(np.zeros((1700, 1700, 3), np.uint8))
BROKEN = LARGE[: len(LARGE) // 2]


def with_thread(viewer: Viewer) -> SlowThread:
    thread = SlowThread()
    viewer.handle._pictures = cast(Any, thread)
    return thread


@pytest.mark.parametrize("data", [LARGE, BROKEN], ids=["whole", "broken"])
def test_nobody_waits_for_a_picture_that_takes_long(data: bytes) -> None:
    clock = FakeClock()
    engines = FakeBundle(clock)
    slow, other = Viewer(engines, clock), Viewer(engines, clock)
    thread = with_thread(slow)
    turns = at_one_table([slow, other], clock)
    other.show(1)
    slow.put(1, data)
    slow.put(2)
    slow.ask()
    for _ in range(5):
        turns.round()
    assert not slow.outcomes()  # the one behind it waits, and so does the question
    assert not slow.of(protocol.Error)
    other.put(2)
    other.ask()
    while turns.round():
        pass
    assert other.of(protocol.ResponseDone)
    assert other.outcomes() == [1, 2]
    assert not slow.outcomes()
    thread.work()
    while turns.round():
        pass
    assert slow.outcomes() == [1, 2]
    assert slow.drop_reasons() == ({} if data is LARGE else {1: "decode_error"})
    assert slow.of(protocol.ResponseDone)


@pytest.mark.parametrize("is_done", [True, False])
def test_a_picture_under_way_has_its_outcome_when_the_session_ends(is_done: bool) -> None:
    viewer = Viewer()
    thread = with_thread(viewer)
    viewer.put(1, LARGE)
    viewer.put(2)
    viewer.run()
    if is_done:
        thread.work()
    viewer.close()
    thread.work()
    assert viewer.outcomes() == [1, 2]
    assert set(viewer.drop_reasons().values()) == {"busy"}


@pytest.mark.parametrize("delivery", ["live", "wait"])
def test_what_is_decoded_beside_the_engines_gives_the_same_events(delivery: str) -> None:
    said = []
    noisy = np.random.default_rng(0).integers(0, 256, (1600, 1600, 3), dtype=np.uint8)
    pictures = [LARGE, BROKEN, encode_jpeg(noisy), encode_jpeg(noisy), jpeg(3)]
    for has_thread in (False, True):
        viewer = Viewer(delivery=delivery, fps_cap=100.0)
        viewer.take(
            alert_messages.AlertCreate(question="is it ?", on_threshold=0.1, off_threshold=0.0)
        )
        thread = with_thread(viewer) if has_thread else None
        for number, data in enumerate(pictures, 1):
            viewer.put(number, data)
            viewer.run()
            if thread is not None:
                thread.work()
                viewer.run()
        said.append([protocol.encode(event) for event in viewer.events])
        triggered = viewer.of(cast(Any, alert_messages.AlertTriggered))
        assert len(triggered) == 1
    assert said[0] == said[1]


# ---- sessions at the table -------------------------------------------------------------------


def at_one_table(viewers: list[Viewer], clock: FakeClock) -> Scheduler[Viewer]:
    turns: Scheduler[Viewer] = Scheduler(
        answer=lambda viewer: viewer.answer(),
        watch=lambda viewer: viewer.watch(),
        clock_ns=clock,
        max_answer_slowdown=0.2,
    )
    for viewer in viewers:
        turns.add(viewer)
    return turns


def test_an_idle_session_costs_no_engine_time() -> None:
    clock = FakeClock()
    engines = [FakeBundle(clock) for _ in range(2)]
    idle, busy = (Viewer(used, clock) for used in engines)
    turns = at_one_table([idle, busy], clock)
    idle.show(1, 2)
    engines[0].vision.encoded.clear()
    engines[0].language.prefills.clear()
    for sequence in range(1, 30):
        busy.put(sequence)
        if sequence % 10 == 0:
            busy.ask()
        while turns.round():
            pass
    assert len(busy.of(protocol.ResponseDone)) == 2
    assert len(engines[1].vision.encoded) == 29
    assert not engines[0].vision.encoded
    assert not engines[0].language.prefills
    assert not engines[0].language.measured
    now_ns = clock()
    assert not turns.round()
    assert clock() == now_ns


@pytest.mark.parametrize("watchers", [0, 3])
def test_an_answer_of_two_hundred_tokens_is_slowed_by_a_bounded_share(watchers: int) -> None:
    """Frames come as fast as they can: into the same session and into others."""
    clock = FakeClock()
    engines = FakeBundle(clock)
    language = engines.language
    language._answer_ids = [language._answer_ids[0]]  # goes on until it is cut
    options: dict[str, Any] = {"max_answer_tokens": 200, "window_tokens": 100}
    asker = Viewer(engines, clock, **options)
    others = [Viewer(engines, clock, **options) for _ in range(watchers)]
    turns = at_one_table([asker, *others], clock)
    numbers = iter(range(1, 100_000))

    def flood() -> None:
        for viewer in (asker, *others):
            while viewer.handle.frames_waiting < 4:
                viewer.put(next(numbers))

    for _ in range(5):
        flood()
        turns.round()
    asker.ask()
    before = len(engines.vision.encoded)
    while not asker.of(protocol.ResponseDone):
        flood()
        turns.round()
    (done,) = asker.of(protocol.ResponseDone)
    assert done.usage.output_tokens == 200
    assert done.ttft_s
    assert done.tokens_per_s
    took_s = done.ttft_s + 199 / done.tokens_per_s
    meanwhile = len(engines.vision.encoded) - before
    assert meanwhile >= 16  # as many as one answer may collect
    alone_s = 201 * language.token_takes_s  # the last one joins what was encoded before
    assert alone_s + 0.1 < took_s <= 1.25 * alone_s
    assert not asker.drop_reasons()


def test_frames_of_the_answers_time_join_in_batches_and_none_is_lost() -> None:
    clock = FakeClock()
    engines = FakeBundle(clock)
    engines.language._answer_ids = engines.language._answer_ids[:1]
    viewer = Viewer(engines, clock, max_answer_tokens=100, window_tokens=280)
    turns = at_one_table([viewer], clock)
    viewer.show(1, 2)
    viewer.ask()
    for sequence in range(3, 15):
        viewer.put(sequence)
        for _ in range(8):
            turns.round()
    engines.language.prefills.clear()
    while turns.round():
        pass
    assert [blocks for _, blocks in engines.language.prefills] == [4, 4, 4]
    assert viewer.context.frame_numbers() == list(range(1, 15))
    accepted = viewer.of(protocol.FrameAccepted)
    assert [event.in_memory for event in accepted] == [True, True] + 12 * [False]
    assert not viewer.drop_reasons()


def test_a_session_that_is_behind_reads_several_frames_in_one_prefill() -> None:
    viewer = Viewer()
    for sequence in (1, 2, 3, 4):
        viewer.put(sequence)
    viewer.run()
    assert [blocks for _, blocks in viewer.engines.language.prefills] == [4]
    assert [event.in_memory for event in viewer.of(protocol.FrameAccepted)] == [False] * 3 + [True]
    assert viewer.context.frame_numbers() == [1, 2, 3, 4]


def test_a_question_sees_what_was_encoded_before_it() -> None:
    viewer = Viewer()
    for sequence in (1, 2, 3):
        viewer.put(sequence)
    viewer.watch()
    viewer.watch()  # two of three, none of them in the memory yet
    assert viewer.context.newest is None
    viewer.ask()
    viewer.answer()
    assert viewer.of(protocol.ResponseCreated)[0].newest_frame.frame_sequence == 2
    viewer.run()
    assert viewer.context.frame_numbers() == [1, 2, 3]


def test_a_batch_ends_with_a_frame_that_cannot_be_read() -> None:
    viewer = Viewer()
    viewer.put(1)
    viewer.put(2)
    viewer.put(3, data=b"not a picture")
    viewer.run()
    assert viewer.drop_reasons() == {3: "decode_error"}
    assert viewer.context.frame_numbers() == [1, 2]


def test_alerts_look_at_every_frame_of_a_session_that_is_behind() -> None:
    viewer = Viewer()
    create = alert_messages.AlertCreate(question="is there a red ball ?", report_checks=True)
    viewer.take(create)
    for sequence in (1, 2, 3, 4):
        viewer.put(sequence)
    viewer.run()
    checked = viewer.of(cast(Any, alert_messages.AlertChecked))
    assert [event.frame_sequence for event in checked] == [1, 2, 3, 4]


def test_the_order_of_frames_is_kept_whatever_the_turns() -> None:
    clock = FakeClock()
    engines = FakeBundle(clock)
    viewers = [Viewer(engines, clock, window_tokens=280) for _ in range(3)]
    turns = at_one_table(viewers, clock)
    for sequence in range(1, 13):
        while any(viewer.handle.frames_waiting == 4 for viewer in viewers):
            turns.round()
        for viewer in viewers:
            viewer.put(sequence)
        if sequence % 4 == 0:
            viewers[sequence % 3].ask()
        turns.round()
        turns.round()
    while turns.round():
        pass
    for viewer in viewers:
        accepted = [event.frame_sequence for event in viewer.of(protocol.FrameAccepted)]
        known = viewer.context.frame_numbers()
        assert accepted == known == list(range(1, 13))
        assert all(one < other for one, other in pairwise(known))
