"""Engines that fail at the worst moment: what is told, what is remembered, and what comes after."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from edge_vlm.errors import NonFinite
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol import alerts
from edge_vlm_runtime.protocol.settings import Attention
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.session.fake_engines import FakeBundle, FakeClock
from tests.runtime.session.viewer import Viewer


def with_time_limit(seconds: float) -> Viewer:
    clock = FakeClock()
    bundle = FakeBundle(clock)
    bundle.bundle.defaults["max_time_s"] = seconds
    return Viewer(bundle, clock)


def fail_next_prefill(viewer: Viewer) -> None:
    viewer.engines.language.prefills_until_failure = 0


def stamps(viewer: Viewer) -> list[tuple[int, float]]:
    return [(shown.seq, round(shown.stamp_s, 3)) for shown in viewer.context.shown()]


def test_time_begins_anew_with_a_memory_that_was_lost_in_a_rebase() -> None:
    viewer = with_time_limit(4.0)
    number = 0
    while not viewer.of(protocol.MemoryRebased):
        number += 1
        viewer.show(number)
    offset_s = viewer.context.time_offset_s
    assert offset_s > 0
    while not viewer.of(protocol.FrameDropped):
        number += 1
        before = viewer.context.num_frames
        num_prefills = len(viewer.engines.language.prefills)
        viewer.put(number)
        if viewer.session._context._time_runs_out(frame_at(number)):
            fail_next_prefill(viewer)
        viewer.run()
    assert len(viewer.engines.language.prefills) == num_prefills
    assert viewer.context.num_frames == 0
    # what was lost is told
    assert viewer.of(protocol.MemoryEvicted)[-1].frames == before
    for later in (1, 2, 3):
        viewer.show(number + later)
        assert stamps(viewer) == [(number + n, (n - 1) * 0.5) for n in range(1, later + 1)]
    viewer.ask()
    viewer.run()
    done = viewer.of(protocol.ResponseDone)[-1]
    assert done.time_offset_s == pytest.approx(number * 0.5)  # of the first frame it knows
    assert done.newest_frame.time_s == pytest.approx((number + 2) * 0.5)


def frame_at(number: int) -> Any:
    """As much of a viewer's frame as its time needs; the first one is number 1."""
    return dataclasses.make_dataclass("Timed", [("pts_ns", int)])(round((number - 1) * 0.5e9))


def test_an_answer_tells_the_true_age_of_its_newest_frame_after_a_failed_prefill() -> None:
    viewer = Viewer()
    viewer.show(1)
    viewer.clock.pass_s(60.0)
    fail_next_prefill(viewer)
    viewer.put(2, at_s=60.5)
    viewer.run()
    assert viewer.drop_reasons() == {2: "engine_error"}
    viewer.ask()
    viewer.run()
    (created,) = viewer.of(protocol.ResponseCreated)
    assert created.newest_frame.frame_sequence == 1
    assert created.newest_frame.age_s == pytest.approx(60.0, abs=0.2)


def test_the_anchor_alone_tells_its_true_age() -> None:
    """A smaller window leaves only frames that joined long ago."""
    viewer = Viewer(keep_ratio=1.0, min_cells=9)
    viewer.show(1, 2)
    viewer.clock.pass_s(30.0)
    viewer.put(3)
    fail_next_prefill(viewer)
    viewer.run()
    viewer.ask()
    viewer.run()
    (created,) = viewer.of(protocol.ResponseCreated)
    assert created.newest_frame.frame_sequence == 2
    assert created.newest_frame.age_s == pytest.approx(30.0, abs=0.2)


def test_everything_on_the_wire_counts_from_the_same_frame() -> None:
    viewer = Viewer(window_tokens=50, keep_ratio=1.0, min_cells=9)
    viewer.engines.vision.fails_on = {1}
    viewer.show(*range(1, 8))
    accepted = {e.frame_sequence: e.time_s for e in viewer.of(protocol.FrameAccepted)}
    assert accepted == {number: (number - 1) * 0.5 for number in range(2, 8)}
    assert {s.seq: s.capture_s for s in viewer.context.shown()}.items() <= accepted.items()
    oldest = viewer.context.frame_numbers()[1]
    assert viewer.of(protocol.MemoryEvicted)[-1].oldest_s == accepted[oldest]
    assert stamps(viewer)[0] == (2, 0.0)
    assert stamps(viewer)[-1] == (7, 2.5)
    viewer.ask()
    viewer.run()
    (done,) = viewer.of(protocol.ResponseDone)
    assert done.newest_frame.time_s == accepted[7]
    assert done.time_offset_s == accepted[2]


