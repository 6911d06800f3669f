"""Points and tracks are read as they are written, and no text is too odd to be read."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from edge_vlm.text.points import SCALE, Point, parse_points


def written(points: Iterable[Point]) -> str:
    """As Molmo2 writes them: one tag for each run of points of one kind and label."""
    text = ""
    for (kind, label), tag in groupby(points, key=lambda point: (point.kind, point.label)):
        groups = []
        for (at, is_time), group in groupby(tag, key=lambda point: (point.at, point.is_time)):
            triples = [
                f"{p.object_id} {round(p.x * SCALE):03} {round(p.y * SCALE):03}" for p in group
            ]
            groups.append(" ".join([f"{at:.1f}" if is_time else f"{at:.0f}", *triples]))
        text += f'<{kind} coords="{";".join(groups)}">{label}</{kind}> '
    return text


def test_a_track_is_read() -> None:
    text = 'It is here: <tracks coords="0.0 1 123 456 2 010 1000;12.5 1 130 460">two dogs</tracks>.'
    first, second, third = parse_points(text)
    assert first == Point(
        kind="tracks", label="two dogs", object_id=1, x=0.123, y=0.456, at=0.0, is_time=True
    )
    assert (second.object_id, second.x, second.y, second.at) == (2, 0.01, 1.0, 0.0)
    assert (third.object_id, third.at) == (1, 12.5)


def test_pictures_are_counted_and_times_have_a_point() -> None:
    (one,) = parse_points('<points coords="1 1 500 250">label</points>')
    assert (one.at, one.is_time) == (1.0, False)
    (one,) = parse_points('<points coords="1.0 1 500 250">label</points>')
    assert (one.at, one.is_time) == (1.0, True)


def test_the_older_tabs_and_several_tags() -> None:
    text = (
        'Counting the <points coords="0.5 1 100 200\t1.0 2 300 400">balls</points> shows a total '
        'of 2. <points coords="1.0 1 001 002"/> <tracks alt="car" coords="2.0 7 111 222">'
    )
    found = parse_points(text)
    assert [(p.kind, p.label, p.at, p.object_id) for p in found] == [
        ("points", "balls", 0.5, 1),
        ("points", "balls", 1.0, 2),
        ("points", "", 1.0, 1),
        ("tracks", "", 2.0, 7),
    ]


def test_what_is_malformed_or_outside_is_skipped() -> None:
    assert parse_points('<points coords="0.5 1 12 456 2 300 400">x</points>')[0].object_id == 2
    assert parse_points('<points coords="0.5 1 1001 456">x</points>') == []
    assert parse_points('<points coords="0.5 1 123 456') == []  # cut off by the length limit
    assert parse_points('<points coords="">none</points>') == []
    assert parse_points("There are none.") == []


@given(st.text())
def test_any_text_can_be_read(text: str) -> None:
    assert isinstance(parse_points(text), list)


PIECES = (
    *('<points coords="', "<tracks ", 'coords="', '">', "</points>", "</tracks>", '"', ">", "<"),
    *(";", "\t", " ", "0.5", "1", "123", "1000", "9" * 30, "1 123 456", ".", "..", "-1"),
    *("\u0661\u0662\u0663", "\0"),
)


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_any_wreck_of_a_tag_can_be_read(text: str) -> None:
    for point in parse_points(text):
        assert 0 <= point.x <= 1
        assert 0 <= point.y <= 1
        assert point.at >= 0


POINTS = st.builds(
    Point,
    kind=st.sampled_from(["points", "tracks"]),
    label=st.from_regex(r"[^<>\s]+( [^<>\s]+)*", fullmatch=True),
    object_id=st.integers(1, 10**6),
    x=st.integers(0, SCALE).map(lambda n: n / SCALE),
    y=st.integers(0, SCALE).map(lambda n: n / SCALE),
    at=st.integers(0, 10**6).map(float),
    is_time=st.booleans(),
)


@given(st.lists(POINTS, max_size=20), st.text(alphabet=st.characters(exclude_characters="<")))
def test_what_is_written_is_read_again(points: list[Point], around: str) -> None:
    assert parse_points(around + written(points) + around) == points


def test_a_long_hostile_text_is_read() -> None:
    """Seconds would be minutes if the time grew with the square of the length."""
    for piece in ('<points coords="', "<points ", 'coords="1 ', "1 123 ", "9", " "):
        wreck = '<points coords="' + piece * (100_000 // len(piece))
        assert parse_points(wreck) == []
        assert parse_points(f'{wreck}">') == []
