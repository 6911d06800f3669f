"""Questions about rendered scenes, each with its one exact answer at the moment it is asked.

A question asked after frame t is answered from frames 0 .. t alone. Positions are those of the
unshaken picture.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_vlm.world.paths import STILL
from edge_vlm.world.scenes import COLOUR_NAMES, UNCLEAR, Scenes
from edge_vlm.world.splits import MOST_THINGS
from edge_vlm.world.sprites import KINDS

COUNT_ANSWERS = tuple(str(number) for number in range(MOST_THINGS + 1))
DIRECTION_ANSWERS = ("left", "right", "up", "down", "it stands still")
REGIONS = (
    ("top left", "top", "top right"),
    ("left", "middle", "right"),
    ("bottom left", "bottom", "bottom right"),
)
_WHERE_MARGIN = 0.02  # nearer to a boundary between thirds "where" is not asked
_DIRECTION_FRAMES = 3  # visible frames needed to tell a direction
_POINT_STEP = 50  # of 1000
_LEFT_SHARE = 0.4  # "no" answers about a thing that was there and has left
_YES_SHARE = 0.55  # where something is visible; empty pictures make up for it
_LATER = 0.6  # exponent on a share of the clip
_MOMENTS = 6
ABSENT = "absent"
"""Questions of the other kinds about what is not there, or never came as far as is remembered."""
NOT_THERE, NOT_SEEN = "not there", "not seen"
_ABSENT_FORMS = ("where", "colour", "point", "direction", "name", "when", "when", "order")
"""Every form is asked as often as it stands here."""
_STILL_WEIGHT = 0.05  # at each moment tried: few things move, and which way is the question


@dataclass(frozen=True)
class Question:
    """One question after frame ``frame`` with its exact answer.

    ``meta``: "object" (index in the clip, or None), and per kind "x", "y" (0..1), "first" (frame).
    """

    kind: str
    text: str
    answer: str
    frame: int
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Clip:
    """One clip as plain lists [frame][thing], faster than arrays to read one number at a time."""

    kind: list[int]
    colour: list[list[int]]
    x: list[list[float]]
    y: list[list[float]]
    visible: list[list[bool]]
    enter: list[int]
    told: list[bool]
    direction: list[list[int]]
    times_s: list[float]

    def now(self, t: int) -> list[int]:
        return [m for m, seen in enumerate(self.visible[t]) if seen]

    def came(self, t: int) -> list[list[int]]:
        """Those of each kind that have come so far, in that order: a name means who came last."""
        came: dict[int, list[int]] = {}
        for m in sorted(range(len(self.kind)), key=lambda m: self.enter[m]):
            if self.kind[m] >= 0 and self.enter[m] <= t:
                came.setdefault(self.kind[m], []).append(m)
        return sorted(came.values(), key=lambda alike: alike[-1])

    def entered(self, t: int) -> list[int]:
        return [alike[-1] for alike in self.came(t)]

    def name(self, m: int) -> str:
        return KINDS[self.kind[m]]


def _clip(scenes: Scenes, b: int) -> _Clip:
    return _Clip(
        kind=scenes.kind[b].tolist(),
        colour=scenes.colour[b].tolist(),
        x=scenes.x[b].tolist(),
        y=scenes.y[b].tolist(),
        visible=scenes.visible[b].tolist(),
        enter=scenes.enter[b].tolist(),
        told=scenes.told[b].tolist(),
        direction=scenes.direction[b].tolist(),
        times_s=scenes.times_s[b].tolist(),
    )


def _presence(clip: _Clip, t: int, rng: random.Random) -> Question | None:
    here = clip.now(t)
    thing: int | None = None
    if here and rng.random() < _YES_SHARE:
        thing, answer = rng.choice(here), "yes"
    else:
        if not here and rng.random() < 0.5:
            return None  # only "no" is possible: asked half as often, to keep the answers balanced
        answer = "no"
        gone = [m for m in clip.entered(t) if not clip.visible[t][m]]
        if gone and rng.random() < _LEFT_SHARE:
            thing = rng.choice(gone)
    if thing is not None:
        name = clip.name(thing)
    else:
        seen = {clip.kind[m] for m in clip.entered(t)}
        here_now = {clip.kind[m] for m in here}
        name = KINDS[rng.choice(_kinds_but(seen) or _kinds_but(here_now))]
    return Question("presence", f"Is there a {name} now?", answer, t, {"object": thing})


def _kinds_but(known: set[int]) -> list[int]:
    """None are left where a street has shown all of them."""
    return [kind for kind in range(len(KINDS)) if kind not in known]


def _name(clip: _Clip, t: int, rng: random.Random) -> Question | None:
    here = clip.now(t)
    if not here:
        return None
    m = rng.choice(here)
    text = f"What is the {COLOUR_NAMES[clip.colour[t][m]]} thing?"
    return Question("name", text, clip.name(m), t, {"object": m})


def _colour(clip: _Clip, t: int, rng: random.Random) -> Question | None:
    here = clip.now(t)
    if not here:
        return None
    m = rng.choice(here)
    text = f"What colour is the {clip.name(m)}?"
    return Question("colour", text, COLOUR_NAMES[clip.colour[t][m]], t, {"object": m})


def _count(clip: _Clip, t: int, rng: random.Random | None = None) -> Question:
    here = clip.now(t)
    answer = COUNT_ANSWERS[len(here)]
    return Question("count", "How many things are there now?", answer, t, {"object": None})


def _direction(clip: _Clip, t: int, rng: random.Random) -> Question | None:
    heading = clip.direction[t]
    known = [
        m
        for m in clip.now(t)
        if t - clip.enter[m] + 1 >= _DIRECTION_FRAMES and heading[m] != UNCLEAR
    ]
    if not known:
        return None
    m = rng.choice(known)
    if heading[m] == STILL and rng.random() >= _STILL_WEIGHT:
        moving = [other for other in known if heading[other] != STILL]
        if not moving:
            return None
        m = rng.choice(moving)
    text = f"Which way does the {clip.name(m)} move?"
    return Question("direction", text, DIRECTION_ANSWERS[heading[m]], t, {"object": m})


def _order(clip: _Clip, t: int, rng: random.Random) -> Question | None:
    came = clip.came(t)
    # whichever of its kind a name means
    pairs = [(a[-1], b[-1]) for a in came for b in came if clip.enter[a[-1]] < clip.enter[b[0]]]
    if not pairs:
        return None
    first, second = rng.choice(pairs)
    named = [clip.name(first), clip.name(second)]
    rng.shuffle(named)
    text = f"What came first, the {named[0]} or the {named[1]}?"
    return Question("order", text, clip.name(first), t, {"object": first})


def event_time(seconds: float, told: bool = True) -> str:
    """The answer to "when"; `told` is false where the thing was there then and nothing tells since
    when: what came is forgotten, or was not looked at."""
    return f"{'at' if told else 'by'} {seconds:.1f} s"


def _when(clip: _Clip, t: int, rng: random.Random) -> Question | None:
    entered = clip.entered(t)
    late = [m for m in entered if clip.enter[m] > 0]
    if not entered or (not late and rng.random() < 0.5):
        return None  # "from the start on" is the easy answer: asked about half as often
    m = rng.choice(late if late and rng.random() < 0.5 else entered)
    first = clip.enter[m]
    answer = event_time(clip.times_s[first], clip.told[m])
    text = f"When did the {clip.name(m)} appear?"
    return Question("when", text, answer, t, {"object": m, "first": first})


def _clear_third(value: float) -> bool:
    return min(abs(value - 1 / 3), abs(value - 2 / 3)) >= _WHERE_MARGIN


def _where(clip: _Clip, t: int, rng: random.Random) -> Question | None:
    x, y = clip.x[t], clip.y[t]
    clear = [m for m in clip.now(t) if _clear_third(x[m]) and _clear_third(y[m])]
    if not clear:
        return None
    m = rng.choice(clear)
    answer = REGIONS[min(2, int(y[m] * 3))][min(2, int(x[m] * 3))]
    meta = {"object": m, "x": x[m], "y": y[m]}
    return Question("where", f"Where is the {clip.name(m)} now?", answer, t, meta)


def _point(clip: _Clip, t: int, rng: random.Random) -> Question | None:
    here = clip.now(t)
    if not here:
        return None
    m = rng.choice(here)
    x, y = clip.x[t][m], clip.y[t][m]
    column, row = (math.floor(v * 1000 / _POINT_STEP + 0.5) * _POINT_STEP for v in (x, y))
    name = clip.name(m)
    answer = f'<points coords="{clip.times_s[t]:.1f} 1 {column:03d} {row:03d}">{name}</points>'
    return Question("point", f"Point to the {name}.", answer, t, {"object": m, "x": x, "y": y})


def _caption(clip: _Clip, t: int, rng: random.Random) -> Question | None:
    """Facts in the order of `COLOUR_NAMES`: one order, and one that asks for each thing by name."""
    here = sorted(clip.now(t), key=lambda m: clip.colour[t][m])
    if not here:
        return None
    answer = ", ".join(f"{COLOUR_NAMES[clip.colour[t][m]]} {clip.name(m)}" for m in here)
    return Question("caption", "What is there now?", answer, t, {"object": None})


def _absent(clip: _Clip, t: int, rng: random.Random) -> Question | None:
    """About a thing that is not there now, or of which nothing is remembered."""
    here = {clip.kind[m] for m in clip.now(t)}
    came = {clip.kind[m] for m in clip.entered(t)} | here
    form = rng.choice(_ABSENT_FORMS)
    is_past = form in ("when", "order")
    left = sorted(came - here)
    if form == "name":
        shown = {clip.colour[t][m] for m in clip.now(t)}
        colour = rng.choice([c for c in range(len(COLOUR_NAMES)) if c not in shown])
        text = f"What is the {COLOUR_NAMES[colour]} thing?"
    else:
        if not is_past and left and rng.random() < 0.5:
            kinds = left
        else:
            kinds = _kinds_but(came) or ([] if is_past else left)
        if not kinds:
            return None
        name = KINDS[rng.choice(kinds)]
        text = {
            "where": f"Where is the {name} now?",
            "colour": f"What colour is the {name}?",
            "point": f"Point to the {name}.",
            "direction": f"Which way does the {name} move?",
            "when": f"When did the {name} appear?",
        }.get(form, "")
        if form == "order":
            if not came:
                return None
            named = [name, KINDS[rng.choice(sorted(came))]]
            rng.shuffle(named)
            text = f"What came first, the {named[0]} or the {named[1]}?"
    return Question(ABSENT, text, NOT_SEEN if is_past else NOT_THERE, t, {"object": None})


_MAKERS: dict[str, Callable[[_Clip, int, random.Random], Question | None]] = {
    "presence": _presence,
    "name": _name,
    "colour": _colour,
    "count": _count,
    "direction": _direction,
    "order": _order,
    "when": _when,
    "where": _where,
    "point": _point,
    "caption": _caption,
    ABSENT: _absent,
}
QUESTION_KINDS = tuple(kind for kind in _MAKERS if kind != ABSENT)
"""Of what is there, and of the tables of ten kinds. ABSENT is asked beside them."""


def ask(scenes: Scenes, b: int, kind: str, t: int, rng: random.Random) -> Question | None:
    """A question of ``kind`` about clip ``b`` after frame ``t``.

    None if this kind has no sensible answer then; also, at random, where only the over-represented
    answer is possible ("no" in an empty picture, "it stands still", there from the start).
    Raises ValueError for an unknown kind and IndexError for a clip or frame outside the scenes.
    """
    if kind not in _MAKERS:
        raise ValueError(f"kind must be one of {tuple(_MAKERS)}, got {kind!r}")
    return _MAKERS[kind](_clip(scenes, b), t, rng)


def ask_sometime(
    scenes: Scenes, b: int, kind: str, rng: random.Random, t: int | None = None
) -> Question | None:
    """A question of ``kind`` about clip ``b`` as `ask_any` asks it; None if no moment is found."""
    return _ask_sometime(_clip(scenes, b), kind, rng, t)


def ask_any(
    scenes: Scenes,
    b: int,
    rng: random.Random,
    weights: Mapping[str, float] | None = None,
    t: int | None = None,
) -> Question:
    """A question of a random kind (in proportion to ``weights``), after frame ``t`` or any frame.

    Any frame: later ones, with more to remember, are more likely, and "how many" is balanced over
    the answers that the clip offers.
    """
    return _ask_any(_clip(scenes, b), rng, *_kinds_and_weights(weights), t)


def _kinds_and_weights(
    weights: Mapping[str, float] | None,
) -> tuple[Sequence[str], Sequence[float]]:
    if weights is None:
        weights = dict.fromkeys(QUESTION_KINDS, 1.0)
    unknown = set(weights) - set(_MAKERS)
    if unknown:
        raise ValueError(f"weights name unknown kinds of question: {sorted(unknown)}")
    return list(weights), list(weights.values())


def _ask_any(
    clip: _Clip,
    rng: random.Random,
    kinds: Sequence[str],
    shares: Sequence[float],
    t: int | None,
) -> Question:
    for _ in range(8):
        question = _ask_sometime(clip, rng.choices(kinds, shares)[0], rng, t)
        if question is not None:
            return question
    moment = rng.randrange(len(clip.times_s)) if t is None else t
    return _count(clip, moment)  # a count always has an answer


def _ask_sometime(clip: _Clip, kind: str, rng: random.Random, t: int | None) -> Question | None:
    """A few moments are tried before a kind is given up, so that rare kinds keep their share."""
    for _ in range(_MOMENTS):
        moment = int(len(clip.times_s) * rng.random() ** _LATER) if t is None else t
        if kind == "count" and t is None:
            moment = _balanced_count_moment(clip, rng)
        question = _MAKERS[kind](clip, moment, rng)
        if question is not None:
            return question
    return None


def _balanced_count_moment(clip: _Clip, rng: random.Random) -> int:
    """A frame, chosen so that each number of things in the clip's course is equally likely."""
    moments: dict[int, list[int]] = {}
    for t, seen in enumerate(clip.visible):
        moments.setdefault(sum(seen), []).append(t)
    # clips with many at once are rare, so a larger number is preferred
    numbers = list(moments)
    number = rng.choices(numbers, [_COUNT_WEIGHTS[n] for n in numbers])[0]
    return rng.choice(moments[number])