def test_less_history_never_fills_the_cache() -> None:
    viewer = Viewer(history_turns=1, max_answer_tokens=16, min_cells=9, keep_ratio=1.0)
    question = "what colour is the cube ? " * 14
    viewer.show(1)
    for _ in range(2):
        viewer.ask(question)
        viewer.run()
    with_history = viewer.of(protocol.ResponseDone)[-1].usage.text_tokens
    viewer.update(history_turns=0, max_answer_tokens=1)
    number = 1
    while not viewer.of(protocol.MemoryEvicted):
        number += 1
        viewer.show(number)
    viewer.ask(question)
    viewer.run()
    assert not viewer.of(protocol.Error)
    done = viewer.of(protocol.ResponseDone)[-1]
    assert done.status == "completed"
    assert done.usage.text_tokens < with_history


def test_a_shorter_answer_leaves_no_room_for_long_turns() -> None:
    """History is shown as far as room is reserved for it now."""
    viewer = Viewer(history_turns=1, max_answer_tokens=60, min_cells=9, keep_ratio=1.0)
    language = viewer.engines.language
    language._answer_ids = language._answer_ids[:1]  # goes on until it is cut
    question = "what colour is the cube ? " * 17
    viewer.show(1)
    viewer.ask(question)
    viewer.run()
    viewer.update(max_answer_tokens=1)
    number = 1
    while not viewer.of(protocol.MemoryEvicted):
        number += 1
        viewer.show(number)
    viewer.ask(question)
    viewer.run()
    assert not viewer.of(protocol.Error)


@pytest.mark.parametrize("where", ["vision", "prefill"])
def test_a_scene_that_the_engines_failed_on_is_no_duplicate(where: str) -> None:
    viewer = Viewer(delivery="live", fps_cap=30.0, heartbeat_s=60.0)
    viewer.put(1, jpeg(1), 0.0)
    viewer.run()
    if where == "vision":
        viewer.engines.vision.fails_on = {2}
    else:
        fail_next_prefill(viewer)
    for number in (2, 3, 4):
        viewer.put(number, jpeg(20), number * 0.5)
        viewer.run()
    assert viewer.drop_reasons() == {2: "engine_error", 4: "duplicate"}
    assert viewer.context.frame_numbers() == [1, 3]


def test_frames_evicted_for_one_that_failed_are_told() -> None:
    viewer = Viewer(window_tokens=50, keep_ratio=1.0, min_cells=9)
    viewer.show(*range(1, 6))
    before = viewer.context.frame_numbers()
    told = sum(event.frames for event in viewer.of(protocol.MemoryEvicted))
    fail_next_prefill(viewer)
    viewer.show(6)
    gone = len(before) - len(viewer.context.frame_numbers())
    assert gone > 0
    assert sum(event.frames for event in viewer.of(protocol.MemoryEvicted)) == told + gone
    assert viewer.context.kv_tokens == viewer.context.video_tokens


def test_an_update_that_fails_changes_nothing() -> None:
    viewer = Viewer(attention="exact")
    viewer.show(1, 2)
    before = viewer.settings
    fail_next_prefill(viewer)
    with pytest.raises(NonFinite):
        viewer.update(attention="frame", keep_ratio=0.9)
    assert viewer.settings == before
    assert viewer.context.attention is Attention.EXACT
    assert not viewer.of(protocol.SessionUpdated)
    assert viewer.context.frame_numbers() == [1, 2]
    viewer.ask()
    viewer.run()
    assert viewer.of(protocol.ResponseDone)[0].newest_frame.frame_sequence == 2
    viewer.update(attention="frame", keep_ratio=0.9)
    assert viewer.settings.keep_ratio == 0.9
    assert viewer.context.kv_tokens == viewer.context.video_tokens > 0


def test_an_update_announced_during_an_answer_holds_though_the_memory_is_lost() -> None:
    viewer = Viewer(attention="exact")
    viewer.show(1, 2)
    viewer.ask()
    viewer.step()
    viewer.update(attention="frame")
    assert viewer.of(protocol.SessionUpdated)
    fail_next_prefill(viewer)
    viewer.run()
    assert viewer.of(protocol.ResponseDone)[0].status == "completed"
    assert [event.error.code for event in viewer.of(protocol.Error)] == ["E-NONFINITE"]
    assert viewer.of(protocol.MemoryEvicted)[-1].frames == 2
    assert viewer.context.attention is Attention.FRAME
    viewer.show(3)
    assert viewer.context.frame_numbers() == [3]
    assert viewer.context.kv_tokens == viewer.context.video_tokens


def lose_the_memory(viewer: Viewer) -> None:
    """By a change of mode while an answer is decoded that the engines then fail on."""
    viewer.ask()
    viewer.step()
    viewer.update(attention="frame")
    fail_next_prefill(viewer)
    viewer.run()
    assert viewer.context.num_frames == 0


