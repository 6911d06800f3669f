"""Questions: every kind can be asked, answers are true to the scene, and none can be guessed."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from edge_vlm.world.questions import (
    ABSENT,
    NOT_SEEN,
    NOT_THERE,
    QUESTION_KINDS,
    REGIONS,
    Question,
    ask,
    ask_any,
    vocabulary,
)
from edge_vlm.world.sampling import sample_scenes
from edge_vlm.world.scenes import COLOUR_NAMES, Scenes, WorldConfig
from edge_vlm.world.sprites import KINDS
from edge_vlm.world.street import Street

KINDS_OF_ALL = (ABSENT, "presence")


def ask_many(
    scenes: Scenes, per_clip: int, rng: random.Random, weights: dict[str, float] | None = None
) -> list[list[Question]]:
    return [
        [ask_any(scenes, clip, rng, weights) for _ in range(per_clip)]
        for clip in range(len(scenes))
    ]


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return sample_scenes(3, 500, WorldConfig(split="heldout"))


@pytest.fixture(scope="module")
def asked(scenes: Scenes) -> list[list[Question]]:
    return ask_many(scenes, 12, random.Random(0))


def of_kind(asked: list[list[Question]], kind: str) -> Iterator[tuple[int, Question]]:
    return ((b, q) for b, row in enumerate(asked) for q in row if q.kind == kind)


def thing_named(scenes: Scenes, b: int, name: str) -> int | None:
    kinds = scenes.kind[b].tolist()
    number = KINDS.index(name)
    return kinds.index(number) if number in kinds else None


def shares(asked: list[list[Question]], kind: str) -> dict[str, float]:
    answers = Counter(q.answer for _, q in of_kind(asked, kind))
    return {answer: n / answers.total() for answer, n in answers.items()}


def test_every_kind_is_asked_and_repeatable(scenes: Scenes, asked: list[list[Question]]) -> None:
    counts = Counter(q.kind for row in asked for q in row)
    assert set(counts) == set(QUESTION_KINDS)
    assert min(counts.values()) > 0.04 * counts.total()
    assert {q.frame for row in asked for q in row} == set(range(16))
    assert asked == ask_many(scenes, 12, random.Random(0))


def test_presence_is_true_and_balanced(scenes: Scenes, asked: list[list[Question]]) -> None:
    left = 0
    for b, q in of_kind(asked, "presence"):
        (name,) = re.findall(r"^Is there a (\w+) now\?$", q.text)
        m = thing_named(scenes, b, name)
        here = m is not None and bool(scenes.visible[b, q.frame, m])
        assert q.answer == ("yes" if here else "no")
        left += m is not None and not here and bool(scenes.enter[b, m] <= q.frame)
    share = shares(asked, "presence")
    assert 0.44 < share["yes"] < 0.56
    assert left > 20


def test_name_and_colour_are_those_of_now(scenes: Scenes, asked: list[list[Question]]) -> None:
    for b, q in of_kind(asked, "name"):
        (colour,) = re.findall(r"^What is the (\w+) thing\?$", q.text)
        m = thing_named(scenes, b, q.answer)
        assert m is not None
        assert scenes.visible[b, q.frame, m]
        assert COLOUR_NAMES[scenes.colour[b, q.frame, m]] == colour
    changed = 0
    for b, q in of_kind(asked, "colour"):
        (name,) = re.findall(r"^What colour is the (\w+)\?$", q.text)
        m = thing_named(scenes, b, name)
        assert m is not None
        assert scenes.visible[b, q.frame, m]
        assert COLOUR_NAMES[scenes.colour[b, q.frame, m]] == q.answer
        changed += scenes.colour[b, q.frame, m] != scenes.colour[b, scenes.enter[b, m], m]
    assert changed > 5


def test_count_is_true_and_spread(scenes: Scenes, asked: list[list[Question]]) -> None:
    for b, q in of_kind(asked, "count"):
        assert q.text == "How many things are there now?"
        assert int(q.answer) == scenes.visible[b, q.frame].sum()
    share = shares(asked, "count")
    assert set(share) == {"0", "1", "2", "3", "4", "5"}
    assert max(share.values()) < 0.3
    assert share["4"] > 0.05


def test_direction_is_seen_in_the_frames_so_far(
    scenes: Scenes, asked: list[list[Question]]
) -> None:
    for b, q in of_kind(asked, "direction"):
        (name,) = re.findall(r"^Which way does the (\w+) move\?$", q.text)
        m = thing_named(scenes, b, name)
        assert m is not None
        first = int(scenes.enter[b, m])
        assert scenes.visible[b, q.frame, m]
        assert q.frame - first >= 2
        dx = scenes.x[b, q.frame, m] - scenes.x[b, first, m]
        dy = scenes.y[b, q.frame, m] - scenes.y[b, first, m]
        truth = "it stands still"
        if dx or dy:
            horizontal, vertical = ("left", "right")[int(dx > 0)], ("up", "down")[int(dy > 0)]
            truth = horizontal if abs(dx) > abs(dy) else vertical
        assert q.answer == truth
    share = shares(asked, "direction")
    assert share["it stands still"] <= 0.32
    assert len(share) == 5
    assert min(share.values()) > 0.1


def test_order_and_when_tell_first_frames(scenes: Scenes, asked: list[list[Question]]) -> None:
    times = scenes.times_s
    said_first = 0
    orders = list(of_kind(asked, "order"))
    for b, q in orders:
        names = re.findall(r"^What came first, the (\w+) or the (\w+)\?$", q.text)[0]
        things = [thing_named(scenes, b, name) for name in names]
        entries = [int(scenes.enter[b, m]) for m in things if m is not None]
        assert len(entries) == 2
        assert max(entries) <= q.frame
        assert q.answer == names[0 if entries[0] < entries[1] else 1]
        assert entries[0] != entries[1]
        said_first += q.answer == names[0]
    assert 0.4 < said_first / len(orders) < 0.6
    for b, q in of_kind(asked, "when"):
        (name,) = re.findall(r"^When did the (\w+) appear\?$", q.text)
        m = thing_named(scenes, b, name)
        assert m is not None
        first = int(scenes.visible[b, :, m].argmax())
        assert first <= q.frame
        assert q.answer == f"at {times[b, first]:.1f} s"


def test_where_and_point_give_the_place(scenes: Scenes, asked: list[list[Question]]) -> None:
    times = scenes.times_s
    for b, q in of_kind(asked, "where"):
        m = q.meta["object"]
        assert q.text == f"Where is the {KINDS[scenes.kind[b, m]]} now?"
        x, y = scenes.x[b, q.frame, m], scenes.y[b, q.frame, m]
        assert q.answer == REGIONS[int(y * 3)][int(x * 3)]
        assert all(abs(v - third) > 0.019 for v in (x, y) for third in (1 / 3, 2 / 3))
    for b, q in of_kind(asked, "point"):
        m = q.meta["object"]
        name = KINDS[scenes.kind[b, m]]
        assert q.text == f"Point to the {name}."
        assert scenes.visible[b, q.frame, m]
        pattern = r'^<points coords="(\d+\.\d) 1 (\d{3,4}) (\d{3,4})">(\w+)</points>$'
        stamp, x, y, said = re.findall(pattern, q.answer)[0]
        assert said == name
        assert float(stamp) == pytest.approx(times[b, q.frame])
        assert int(x) % 50 == int(y) % 50 == 0
        assert abs(int(x) / 1000 - scenes.x[b, q.frame, m]) <= 0.0251
        assert abs(int(y) / 1000 - scenes.y[b, q.frame, m]) <= 0.0251


def test_captions_name_all_that_is_there(scenes: Scenes, asked: list[list[Question]]) -> None:
    longest = 0
    for b, q in of_kind(asked, "caption"):
        facts = [fact.split() for fact in q.answer.split(", ")]
        here = [m for m, seen in enumerate(scenes.visible[b, q.frame]) if seen]
        true = [
            [COLOUR_NAMES[scenes.colour[b, q.frame, m]], KINDS[scenes.kind[b, m]]] for m in here
        ]
        assert sorted(facts) == sorted(true)
        order = [COLOUR_NAMES.index(colour) for colour, _ in facts]
        assert order == sorted(order)
        longest = max(longest, len(facts))
    assert longest >= 4


def test_what_is_not_there_is_said_to_be_so(scenes: Scenes) -> None:
    """Things that left and things that never came; "not seen" only of those."""
    rng, forms, left = random.Random(5), Counter[str](), 0
    for b in range(500):
        frame = rng.randrange(16)
        q = ask(scenes, b, ABSENT, frame, rng)
        if q is None:  # no order where nothing has come
            assert not (scenes.enter[b] <= frame).any()
            continue
        forms[" ".join(q.text.split()[:2])] += 1
        here = {int(scenes.kind[b, m]) for m in range(5) if scenes.visible[b, frame, m]}
        came = {int(scenes.kind[b, m]) for m in range(5) if scenes.enter[b, m] <= frame}
        named = {k for k, name in enumerate(KINDS) if re.search(rf"the {name}\b", q.text)}
        if q.text.startswith(("When", "What came first")):
            assert q.answer == NOT_SEEN
            assert len(named - came) == 1
        else:
            assert q.answer == NOT_THERE
            assert not named & here
            left += bool(named & came)
        colours = {scenes.colour[b, frame, m] for m in range(5) if scenes.visible[b, frame, m]}
        for number, colour in enumerate(COLOUR_NAMES):
            assert not (f"the {colour} thing" in q.text and number in colours)
    assert set(forms) == {
        *("Where is", "What is", "What colour", "What came", "Point to", "Which way", "When did")
    }
    assert min(forms.values()) > 10
    assert left > 20


def test_a_street_in_which_every_kind_has_come_is_asked_about() -> None:
    """What never came cannot be asked about then; what is not there now can."""
    scenes = Street(107).scenes(0, 741, 2.0)
    assert set(scenes.kind[0].tolist()) == set(range(len(KINDS)))
    here = {KINDS[kind] for kind in scenes.kind[0, scenes.visible[0, 740]]}
    asked = [
        ask(scenes, 0, kind, 740, random.Random(n)) for kind in KINDS_OF_ALL for n in range(40)
    ]
    absent = [q for q in asked if q is not None and q.kind == ABSENT]
    assert {q.answer for q in absent} == {NOT_THERE}
    for q in asked:
        if q is not None and (q.kind == ABSENT or (q.kind, q.answer) == ("presence", "no")):
            assert not any(re.search(rf"\b{name}\b", q.text) for name in here)


def test_answers_do_not_depend_on_later_frames(scenes: Scenes) -> None:
    for b in range(40):
        for kind in (*QUESTION_KINDS, ABSENT):
            question = ask(scenes, b, kind, 3, random.Random(b))
            if question is None:
                continue
            later = scenes.visible[b : b + 1].copy()
            later[:, 4:] = False
            cut = replace(scenes.select(slice(b, b + 1)), visible=later)
            assert ask(cut, 0, kind, 3, random.Random(b)) == question


def test_weights_choose_the_kinds(scenes: Scenes) -> None:
    rows = ask_many(scenes, 4, random.Random(1), {"name": 1.0, "colour": 0.0})
    assert {q.kind for row in rows for q in row} <= {"name", "count"}
    question = ask_any(scenes, 0, random.Random(1), {"count": 1.0}, t=5)
    assert (question.kind, question.frame) == ("count", 5)


def test_unknown_kinds_are_refused(scenes: Scenes) -> None:
    with pytest.raises(ValueError, match="smell"):
        ask(scenes, 0, "smell", 0, random.Random(0))
    with pytest.raises(ValueError, match="smell"):
        ask_any(scenes, 0, random.Random(0), {"smell": 1.0})


def test_vocabulary_covers_all_words_and_signs(asked: list[list[Question]]) -> None:
    piece = re.compile(r" ?[A-Za-z]+|[^0-9]")
    known = {found for text in vocabulary() for found in piece.findall(text)}
    for row in asked:
        for q in row:
            assert set(piece.findall(q.text)) | set(piece.findall(q.answer)) <= known