_COUNT_WEIGHTS = (1.0, 0.7, 1.3, 2.0, 5.0, 15.0)


def vocabulary() -> list[str]:
    """Texts that hold every word and sign of every question and answer, in every place it can take.

    Numbers (digits) are not all there. A tokenizer must cover these texts as they stand: a word may
    begin a text or follow a space or a sign.
    """
    named = [
        text
        for name in KINDS
        for text in (
            f"Is there a {name} now?",
            f"What colour is the {name}?",
            f"Which way does the {name} move?",
            f"What came first, the {name} or the {name}?",
            f"When did the {name} appear?",
            f"Where is the {name} now?",
            f"Point to the {name}.",
            f'<points coords="0.0 1 000 000">{name}</points>',
            name,
        )
    ]
    coloured = [
        text
        for name in COLOUR_NAMES
        for text in (f"What is the {name} thing?", f"{name} {KINDS[0]}, {name} {KINDS[0]}")
    ]
    others = [
        "What is there now?",
        "How many things are there now?",
        "yes",
        "no",
        "at 0.0 s",
        "by 0.0 s",
        NOT_THERE,
        NOT_SEEN,
        *COUNT_ANSWERS,
    ]
    regions = [region for row in REGIONS for region in row]
    return [*named, *coloured, *others, *DIRECTION_ANSWERS, *regions]
