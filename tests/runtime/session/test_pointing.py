"""Points of an answer belong to a frame that the model was shown, at the time of its capture."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_vlm_runtime import protocol
from edge_vlm_runtime.session.asking.pointing import NEAR_S, pointed_at
from edge_vlm_runtime.session.context import ShownFrame

# The anchor, and a window that was moved by 90 s when stamps ran out.
FRAMES = [
    ShownFrame(1, 0.0, 0.0),
    ShownFrame(181, 0.5, 90.5),
    ShownFrame(183, 1.5, 91.5),
]
SNAPSHOT = protocol.Snapshot(
    frame_sequence=190, time_s=95.0, width=64, height=48, crops=1, tokens=40, encode_ms=1.0
)


def places(
    coords: str, snapshot: protocol.Snapshot | None = None
) -> list[tuple[int | None, float]]:
    found = pointed_at(f'<points coords="{coords}">x</points>', FRAMES, snapshot)
    return [(point.frame_sequence, point.time_s) for point in found]


def test_times_are_those_of_the_capture_after_a_rebase() -> None:
    assert places("0.0 1 100 200;0.5 1 100 200;1.5 1 100 200") == [
        (1, 0.0),
        (181, 90.5),
        (183, 91.5),
    ]


def test_a_time_between_frames_goes_to_the_nearest_within_reach() -> None:
    assert places("1.9 1 100 200") == [(183, 91.5)]
    assert places("2.5 1 100 200") == [(None, 92.5)]


def test_numbers_are_pictures_where_there_is_one() -> None:
    assert places("1 1 100 200;1.5 1 100 200", SNAPSHOT) == [(190, 95.0), (183, 91.5)]
    assert places("1 1 100 200") == [(181, 90.5)]
    alone = pointed_at('<points coords="7.5 1 100 200">x</points>', [], SNAPSHOT)
    assert [(point.frame_sequence, point.time_s) for point in alone] == [(190, 95.0)]


@given(st.text() | st.integers(0, 10**9).map(lambda n: f'<points coords="{n / 10:.1f} 1 100 200">'))
def test_any_answer_has_places_within_reach(text: str) -> None:
    captured = {frame.seq: frame.capture_s for frame in FRAMES}
    for point in pointed_at(text, FRAMES, None):
        if point.frame_sequence is not None:
            assert point.time_s == captured[point.frame_sequence]
        else:
            assert all(abs(point.time_s - seen) > NEAR_S for seen in list(captured.values())[1:])
    assert pointed_at("There is none.", FRAMES, SNAPSHOT) == ()
