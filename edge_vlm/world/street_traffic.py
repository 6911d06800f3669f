"""Who comes along a street in one of its minutes, where, for how long and in what colour.

Lengths are in grid units (1/96 of the picture's side), times in steps of half a second from the
street's beginning. As in the clips of the world things keep clear of each other and their corners
are on whole units at whole steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from edge_vlm.world.paths import (
    APART,
    EDGE,
    ENTRY_DEPTH,
    MAX_SIDE,
    MAX_SPEED,
    MIN_SIDE,
    MIN_SPEED,
    STEPS,
    STILL,
)
from edge_vlm.world.scenes import COLOURS
from edge_vlm.world.splits import MOST_THINGS, IntArray
from edge_vlm.world.sprites import KINDS
from edge_vlm.world.textures import GRID

STEP_S = 0.5
MINUTE = 128
"""Steps: 64 seconds."""

_SEED = 40_962
_KINDS, _KEEPER, _TRAFFIC = 0, 1, 2
_BUSY = (3, 7, 11, 15)
"""Visitors in a minute, besides those of whom one is always there."""
_SHORTEST, _LONGEST = 6, 56
"""Steps that a visitor stays."""
_WALKS, _VISITS = 0.4, 0.3
"""Shares of visitors that walk through, and that walk in, stay and walk out; others stand."""
_QUICK = 8
"""Pace at which who walks through is across within the eleven steps that the clips know."""
_TRIES = 30
_PLACES = 300
_PAUSE = 16
"""Steps for which a colour is not worn again, if others are free."""
TELLING = 3
"""Steps that tell which way something moves."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Thing:
    """There from step ``enter`` on, until just before ``leave``."""

    kind: int
    colour: int
    side: int
    enter: int
    track: IntArray
    """Its top left corner as (x, y) at each of its steps and at ``leave``, [steps + 1, 2]."""

    @property
    def leave(self) -> int:
        return self.enter + len(self.track) - 1

    def centre(self, steps: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """At these steps, which need not be whole, as (x, y) [T, 2]; outside its time, at the
        nearest moment of it."""
        own = np.arange(self.enter, self.leave + 1)
        corner = np.stack([np.interp(steps, own, self.track[:, axis]) for axis in (0, 1)], -1)
        return corner + self.side / 2

    def direction(self, step: float) -> int | None:
        """Index into `paths.DIRECTIONS` of how it moved at the last three whole steps; None where
        it was not there for so long, or did not move in one way."""
        last = int(step) - self.enter
        if last < TELLING - 1 or step >= self.leave:
            return None
        moves = np.sign(np.diff(self.track[last - TELLING + 1 : last + 1], axis=0))
        if (moves != moves[0]).any():
            return None
        return int(np.flatnonzero((moves[0] == STEPS).all(1))[0])


def kinds_of(seed: int, minute: int) -> list[int]:
    """Half of all kinds, in some order; the next minute has the others."""
    halves = np.random.default_rng([_SEED, seed, _KINDS]).permutation(len(KINDS))
    half = halves[minute % 2 :: 2]
    rng = np.random.default_rng([_SEED, seed, _KINDS, minute])
    return [int(kind) for kind in rng.permutation(half)]


@lru_cache(maxsize=64)
def keeper(seed: int, minute: int) -> Thing:
    """Who stands there while this minute begins."""
    rng = np.random.default_rng([_SEED, seed, _KEEPER, minute])
    before, after = (int(steps) for steps in rng.integers(6, 25, 2))
    begin = minute * MINUTE
    enter = begin - before if minute else 0
    side = _side(rng)
    return Thing(
        kind=kinds_of(seed, minute)[0],
        colour=int(rng.integers(len(COLOURS))),
        side=side,
        enter=enter,
        track=np.tile(_place(rng, side), (begin + after - enter + 1, 1)),
    )


@lru_cache(maxsize=64)
def traffic(seed: int, minute: int) -> tuple[Thing, ...]:
    """Everybody of this minute: its keeper, who stands there between this one and the next, and
    visitors, all gone before the minute ends."""
    rng = np.random.default_rng([_SEED, seed, _TRAFFIC, minute])
    kinds = iter(kinds_of(seed, minute)[1:])
    there = [keeper(seed, minute), keeper(seed, minute + 1)]
    cuts = np.linspace(there[0].leave, there[1].enter, int(rng.integers(3, 6)))
    cuts[1:-1] += rng.uniform(-5, 5, len(cuts) - 2)
    for enter, leave in zip(cuts[:-1].round().tolist(), cuts[1:].round().tolist(), strict=True):
        enter, leave = (
            int(enter) - int(rng.integers(1, 5)),
            int(leave) + int(rng.integers(1, 5)),
        )
        thing = _visitor(rng, next(kinds), enter, leave - enter, there, _PLACES, stands=True)
        assert thing is not None, "two others at most leave room"
        there.append(thing)
    begin, end = minute * MINUTE, (minute + 1) * MINUTE
    count = int(rng.choice(_BUSY))
    for number in range(count):
        enter = begin + int((number + rng.random()) * MINUTE / count)
        stay = min(int(_SHORTEST * (_LONGEST / _SHORTEST) ** rng.random()), end - enter)
        if stay >= _SHORTEST:
            thing = _visitor(rng, next(kinds), enter, stay, there, _TRIES, end=end)
            if thing is not None:
                there.append(thing)
    return (there[0], *there[2:])


def _visitor(
    rng: np.random.Generator,
    kind: int,
    enter: int,
    stay: int,
    there: list[Thing],
    tries: int,
    *,
    stands: bool = False,
    end: int | None = None,
) -> Thing | None:
    """Somebody who keeps clear of the others and is gone at ``end``; None where that is not found,
    or no colour."""
    for _ in range(tries):
        side = _side(rng)
        manner = 1.0 if stands else rng.random()
        if manner < _WALKS:
            track = _walk(rng, side)
        elif manner < _WALKS + _VISITS:
            track = _visit(rng, side, stay)
        else:
            track = np.tile(_place(rng, side), (stay + 1, 1))
        leave = enter + len(track) - 1
        if end is not None and leave > end:
            continue
        colour = _colour(rng, there, enter, leave)
        if colour is None:
            return None
        thing = Thing(kind=kind, colour=colour, side=side, enter=enter, track=track)
        if all(_is_clear(thing, other) for other in there) and _is_bearable(thing, there):
            return thing
    return None


def _side(rng: np.random.Generator) -> int:
    return int(rng.integers(MIN_SIDE, MAX_SIDE + 1))


def _place(rng: np.random.Generator, side: int) -> IntArray:
    """A corner for something that stands."""
    return rng.integers(0, GRID - 2 * (side // 2) + 1, 2)


def _walk(rng: np.random.Generator, side: int) -> IntArray:
    """From one edge to the opposite one."""
    heading, pace = int(rng.integers(STILL)), int(rng.integers(_QUICK, MAX_SPEED + 1))
    start = _entry(rng, side, heading)
    return _straight(start, heading, pace, _steps_to_edge(start, side, heading, pace) + 1)


def _visit(rng: np.random.Generator, side: int, stay: int) -> IntArray:
    """In from an edge, a stop, and out by the edge that is nearest straight on or back."""
    heading, pace = int(rng.integers(STILL)), int(rng.integers(MIN_SPEED, MAX_SPEED + 1))
    start = _entry(rng, side, heading)
    inside = int(rng.integers(3, 6))
    way_in = _straight(start, heading, pace, inside)
    stop = way_in[-1]
    out = min((heading, heading ^ 1), key=lambda each: _steps_to_edge(stop, side, each, pace))
    way_out = _straight(stop, out, pace, _steps_to_edge(stop, side, out, pace) + 1)
    return np.concatenate([way_in[:-1], np.tile(stop, (stay, 1)), way_out])


def _entry(rng: np.random.Generator, side: int, heading: int) -> IntArray:
    """The corner at which something that goes this way comes in."""
    half = side // 2
    along = EDGE + int(rng.integers(ENTRY_DEPTH + 1))
    along = along if STEPS[heading].sum() > 0 else GRID - along
    across = half + int(rng.integers(GRID - 2 * half + 1))
    centre = (along, across) if heading < 2 else (across, along)
    return np.array(centre) - half


def _straight(start: IntArray, heading: int, pace: int, steps: int) -> IntArray:
    """[steps + 1, 2]"""
    way: IntArray = start + np.arange(steps + 1)[:, None] * STEPS[heading] * pace
    return way


def _steps_to_edge(corner: IntArray, side: int, heading: int, pace: int) -> int:
    """For how many its centre stays at least EDGE inside."""
    centre = int((corner + side // 2)[0 if heading < 2 else 1])
    way = GRID - centre if STEPS[heading].sum() > 0 else centre
    return max(0, (way - EDGE) // pace)


def _colour(rng: np.random.Generator, there: list[Thing], enter: int, leave: int) -> int | None:
    """One that nobody wears at that time, nor a while before and behind it if there is one."""
    for pause in (_PAUSE, 0):
        worn = {
            each.colour
            for each in there
            if each.enter < leave + pause and each.leave > enter - pause
        }
        free = [colour for colour in range(len(COLOURS)) if colour not in worn]
        if free:
            return int(rng.choice(free))
    return None


def _is_clear(one: Thing, other: Thing) -> bool:
    first, last = max(one.enter, other.enter), min(one.leave, other.leave)
    if first >= last:
        return True
    steps = np.arange(first, last)
    ours, theirs = (each.track[steps - each.enter] + each.side / 2 for each in (one, other))
    gap = np.abs(ours - theirs).max(-1)
    return bool((gap >= APART * (one.side + other.side)).all())


def _is_bearable(thing: Thing, there: list[Thing]) -> bool:
    """No more at once than a clip has."""
    steps = np.arange(thing.enter, thing.leave)
    count = sum(((steps >= each.enter) & (steps < each.leave)).astype(int) for each in there)
    return int(np.max(count)) < MOST_THINGS
