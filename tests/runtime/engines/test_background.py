"""A session that nobody watches live gives way, answers included, and is done when others rest."""

from __future__ import annotations

from edge_vlm_runtime import protocol
from edge_vlm_runtime.engine_thread.courtesy import CONVERSATION_NS, Courtesy
from edge_vlm_runtime.engine_thread.courtesy import SHARE as BACKGROUND_SHARE
from edge_vlm_runtime.engine_thread.scheduler import Scheduler
from tests.runtime.session.fake_engines import ANSWER, FakeBundle, FakeClock
from tests.runtime.session.viewer import Viewer

SHARE = 0.15


def viewer_of(clock: FakeClock, *, is_background: bool = False) -> Viewer:
    """With engines of its own, so that each says all of its answer."""
    viewer = Viewer(FakeBundle(clock), clock)
    viewer.handle.is_background = is_background
    viewer.show(1)
    return viewer


def scheduler_of(clock: FakeClock, *viewers: Viewer) -> Scheduler[Viewer]:
    turns: Scheduler[Viewer] = Scheduler(
        answer=lambda viewer: viewer.handle.answer(),
        watch=lambda viewer: viewer.handle.watch(),
        clock_ns=clock,
        max_answer_slowdown=SHARE,
    )
    for viewer in viewers:
        turns.add(viewer)
    return turns


def ended(viewer: Viewer) -> list[str]:
    return [event.text for event in viewer.of(protocol.ResponseDone)]


def seconds_of(clock: FakeClock, turns: Scheduler[Viewer], asker: Viewer, number: int = 8) -> float:
    """Until the asker has its answers."""
    begin_ns, wanted = clock(), len(ended(asker)) + number
    for _ in range(number):
        asker.ask()
        while asker.session.is_answering:
            turns.round()
    assert len(ended(asker)) == wanted
    return (clock() - begin_ns) * 1e-9


def test_a_live_answer_is_slowed_by_no_more_than_its_share() -> None:
    clock = FakeClock()
    live, other = viewer_of(clock), viewer_of(clock, is_background=True)
    turns = scheduler_of(clock, live, other)
    alone_s = seconds_of(clock, turns, live)
    for _ in range(3):
        other.ask()
    beside_s = seconds_of(clock, turns, live)
    assert alone_s < beside_s <= (1 + SHARE) * alone_s + other.engines.language.token_takes_s
    assert len(ended(other)) < 3  # it has got less than its questions need
    while turns.round():
        pass
    assert ended(other) == [ANSWER] * 3


def test_a_live_question_waits_for_one_unit_of_it() -> None:
    clock = FakeClock()
    live, other = viewer_of(clock), viewer_of(clock, is_background=True)
    turns = scheduler_of(clock, live, other)
    other.ask()
    for _ in range(3):
        turns.round()  # it is in the middle of its answer
    assert other.session.is_decoding
    asked_ns = clock()
    live.ask()
    while not live.of(protocol.ResponseOutputTextDelta):
        turns.round()
    waited_s = (clock() - asked_ns) * 1e-9
    units = 3  # its own prefill and first token, and one of the other's
    assert waited_s <= units * other.engines.language.token_takes_s + 1e-9


def test_two_that_nobody_watches_take_turns() -> None:
    clock = FakeClock()
    both = [viewer_of(clock, is_background=True) for _ in range(2)]
    turns = scheduler_of(clock, *both)
    for viewer in both:
        viewer.ask()
    while turns.round():
        pass
    assert [ended(viewer) for viewer in both] == [[ANSWER], [ANSWER]]


def busy_share(courtesy: Courtesy, begin_ns: int, end_ns: int, unit_ns: int = 10_000_000) -> float:
    """Of a time in which there is always something to do."""
    now_ns, busy_ns = begin_ns, 0
    while now_ns < end_ns:
        if pause_ns := courtesy.pause_ns(now_ns):
            now_ns += pause_ns
            continue
        courtesy.worked(now_ns, now_ns + unit_ns)
        now_ns += unit_ns
        busy_ns += unit_ns
    return busy_ns / (now_ns - begin_ns)


def test_while_somebody_talks_background_work_pauses() -> None:
    courtesy = Courtesy()
    assert busy_share(courtesy, 0, 10**9) == 1.0
    courtesy.talked(10**9)
    end_ns = 10**9 + CONVERSATION_NS
    assert abs(busy_share(courtesy, 10**9, end_ns) - BACKGROUND_SHARE) < 0.01
    assert busy_share(courtesy, end_ns + 10**8, end_ns + 10**9) == 1.0
