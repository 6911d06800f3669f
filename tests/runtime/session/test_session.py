"""One session without sockets or threads: a clock that stands still unless told."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_vlm.errors import (
    ConfigError,
    NoFrameYet,
    QuestionTooLong,
    TooManyQuestions,
)
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.frames import DropReason
from edge_vlm_runtime.protocol.settings import Attention, DropPolicy
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.session.fake_engines import ANSWER, FakeBundle, FakeClock
from tests.runtime.session.viewer import Viewer


def test_an_answer_rests_on_the_newest_frame_and_leaves_the_cache_as_it_was() -> None:
    viewer = Viewer()
    viewer.show(1, 2, 3)
    before = viewer.context.kv_tokens
    viewer.clock.pass_s(1.0)
    viewer.ask(event_id="mine")
    viewer.run()
    (created,) = viewer.of(protocol.ResponseCreated)
    (done,) = viewer.of(protocol.ResponseDone)
    deltas = viewer.of(protocol.ResponseOutputTextDelta)
    assert created.event_id == "mine"
    assert created.newest_frame.frame_sequence == 3
    assert created.newest_frame.age_s == pytest.approx(1.03, abs=0.02)
    assert done.text == "".join(delta.delta for delta in deltas) == ANSWER
    assert (done.status, done.finish_reason) == ("completed", "stop")
    assert done.usage.vision_tokens == before
    assert done.kv_tokens == before + done.usage.text_tokens + done.usage.output_tokens
    assert viewer.context.kv_tokens == before
    assert viewer.events.index(created) < viewer.events.index(deltas[0])
    assert viewer.events.index(deltas[-1]) < viewer.events.index(done)


def test_time_to_first_token_counts_from_the_question() -> None:
    viewer = Viewer()
    viewer.show(1)
    viewer.ask()
    viewer.clock.pass_s(0.3)  # the engines were busy with something else
    viewer.run()
    (done,) = viewer.of(protocol.ResponseDone)
    assert done.ttft_s == pytest.approx(0.32, abs=1e-6)
    assert done.tokens_per_s == pytest.approx(1 / 0.02, rel=1e-6)


def test_video_goes_on_while_an_answer_is_decoded_and_joins_in_one_prefill() -> None:
    viewer = Viewer()
    viewer.show(1)
    viewer.ask()
    viewer.step()  # the question is prefilled
    for sequence in (2, 3, 4):
        viewer.put(sequence)
        viewer.step()
    accepted = {event.frame_sequence: event for event in viewer.of(protocol.FrameAccepted)}
    assert not viewer.of(protocol.ResponseDone)
    assert set(accepted) == {1, 2, 3, 4}
    assert [accepted[i].in_memory for i in (1, 2, 3, 4)] == [True, False, False, False]
    viewer.engines.language.prefills.clear()
    viewer.run()
    assert viewer.of(protocol.ResponseDone)[0].newest_frame.frame_sequence == 1
    assert [blocks for _, blocks in viewer.engines.language.prefills] == [3]
    assert viewer.context.frame_numbers() == [1, 2, 3, 4]
    viewer.ask()
    viewer.run()
    assert viewer.of(protocol.ResponseDone)[1].newest_frame.frame_sequence == 4


def test_questions_come_before_frames_and_wait_for_each_other() -> None:
    viewer = Viewer()
    viewer.show(1)
    viewer.put(2)
    viewer.ask("first")
    viewer.ask("second")
    viewer.run()
    created = viewer.of(protocol.ResponseCreated)
    assert [event.text for event in created] == ["first", "second"]
    assert created[0].newest_frame.frame_sequence == 1
    assert created[1].newest_frame.frame_sequence == 2
    assert len(viewer.of(protocol.ResponseDone)) == 2


def test_cancelling_is_a_truncate_and_tells_everybody() -> None:
    viewer = Viewer(history_turns=1, max_answer_tokens=16)
    viewer.show(1)
    before = viewer.context.kv_tokens
    viewer.ask(event_id="a")
    viewer.step()
    viewer.step()
    viewer.ask(event_id="b")
    viewer.cancel(None)
    (done,) = viewer.of(protocol.ResponseDone)
    assert done.status == "cancelled"
    assert viewer.context.kv_tokens == before
    (error,) = viewer.of(protocol.Error)
    assert (error.error.code, error.error.event_id) == ("E-CANCELLED", "b")
    viewer.ask()
    viewer.run()
    assert viewer.of(protocol.ResponseDone)[1].usage.text_tokens == done.usage.text_tokens
    viewer.cancel("response_99")  # long gone: nothing happens


def test_history_shows_earlier_turns() -> None:
    viewer = Viewer(history_turns=1, max_answer_tokens=16)
    viewer.show(1)
    sizes = []
    for _ in range(3):
        viewer.ask()
        viewer.run()
        sizes.append(viewer.of(protocol.ResponseDone)[-1].usage.text_tokens)
    assert sizes[0] < sizes[1] == sizes[2]


def test_a_question_before_the_first_frame_is_refused() -> None:
    viewer = Viewer()
    with pytest.raises(NoFrameYet):
        viewer.ask()
    viewer.put(1, data=b"not a picture")
    viewer.ask(event_id="early")  # a frame is on its way, but it will turn out unusable
    viewer.run()
    (error,) = viewer.of(protocol.Error)
    assert (error.error.code, error.error.event_id) == ("E-NO-FRAME", "early")
    viewer.put(2)
    viewer.ask()
    viewer.run()
    assert viewer.of(protocol.ResponseDone)[0].newest_frame.frame_sequence == 2


def test_limits_on_questions() -> None:
    viewer = Viewer()
    viewer.show(1)
    with pytest.raises(QuestionTooLong):
        viewer.ask("is it red ? " * 100)
    for _ in range(3):
        viewer.ask()
    with pytest.raises(TooManyQuestions):
        viewer.ask()
    viewer.run()
    assert len(viewer.of(protocol.ResponseDone)) == 3


def test_a_frame_the_engines_fail_on_costs_only_itself() -> None:
    viewer = Viewer()
    viewer.engines.vision.fails_on = {2}
    viewer.show(1, 2, 3)
    assert viewer.drop_reasons() == {2: "engine_error"}
    (dropped,) = viewer.of(protocol.FrameDropped)
    assert dropped.code == "E-NONFINITE"
    assert viewer.context.frame_numbers() == [1, 3]


def test_an_answer_the_engines_fail_on_costs_only_itself() -> None:
    viewer = Viewer()
    viewer.show(1)
    before = viewer.context.kv_tokens
    viewer.engines.language.fails_at_token = 2
    viewer.ask(event_id="bad")
    viewer.run()
    (done,) = viewer.of(protocol.ResponseDone)
    assert (done.status, done.error_code) == ("failed", "E-NONFINITE")
    assert viewer.of(protocol.Error)[0].error.event_id == "bad"
    assert viewer.context.kv_tokens == before
    viewer.engines.language.fails_at_token = None
    viewer.ask()
    viewer.run()
    assert viewer.of(protocol.ResponseDone)[1].text == ANSWER


def test_live_frames_grow_stale_files_do_not() -> None:
    for delivery, expected in (("live", {1: "stale"}), ("wait", {})):
        viewer = Viewer(delivery=delivery, max_frame_age_s=2.0)
        viewer.put(1)
        viewer.clock.pass_s(2.1)
        viewer.run()
        assert viewer.drop_reasons() == expected


def test_the_newest_answered_frame_stays_fresh_behind_a_slow_model() -> None:
    """Ten times slower than the camera: frames are dropped, the age of what is seen is bounded."""
    viewer = Viewer(delivery="live", fps_cap=2.0)
    viewer.engines.vision.takes_s = 5.0
    for sequence in range(1, 40):
        viewer.put(sequence, at_s=sequence * 0.5)
        if sequence % 10 == 0:  # the engines are free once in five seconds
            viewer.step()
        else:
            viewer.clock.pass_s(0.5)
    accepted = viewer.of(protocol.FrameAccepted)
    assert len(accepted) >= 3
    assert max(event.queue_ms for event in accepted) <= 500
    assert Counter(viewer.drop_reasons().values())["busy"] >= 30


def test_near_duplicates_are_dropped_until_the_heartbeat() -> None:
    viewer = Viewer(delivery="live", heartbeat_s=3.0, fps_cap=2.0)
    same, other = jpeg(1), jpeg(2)
    for sequence in range(1, 9):
        viewer.put(sequence, data=same)
        viewer.run()
    assert viewer.drop_reasons() == dict.fromkeys([2, 3, 4, 5, 6, 8], "duplicate")
    viewer.put(9, data=other)
    viewer.run()
    assert viewer.outcomes() == list(range(1, 10))
    assert 9 not in viewer.drop_reasons()

    viewer = Viewer(delivery="live", drop_duplicates=False, fps_cap=2.0)
    for sequence in range(1, 5):
        viewer.put(sequence, data=same)
        viewer.run()
    assert viewer.drop_reasons() == {}


def test_settings_change_what_comes_after() -> None:
    viewer = Viewer(policy="keep_all")
    viewer.show(1, 2)
    viewer.update(keep_ratio=0.4, policy="frame_topk", max_answer_tokens=2)
    viewer.show(*range(3, 12))
    kept = [event.cells_kept for event in viewer.of(protocol.FrameAccepted)]
    assert kept[:2] == [9, 9]
    assert sum(kept[2:]) <= 0.4 * 9 * 9 + 9
    viewer.ask()
    viewer.run()
    (done,) = viewer.of(protocol.ResponseDone)
    assert (done.finish_reason, done.usage.output_tokens) == ("length", 2)


def test_settings_may_change_in_the_middle_of_an_answer() -> None:
    viewer = Viewer()
    viewer.show(1, 2, 3)
    viewer.ask()
    viewer.step()
    viewer.update(attention="exact")
    viewer.run()
    assert viewer.of(protocol.ResponseDone)[0].text == ANSWER
    assert viewer.context.attention is Attention.EXACT
    viewer.show(4)
    viewer.ask()
    viewer.run()
    assert viewer.of(protocol.ResponseDone)[1].newest_frame.frame_sequence == 4


@pytest.mark.parametrize(
    "bad",
    [
        {"keep_ratio": 0.0},
        {"vision_tokens_per_s": -1.0},
        {"vision_tokens_per_s": float("inf")},
        {"policy": "best"},
        {"attention": "none"},
        {"window_tokens": 10},
        {"window_tokens": 10_000},
        {"max_answer_tokens": 1000},
        {"instructions": "is it red ? " * 100},
        {"temperature": -0.1},
        {"temperature": 11.0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
        {"seed": 1 << 54},
    ],
)
def test_settings_that_cannot_be_held_to_change_nothing(bad: dict[str, Any]) -> None:
    viewer = Viewer()
    before = viewer.session.settings
    with pytest.raises(ConfigError) as caught:
        viewer.update(**bad)
    assert next(iter(bad)) in str(caught.value)
    assert viewer.session.settings == before
    assert not viewer.of(protocol.SessionUpdated)


def test_a_session_runs_past_every_limit_of_the_model() -> None:
    """Hours of video in a cache of a few hundred tokens: memory stays flat, answers keep coming."""
    clock = FakeClock()
    viewer = Viewer(FakeBundle(clock, max_positions=400), clock, window_tokens=100)
    longest = 0
    for sequence in range(1, 500):
        viewer.put(sequence)
        viewer.step()
        longest = max(longest, viewer.context.kv_tokens)
        if sequence % 100 == 0:
            viewer.ask()
            viewer.run()
    assert longest <= 100
    assert len(viewer.of(protocol.ResponseDone)) == 4
    assert not viewer.of(protocol.Error)
    assert not viewer.of(protocol.FrameDropped)
    assert len(viewer.of(protocol.MemoryRebased)) > 5
    assert viewer.context.frame_numbers()[0] == 1
    assert viewer.arena.num_bytes < 1e5


def test_closing_gives_every_frame_and_question_its_outcome() -> None:
    viewer = Viewer()
    viewer.show(1)
    viewer.ask(event_id="a")
    viewer.step()
    viewer.ask(event_id="b")
    viewer.put(2)
    viewer.put(3)
    viewer.close()
    assert viewer.outcomes() == [1, 2, 3]
    assert viewer.of(protocol.ResponseDone)[0].status == "cancelled"
    assert viewer.of(protocol.Error)[0].error.event_id == "b"


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.sampled_from(["frame", "bad", "ask", "cancel", "step", "step", "step", "update"]),
        max_size=50,
    ),
    st.sampled_from(list(DropPolicy)),
    st.sampled_from(list(Attention)),
)
def test_whatever_happens_every_frame_and_question_gets_one_outcome(
    actions: list[str], delivery: DropPolicy, attention: Attention
) -> None:
    viewer = Viewer(delivery=delivery, attention=attention, window_tokens=70)
    asked: list[str] = []
    ratios = iter([0.3, 0.5, 0.8] * 20)
    for number, action in enumerate(actions, start=1):
        viewer.clock.pass_s(0.4)
        if action in ("frame", "bad"):
            viewer.put(number, data=b"junk" if action == "bad" else None, at_s=number * 0.4)
        elif action == "ask":
            try:
                viewer.ask(event_id=str(number))
                asked.append(str(number))
            except (NoFrameYet, TooManyQuestions):
                pass
        elif action == "cancel":
            viewer.cancel(None)
        elif action == "update":
            viewer.update(keep_ratio=next(ratios))
        else:
            viewer.step()
    viewer.run()
    viewer.close()
    assert viewer.outcomes() == viewer.put_frames
    created = {event.response_id: event.event_id for event in viewer.of(protocol.ResponseCreated)}
    ended = [created[event.response_id] for event in viewer.of(protocol.ResponseDone)]
    ended += [event.error.event_id for event in viewer.of(protocol.Error) if event.error.event_id]
    assert sorted(filter(None, ended), key=int) == sorted(asked, key=int)
    context = viewer.context
    assert context.video_tokens <= 70
    if attention is Attention.FRAME:
        assert viewer.context.kv_tokens == context.video_tokens
    for event in viewer.of(protocol.FrameDropped):
        assert event.reason in [reason.value for reason in DropReason]
