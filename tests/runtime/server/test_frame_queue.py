from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_vlm_runtime.engine_thread.frame_queue import FrameQueue, RateGate
from edge_vlm_runtime.protocol.settings import DropPolicy
from edge_vlm_runtime.session.frames import DroppedFrame, EncodedFrame


def frame(seq: int, capture_s: float | None = None) -> EncodedFrame:
    capture_s = seq * 1.0 if capture_s is None else capture_s
    return EncodedFrame(seq=seq, capture_us=round(capture_s * 1e6), received_ns=0, data=b"")


def queue(delivery: DropPolicy, fps_cap: float = 100.0) -> FrameQueue:
    return FrameQueue(delivery=delivery, fps_cap=fps_cap, wait_capacity=3)


def reasons(dropped: list[DroppedFrame]) -> list[tuple[int, str]]:
    return [(each.frame.seq, each.reason.value) for each in dropped]


def test_live_keeps_the_newest_and_counts_the_rest() -> None:
    live = queue(DropPolicy.LIVE)
    assert live.put(frame(1)) == []
    assert reasons(live.put(frame(2))) == [(1, "busy")]
    assert reasons(live.put(frame(3))) == [(2, "busy")]
    taken = live.take()
    assert taken is not None
    assert taken.seq == 3
    assert live.take() is None
    assert live.counts() == (3, {"busy": 2})


def test_wait_keeps_order_and_refuses_only_what_was_announced_as_too_much() -> None:
    waiting = queue(DropPolicy.WAIT)
    assert [waiting.put(frame(i)) for i in (1, 2, 3)] == [[], [], []]
    assert reasons(waiting.put(frame(4))) == [(4, "busy")]
    assert [waiting.take().seq for _ in range(3)] == [1, 2, 3]  # type: ignore[union-attr]


def test_a_frame_that_is_not_newer_is_stale() -> None:
    live = queue(DropPolicy.LIVE)
    live.put(frame(5, 5.0))
    assert reasons(live.put(frame(5, 6.0))) == [(5, "stale")]
    assert reasons(live.put(frame(4, 6.0))) == [(4, "stale")]
    assert reasons(live.put(frame(6, 5.0))) == [(6, "stale")]
    assert reasons(live.put(frame(7, 4.0))) == [(7, "stale")]
    assert len(live) == 1


def test_emptying_gives_every_frame_an_outcome() -> None:
    waiting = queue(DropPolicy.WAIT)
    for i in (1, 2):
        waiting.put(frame(i))
    assert reasons(waiting.empty()) == [(1, "busy"), (2, "busy")]
    assert len(waiting) == 0


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.sampled_from(["put", "take", "live", "wait"]), max_size=60),
    st.sampled_from(list(DropPolicy)),
    st.sampled_from([0.7, 2.0, 100.0]),
)
def test_every_frame_comes_out_exactly_once(
    actions: list[str], delivery: DropPolicy, fps_cap: float
) -> None:
    subject = queue(delivery, fps_cap)
    put: list[int] = []
    out: list[int] = []
    for number, action in enumerate(actions):
        if action == "put":
            put.append(number)
            out += [each.frame.seq for each in subject.put(frame(number, number * 0.3))]
        elif action == "take":
            taken = subject.take()
            out += [] if taken is None else [taken.seq]
        else:
            subject.configure(delivery=DropPolicy(action), fps_cap=fps_cap)
    out += [each.frame.seq for each in subject.empty()]
    assert sorted(out) == put
    received, dropped = subject.counts()
    assert received == len(put)
    assert sum(dropped.values()) <= received


def passed(fps_cap: float, times_s: list[float]) -> list[float]:
    gate = RateGate(fps_cap)
    return [t for t in times_s if gate.lets_through(round(t * 1e6))]


def test_the_rate_gate_holds_the_mean_rate() -> None:
    camera = [i / 25 for i in range(250)]
    through = passed(2.0, camera)
    assert 19 <= len(through) <= 21
    assert all(b - a >= 0.35 for a, b in itertools.pairwise(through))


def test_the_rate_gate_forgives_jitter_and_leaves_slower_streams_alone() -> None:
    jittered = [i * 0.5 + (0.03 if i % 2 else -0.03) for i in range(1, 40)]
    assert passed(2.0, jittered) == jittered
    slow = [i * 1.7 for i in range(20)]
    assert passed(2.0, slow) == slow


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.001, 2.0), min_size=1, max_size=200), st.sampled_from([0.5, 2.0, 10.0]))
def test_the_rate_gate_never_exceeds_the_cap(gaps: list[float], fps_cap: float) -> None:
    times = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    through = passed(fps_cap, times)
    span = through[-1] - through[0]
    assert len(through) <= span * fps_cap + 1 + RateGate.JITTER + 1e-3
