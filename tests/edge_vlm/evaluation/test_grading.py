"""Which answers are right, and how much of them."""

from __future__ import annotations

import pytest

from edge_vlm.evaluation.grading import Verdict, facts_of, judge
from edge_vlm.formats.qa_set import AskedQuestion, Box
from edge_vlm.text.points import parse_points

LEFT: Box = (0.25, 0.5, 0.2, 0.4)
RIGHT: Box = (0.75, 0.5, 0.2, 0.4)


def question(answer: str = "", **fields: object) -> AskedQuestion:
    return AskedQuestion(**{"kind": "k", "text": "?", "answer": answer, "frame": 0} | fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["Top left", " top  left ", "top left.", "upper left"])
def test_words_are_compared_without_case_spaces_and_full_stop(text: str) -> None:
    assert judge(question("top left", also=("upper left",)), text).right


@pytest.mark.parametrize("text", ["left", "top left corner", "", "top-left"])
def test_other_words_are_wrong(text: str) -> None:
    assert judge(question("top left"), text) == Verdict(0, 1, 1)


@pytest.mark.parametrize(
    ("coords", "points"),
    [
        ("0.5 1 100 200 2 300 400;1.0 1 500 1000", 3),
        ("", 0),
        ("0.5", 0),
        ("0.5 1 100", 0),
        ("0.5 1 100 x", 0),
        ("0.5 1 -5 100", 0),
        ("0.5 1 50 60", 0),  # two digits
        ("0.5 1 1500 060", 0),  # outside
        ("0.5 1 100 200 300", 1),  # half-broken groups
        ("0.5 1 100 200 2 300;1.0 1 500 500", 2),
        ("0.5 1 100 200 2 30 400 3 600 700", 2),
        ("0.5 1 123 45678", 0),
        ("0.5 1 100 200;1.0 1 500 x", 0),  # letters among the numbers
    ],
)
def test_what_is_graded_is_what_is_drawn(coords: str, points: int) -> None:
    text = f'<points coords="{coords}">things</points>'
    drawn = parse_points(text)
    assert len(drawn) == points
    boxes = [(point.x, point.y, 0.01, 0.01) for point in drawn]
    assert judge(question(boxes=tuple(boxes)), text).right
    graded = judge(question(boxes=()), text)
    assert graded == (Verdict(0, points, 0) if points else Verdict(1, 1, 1))


def said(*points: tuple[int, int]) -> str:
    triples = " ".join(f"{i} {x:03d} {y:03d}" for i, (x, y) in enumerate(points, start=1))
    return f'<points coords="0.0 {triples}">things</points>'


def test_each_thing_is_found_once() -> None:
    both = question(boxes=(LEFT, RIGHT))
    assert judge(both, said((250, 500), (750, 400))).right
    assert judge(both, said((250, 500), (260, 500))) == Verdict(1, 2, 2)
    assert judge(both, said((250, 500))) == Verdict(1, 1, 2)
    assert judge(both, said((250, 500), (750, 500), (500, 500))) == Verdict(2, 3, 2)
    assert judge(both, "no") == Verdict(0, 0, 2)


def test_a_box_is_as_wide_and_as_high_as_it_says() -> None:
    one = question(boxes=(LEFT,))
    assert judge(one, said((345, 690))).right
    assert not judge(one, said((355, 500))).right
    assert not judge(one, said((250, 705))).right


def test_nothing_to_point_to_is_right_without_a_point_only() -> None:
    none = question(boxes=())
    assert judge(none, "There are none.") == Verdict(1, 1, 1)
    assert judge(none, said((250, 500))) == Verdict(0, 1, 0)


def test_facts_are_phrases_without_articles() -> None:
    facts = facts_of("There is a red cat, the blue dog and a red cat.")
    assert facts == {"red cat": 2, "blue dog": 1}


def test_a_caption_is_worth_its_facts() -> None:
    caption = question("red cat, blue dog", kind="caption")
    assert judge(caption, "a blue dog and a red cat").right
    assert judge(caption, "red cat, red cat, green dog") == Verdict(1, 3, 2)
    assert judge(caption, "") == Verdict(0, 0, 2)


def test_a_box_must_lie_in_the_picture() -> None:
    with pytest.raises(ValueError, match="a box is"):
        question(boxes=((0.5, 1.5, 0.1, 0.1),))
