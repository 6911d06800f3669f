"""Where the things of a scene go: straight paths that stay inside and keep clear of each other.

All lengths are in grid units (1/96 of the picture's side). Shapes: B clips, T frames, M things,
n rows being placed, C candidate paths for each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_vlm.world.splits import BoolArray, IntArray, path_is_heldout
from edge_vlm.world.textures import GRID

DIRECTIONS = ("left", "right", "up", "down", "still")
STILL = DIRECTIONS.index("still")
MIN_SIDE, MAX_SIDE = 23, 30  # sprite sides: 0.24 to 0.31 of the picture
SMALLEST_SIDE = 14  # of the harder world
MIN_SPEED, MAX_SPEED = 5, 12  # per frame
EDGE = 7  # an entering or leaving thing's centre may be this near to the picture's edge

STEPS = np.array([[-1, 0], [1, 0], [0, -1], [0, 1], [0, 0]])
ENTRY_DEPTH = 6  # a thing gliding in starts at most this far beyond EDGE
APART = 0.46  # least distance of two centres along x or y, as a share of the sum of their sides
_START_CELLS = 6
_CANDIDATES = 48
_ROUNDS = 4

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Spans:
    """First frame, frame after the last, and whether the thing moves, each [B, M]."""

    enter: IntArray
    leave: IntArray
    moves: BoolArray


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Chosen paths; ``centre`` f32 [B, T, M, 2] as (x, y), the others [B, M].

    ``placed`` is false for things that are absent or found no room; they enter at T.
    """

    placed: BoolArray
    enter: IntArray
    leave: IntArray
    direction: IntArray
    speed: IntArray
    key: IntArray
    centre: FloatArray


def path_key(
    start: IntArray, direction: IntArray, speed: IntArray, enter: IntArray, leave: IntArray
) -> IntArray:
    """Number of the discretised path: start cell of 6 x 6, direction, speed pair, life span."""
    cell = start * _START_CELLS // GRID
    key = cell[..., 0] * _START_CELLS + cell[..., 1]
    key = key * len(DIRECTIONS) + direction
    key = key * (MAX_SPEED // 2 + 1) + speed // 2
    return (key * 1024 + enter) * 1024 + leave


def place(
    rng: np.random.Generator,
    side: IntArray,
    present: BoolArray,
    spans: Spans,
    num_frames: int,
    heldout: bool,
    apart: FloatArray | None = None,
) -> Paths:
    """Choose for each present thing [B, M] a path of its split that keeps clear of the others.

    ``apart`` [B] replaces `APART`, clip by clip.
    """
    if apart is None:
        apart = np.full(len(present), APART)
    count, slots = present.shape
    placed, enter, now = present.copy(), spans.enter, np.arange(num_frames)
    longest = 1 + (GRID - MAX_SIDE - 2 * EDGE) // MIN_SPEED  # frames a mover can stay inside
    leave = np.where(spans.moves, np.minimum(spans.leave, enter + longest), spans.leave)
    direction = np.full((count, slots), STILL)
    speed, key = np.zeros_like(enter), np.full((count, slots), -1)
    centre = np.zeros((count, num_frames, slots, 2), np.float32)
    for slot in range(slots):
        todo = np.flatnonzero(placed[:, slot])
        for _ in range(_ROUNDS):
            if not len(todo):
                break
            first, last = enter[todo, slot][:, None], leave[todo, slot][:, None]
            heading, pace, corner = _candidates(
                rng, side[todo, slot], spans.moves[todo, slot], first, last, num_frames
            )
            start = corner + side[todo, slot][:, None, None] / 2
            keys = path_key(start.astype(np.int64), heading, pace, first, last)
            fits = path_is_heldout(keys) == heldout
            stride = STEPS[heading] * pace[..., None]
            travel = (now - first)[:, None, :, None] * stride[:, :, None]
            path = start[:, :, None] + travel  # [n, C, T, 2]
            here = (now >= first) & (now < last)
            for other in range(slot):
                both = here & (now >= enter[todo, other][:, None])
                both &= (now < leave[todo, other][:, None]) & placed[todo, other][:, None]
                gap = np.abs(path - centre[todo, :, other][:, None]).max(-1)
                least = apart[todo] * (side[todo, slot] + side[todo, other])
                fits &= ((gap >= least[:, None, None]) | ~both[:, None]).all(-1)
            choice, found = fits.argmax(1), fits.any(1)
            rows, pick = todo[found], (np.flatnonzero(found), choice[found])
            direction[rows, slot], speed[rows, slot] = heading[pick], pace[pick]
            key[rows, slot], centre[rows, :, slot] = keys[pick], path[pick]
            todo = todo[~found]
        placed[todo, slot] = False
    return Paths(
        placed=placed,
        enter=np.where(placed, enter, num_frames),
        leave=np.where(placed, leave, num_frames),
        direction=direction,
        speed=speed,
        key=key,
        centre=centre,
    )


def _candidates(
    rng: np.random.Generator,
    side: IntArray,
    moves: BoolArray,
    first: IntArray,
    last: IntArray,
    num_frames: int,
) -> tuple[IntArray, IntArray, IntArray]:
    """Random paths that stay inside: direction and speed [n, C], first top left corner [n, C, 2].

    Corners are whole grid units, so that pictures of 96 and 192 pixels show the same. A mover that
    enters late glides in from the edge half of the time; one that leaves may go up to the edge.
    """
    shape = (len(side), _CANDIDATES)
    heading = np.where(moves[:, None], rng.integers(4, size=shape), STILL)
    steps = np.broadcast_to(last - first - 1, shape)
    half = side[:, None] // 2
    glides = (first > 0) & (rng.random(shape) < 0.5) & moves[:, None]
    near = np.where(glides, EDGE, half)
    far = np.where((last < num_frames) & moves[:, None], EDGE, half)
    room = GRID - near - far
    fastest = np.minimum(MAX_SPEED, room // np.maximum(steps, 1))
    pace = MIN_SPEED + (rng.random(shape) * (fastest - MIN_SPEED + 1)).astype(np.int64)
    pace = np.where(moves[:, None], np.maximum(pace, MIN_SPEED), 0)
    spare = room - pace * steps
    spare = np.where(glides, np.minimum(spare, ENTRY_DEPTH), spare)
    along = near + (rng.random(shape) * (spare + 1)).astype(np.int64)
    backwards = (heading == 0) | (heading == 2)
    along = np.where(backwards, GRID - along, along)
    across = half + (rng.random(shape) * (GRID - 2 * half + 1)).astype(np.int64)
    horizontal = (heading < 2)[..., None]
    point = np.stack([along, across], -1)
    centre = np.where(horizontal, point, point[..., ::-1])
    return heading, pace, centre - half[..., None]