def test_a_still_scene_is_seen_again_when_the_memory_is_lost() -> None:
    viewer = Viewer(delivery="live", fps_cap=30.0, heartbeat_s=60.0, attention="exact")
    for number in (1, 2):
        viewer.put(number, jpeg(number))
        viewer.run()
    lose_the_memory(viewer)
    for number in (3, 4):
        viewer.put(number, jpeg(2))
        viewer.run()
    assert viewer.drop_reasons() == {4: "duplicate"}
    assert viewer.context.frame_numbers() == [3]
    accepted = viewer.of(protocol.FrameAccepted)[-1]
    assert accepted.cells_kept == accepted.cells_seen


def test_the_frame_after_a_lost_one_is_whole() -> None:
    """What changed with the lost one would be pruned from it as known."""
    viewer = Viewer()
    viewer.show(1, 2)
    fail_next_prefill(viewer)
    viewer.show(3, 4, 5)
    assert viewer.drop_reasons() == {3: "engine_error"}
    kept = {e.frame_sequence: e.cells_kept for e in viewer.of(protocol.FrameAccepted)}
    assert kept[1] == kept[4] == 9
    assert max(kept[2], kept[5]) < 9


def test_no_alert_is_checked_on_a_memory_that_was_lost() -> None:
    viewer = Viewer(attention="exact")
    viewer.show(1, 2)
    language = viewer.engines.language
    language.yes = 0.9
    viewer.ask()
    viewer.step()
    viewer.take(alerts.AlertCreate(question="is there a red ball ?"))
    viewer.update(attention="frame")
    fail_next_prefill(viewer)
    viewer.take(alerts.AlertList())
    viewer.run()
    assert viewer.context.num_frames == 0
    assert language.measured == []
    assert [event.error.code for event in viewer.of(protocol.Error)] == ["E-NONFINITE"]
    (listed,) = viewer.of(alerts.AlertListed)
    assert listed.alerts[0].probability is None
    viewer.show(3)
    assert language.measured == [1]
    assert viewer.of(alerts.AlertTriggered)[0].frame_sequence == 3


def test_a_question_whose_prefill_fails_gives_the_arena_back() -> None:
    viewer = Viewer()
    viewer.show(1)
    before = viewer.context.kv_tokens
    fail_next_prefill(viewer)
    viewer.ask(event_id="bad")
    viewer.run()
    (error,) = viewer.of(protocol.Error)
    assert (error.error.code, error.error.event_id) == ("E-NONFINITE", "bad")
    assert viewer.context.kv_tokens == before
    viewer.show(2)
    viewer.ask()
    viewer.run()
    assert viewer.of(protocol.ResponseDone)[0].newest_frame.frame_sequence == 2


def test_closing_in_mid_answer_prefills_nothing() -> None:
    viewer = Viewer(max_answer_tokens=40)
    viewer.show(1)
    viewer.ask()
    viewer.step()
    for number in range(2, 6):
        viewer.put(number)
        viewer.watch()
    assert [e.in_memory for e in viewer.of(protocol.FrameAccepted)] == [True] + 4 * [False]
    viewer.engines.language.prefills.clear()
    viewer.close()
    assert viewer.of(protocol.ResponseDone)[0].status == "cancelled"
    assert viewer.engines.language.prefills == []


def test_the_arena_is_lent_to_one_at_a_time() -> None:
    viewer = Viewer()
    viewer.show(1)
    context = viewer.context
    before = context.kv_tokens
    with pytest.raises(ZeroDivisionError), context.branch() as arena:
        arena.append(3)
        with pytest.raises(RuntimeError, match="lent out"):
            context.add([])
        with pytest.raises(RuntimeError, match="lent out"):
            context.reconfigure(context._plan)
        with pytest.raises(RuntimeError, match="lent out"), context.branch():
            pass
        raise ZeroDivisionError
    assert context.kv_tokens == before
    viewer.show(2)
    assert context.frame_numbers() == [1, 2]


def test_who_waits_for_the_end_of_the_answers_is_told_whatever_ends_them() -> None:
    calls: list[str] = []
    viewer = Viewer()
    viewer.show(1)
    viewer.ask()
    viewer.handle.when_idle(lambda: calls.append("answered"))
    viewer.handle.after_round()
    assert calls == []
    viewer.run()
    viewer.handle.after_round()
    assert calls == ["answered"]
    viewer.ask()
    viewer.handle.when_idle(lambda: calls.append("closed"))
    viewer.close()
    assert calls == ["answered", "closed"]
    viewer.handle.when_idle(lambda: calls.append("ended before"))
    assert calls[2:] == ["ended before"]
