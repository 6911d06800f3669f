"""What a connection may send: frames are cut where they end, and counted on a clock of ours."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_vlm_runtime.server.intake import BURST_S, PING, TEXT, Allowance, FrameCutter, FrameHead
from tests.runtime.session.fake_engines import FakeClock


def frame(payload: bytes, opcode: int, masked: bool) -> bytes:
    flag, size = 0x80 if masked else 0, len(payload)
    head = bytes([0x80 | opcode])
    if size < 126:
        head += bytes([flag | size])
    elif size < 1 << 16:
        head += struct.pack(">BH", flag | 126, size)
    else:
        head += struct.pack(">BQ", flag | 127, size)
    return head + (bytes(4) if masked else b"") + payload


FRAMES = st.lists(
    st.tuples(st.sampled_from([0, 0, 1, 5, 125, 126, 300, 65_535, 65_536]), st.booleans()),
    max_size=6,
)


@settings(deadline=None, max_examples=40)
@given(FRAMES, st.lists(st.integers(1, 70_000), min_size=1, max_size=20))
def test_frames_are_cut_where_they_end_however_they_came(
    sizes: list[tuple[int, bool]], steps: list[int]
) -> None:
    frames = [frame(bytes(size), TEXT, masked) for size, masked in sizes]
    stream, cutter = b"".join(frames), FrameCutter()
    heads: list[FrameHead] = []
    came = b""
    place = step = 0
    while place < len(stream):
        taken = steps[step % len(steps)]
        cutter.push(stream[place : place + taken])
        place, step = place + taken, step + 1
        while True:
            if (head := cutter.head) is not None:
                assert len(came) in {sum(map(len, frames[:n])) for n in range(len(frames))}
                heads.append(head)
            if not (piece := cutter.cut()):
                break
            came += piece
    assert came == stream
    assert [head.payload_bytes for head in heads] == [size for size, _ in sizes]


def test_text_costs_by_its_length_and_pictures_do_not() -> None:
    assert FrameHead(TEXT, 2).cost == pytest.approx(1.0, abs=0.001)
    assert FrameHead(TEXT, 8 << 20).cost == 513.0
    assert FrameHead(0, 8 << 20).cost == 513.0  # it may go on a text
    assert FrameHead(2, 8 << 20).cost == FrameHead(PING, 125).cost == 1.0


@settings(deadline=None, max_examples=20)
@given(st.floats(10, 1000), st.lists(st.floats(0, 0.05), min_size=50, max_size=100))
def test_no_more_is_taken_than_the_rate_and_one_burst(per_s: float, pauses: list[float]) -> None:
    clock = FakeClock()
    allowance = Allowance(per_s, lambda: clock() * 1e-9)
    taken = 0
    for pause_s in pauses:
        while allowance.take(1.0):
            taken += 1
        assert 0.0 < allowance.wait_s <= 2.0 / per_s
        clock.pass_s(pause_s)
    assert taken <= max(1.0, BURST_S * per_s) + sum(pauses) * per_s + 1
    clock.pass_s(allowance.wait_s + 1e-6)
    assert allowance.take(1.0)


def test_what_a_dear_one_costs_beyond_the_allowance_is_owed() -> None:
    clock = FakeClock()
    allowance = Allowance(100.0, lambda: clock() * 1e-9)
    assert allowance.take(225.0)  # 200 more than there are
    assert not allowance.take(1.0)
    assert allowance.wait_s == pytest.approx(2.01)
    clock.pass_s(2.02)
    assert allowance.take(1.0)
