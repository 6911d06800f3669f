"""Scenes of the rendered world: which things are where, when, in what colour. No pictures here.

A scene is a short clip of one to three named, coloured things that enter, leave, move and change
colour over a cluttered background. ``render`` draws scenes, ``questions`` asks about them.

Train and held-out scenes share neither seeds nor (kind, background) pairs nor paths: pairs and paths
are hashed, and one hash in five belongs to the held-out side only.

Shapes: B clips, T frames, M things per clip (absent ones have kind -1).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from edge_vlm_training.backgrounds import GRID, NUM_BACKGROUNDS
from edge_vlm_training.sprites import KINDS

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 28, 36),
    "orange": (255, 128, 0),
    "yellow": (250, 232, 30),
    "green": (30, 190, 50),
    "blue": (40, 90, 255),
    "purple": (150, 45, 225),
    "pink": (255, 120, 200),
    "white": (250, 250, 250),
}
COLOUR_NAMES = tuple(COLOURS)
DIRECTIONS = ("left", "right", "up", "down", "still")
STILL = DIRECTIONS.index("still")
_STEP = np.array([[-1, 0], [1, 0], [0, -1], [0, 1], [0, 0]])

MIN_SIDE, MAX_SIDE = 23, 30  # sprite sides in 1/96 of the picture: 0.24 to 0.31
MIN_SPEED, MAX_SPEED = 5, 12  # grid units per frame
EDGE = 7  # an entering or leaving thing's centre may be this near to the picture's edge
NOISE_KEYS = 4096

Split = Literal["train", "heldout"]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

_SEED_SPACE = {"train": 1, "heldout": 2}
_HELDOUT_SHARE = 5
_PAIR_SALT, _PATH_SALT = 0x5EED_0001, 0x5EED_0002
_START_CELLS = 6
_CANDIDATES = 48
_ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """What clips look like. ``num_frames`` >= 1, ``fps`` > 0, 1 <= ``max_objects`` <= 3.

    Raises ValueError naming the field for values outside these ranges.
    """

    num_frames: int = 8
    fps: float = 2.0
    max_objects: int = 3
    split: Split = "train"
    late_entry: float = 0.55
    early_leave: float = 0.35
    moving: float = 0.6
    colour_change: float = 0.12
    start_at_zero: float = 0.6
    max_start_s: float = 50.0

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {self.num_frames}")
        if not self.fps > 0:
            raise ValueError(f"fps must be positive, got {self.fps}")
        if not 1 <= self.max_objects <= 3:
            raise ValueError(f"max_objects must be 1, 2 or 3, got {self.max_objects}")
        if self.split not in _SEED_SPACE:
            raise ValueError(f"split must be 'train' or 'heldout', got {self.split!r}")
        for name in ("late_entry", "early_leave", "moving", "colour_change", "start_at_zero"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """A batch of clips as numpy arrays; positions and sizes are shares of the picture's side.

    ``x``, ``y`` are centres of the unshaken picture, also given for frames where the thing is not
    there. ``enter`` is the first visible frame, ``leave`` the first frame after it in which the thing
    is gone (T if it stays). ``direction`` indexes DIRECTIONS, ``speed`` is per frame.
    """

    kind: IntArray  # [B, M] index into KINDS, -1 if the clip has fewer things
    colour: IntArray  # [B, T, M] index into COLOUR_NAMES
    x: FloatArray  # [B, T, M]
    y: FloatArray  # [B, T, M]
    size: FloatArray  # [B, M] side of the sprite's square
    visible: BoolArray  # [B, T, M]
    enter: IntArray  # [B, M]
    leave: IntArray  # [B, M]
    direction: IntArray  # [B, M]
    speed: FloatArray  # [B, M]
    path_key: IntArray  # [B, M] the discretised path that decides the split
    background: IntArray  # [B]
    shake: FloatArray  # [B, T, 2] shift of the whole picture, x then y
    noise_sd: FloatArray  # [B] in grey levels of 255
    noise_key: IntArray  # [B, T] which noise picture, 0 .. NOISE_KEYS - 1
    brightness: FloatArray  # [B, T] factor
    start_s: FloatArray  # [B] time of frame 0
    fps: float

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def num_frames(self) -> int:
        return self.visible.shape[1]

    def times_s(self) -> FloatArray:
        """Time stamp of every frame, f32 [B, T] in seconds."""
        steps = np.arange(self.num_frames, dtype=np.float32) / np.float32(self.fps)
        return self.start_s[:, None] + steps

    def select(self, clips: npt.NDArray[np.integer] | slice) -> Scenes:
        """The chosen clips only."""
        arrays = {f.name: getattr(self, f.name)[clips] for f in fields(self) if f.name != "fps"}
        return replace(self, **arrays)


def _mix(value: npt.NDArray[np.integer], salt: int) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser: neighbouring numbers get unrelated hashes."""
    with np.errstate(over="ignore"):
        z = value.astype(np.uint64) + np.uint64(salt) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def pair_is_heldout(kind: npt.ArrayLike, background: npt.ArrayLike) -> BoolArray:
    """Whether this kind on this background is shown in held-out clips only (arrays broadcast)."""
    pair = np.asarray(background, np.int64) * len(KINDS) + np.asarray(kind, np.int64)
    return _mix(pair, _PAIR_SALT) % np.uint64(_HELDOUT_SHARE) == 0


def path_is_heldout(path_key: npt.ArrayLike) -> BoolArray:
    """Whether things follow this discretised path in held-out clips only."""
    return _mix(np.asarray(path_key, np.int64), _PATH_SALT) % np.uint64(_HELDOUT_SHARE) == 0


@lru_cache(maxsize=2)
def _allowed_pairs(split: Split) -> tuple[BoolArray, IntArray]:
    """Pairs of this split, bool [backgrounds, kinds], and the backgrounds with at least 3 kinds."""
    heldout = pair_is_heldout(np.arange(len(KINDS)), np.arange(NUM_BACKGROUNDS)[:, None])
    allowed = heldout if split == "heldout" else ~heldout
    return allowed, np.flatnonzero(allowed.sum(1) >= 3)


def _path_key(
    start: IntArray, direction: IntArray, speed: IntArray, enter: IntArray, leave: IntArray
) -> IntArray:
    """Number of the discretised path: start cell of 6 x 6, direction, speed pair, life span."""
    cell = start * _START_CELLS // GRID
    key = cell[..., 0] * _START_CELLS + cell[..., 1]
    key = key * len(DIRECTIONS) + direction
    key = key * (MAX_SPEED // 2 + 1) + speed // 2
    return (key * 1024 + enter) * 1024 + leave


def sample_scenes(seed: int, count: int, cfg: WorldConfig) -> Scenes:
    """``count`` clips, a pure function of (seed, count, cfg); seeds of the two splits are unrelated."""
    rng = np.random.default_rng([_SEED_SPACE[cfg.split], seed])
    frames, slots = cfg.num_frames, cfg.max_objects
    allowed, backgrounds = _allowed_pairs(cfg.split)
    background = backgrounds[rng.integers(len(backgrounds), size=count)]
    ranks = np.where(allowed[background], rng.random((count, len(KINDS))), 2.0)
    kind = np.argsort(ranks, axis=1)[:, :slots]
    wanted = rng.integers(1, slots + 1, size=count)
    kind[np.arange(slots) >= wanted[:, None]] = -1

    side = rng.integers(MIN_SIDE, MAX_SIDE + 1, size=(count, slots))
    spans = _sample_spans(rng, count, cfg)
    paths = _place(rng, side, kind, *spans, cfg)
    kind, enter, leave = paths.kind, paths.enter, paths.leave
    now = np.arange(frames)[:, None]
    visible = (kind >= 0)[:, None] & (now >= enter[:, None]) & (now < leave[:, None])

    # all first and later colours of a clip differ, so they are distinct at every moment
    palette = np.argsort(rng.random((count, len(COLOURS))), axis=1)
    changes = (rng.random((count, slots)) < cfg.colour_change) & (leave - enter >= 2)
    change_at = enter + 1 + (rng.random((count, slots)) * (leave - enter - 1)).astype(np.int64)
    changed = changes[:, None] & (now >= change_at[:, None])
    colour = np.where(changed, palette[:, None, slots : 2 * slots], palette[:, None, :slots])

    shaken = rng.random((count, frames, 1)) < 0.5
    shake = rng.integers(-1, 2, size=(count, frames, 2)) * shaken
    half_seconds = rng.integers(1, max(2, int(cfg.max_start_s * 2) + 1), size=count)
    starts = np.where(rng.random(count) < cfg.start_at_zero, 0, half_seconds) * 0.5
    order = np.argsort(rng.random((count, slots)), axis=1)  # placing order must not show
    centre = paths.centre / GRID
    scenes = Scenes(
        kind=kind,
        colour=colour,
        x=centre[..., 0].astype(np.float32),
        y=centre[..., 1].astype(np.float32),
        size=(side / GRID).astype(np.float32),
        visible=visible,
        enter=enter,
        leave=leave,
        direction=paths.direction,
        speed=(paths.speed / GRID).astype(np.float32),
        path_key=paths.key,
        background=background,
        shake=(shake / GRID).astype(np.float32),
        noise_sd=rng.uniform(2.5, 5.5, size=count).astype(np.float32),
        noise_key=rng.integers(NOISE_KEYS, size=(count, frames)),
        brightness=rng.uniform(0.96, 1.04, size=(count, frames)).astype(np.float32),
        start_s=starts.astype(np.float32),
        fps=cfg.fps,
    )
    return _reorder(scenes, order)


def _reorder(scenes: Scenes, order: IntArray) -> Scenes:
    """The same scenes with things numbered anew; ``order`` is [B, M]."""
    per_thing = ("kind", "size", "enter", "leave", "direction", "speed", "path_key")
    arrays = {n: np.take_along_axis(getattr(scenes, n), order, 1) for n in per_thing}
    for name in ("colour", "x", "y", "visible"):
        arrays[name] = np.take_along_axis(getattr(scenes, name), order[:, None], 2)
    return replace(scenes, **arrays)


def _sample_spans(
    rng: np.random.Generator, count: int, cfg: WorldConfig
) -> tuple[BoolArray, IntArray, IntArray]:
    """Whether each thing moves, its first frame and the frame after its last, all [B, M]."""
    frames, shape = cfg.num_frames, (count, cfg.max_objects)
    moves = (rng.random(shape) < cfg.moving) & (frames > 1)
    late = (rng.random(shape) < cfg.late_entry) & (frames > 1)
    enter = np.where(late, rng.integers(1, max(2, frames - 1), size=shape), 0)
    leaves = (rng.random(shape) < cfg.early_leave) & (enter + 2 < frames)
    length = 2 + (rng.random(shape) * (frames - enter - 2)).astype(np.int64)
    return moves, enter, np.where(leaves, enter + length, frames)


@dataclass(frozen=True, kw_only=True)
class _Paths:
    """Chosen paths; ``centre`` [B, T, M, 2] in grid units, the others [B, M]."""

    kind: IntArray
    enter: IntArray
    leave: IntArray
    direction: IntArray
    speed: IntArray
    key: IntArray
    centre: FloatArray


def _place(
    rng: np.random.Generator,
    side: IntArray,
    kind: IntArray,
    moves: BoolArray,
    enter: IntArray,
    leave: IntArray,
    cfg: WorldConfig,
) -> _Paths:
    """Choose a path for each thing that keeps clear of the others; drop the few that find none."""
    count, slots = kind.shape
    frames = cfg.num_frames
    kind, leave = kind.copy(), leave.copy()
    longest = 1 + (GRID - MAX_SIDE - 2 * EDGE) // MIN_SPEED  # frames a mover can cross the picture
    leave = np.where(moves, np.minimum(leave, enter + longest), leave)
    now = np.arange(frames)
    direction = np.full((count, slots), STILL)
    speed, key = np.zeros_like(kind), np.zeros_like(kind)
    centre = np.zeros((count, frames, slots, 2), np.float32)
    for slot in range(slots):
        todo = np.flatnonzero(kind[:, slot] >= 0)
        for _ in range(_ROUNDS):
            if not len(todo):
                break
            first, last = enter[todo, slot][:, None], leave[todo, slot][:, None]
            heading, pace, corner = _candidates(
                rng, side[todo, slot], moves[todo, slot], first, last, frames
            )
            start = corner + side[todo, slot][:, None, None] / 2
            keys = _path_key(start.astype(np.int64), heading, pace, first, last)
            fits = path_is_heldout(keys) == (cfg.split == "heldout")
            travel = (now - first)[:, None, :, None] * (_STEP[heading] * pace[..., None])[
                :, :, None
            ]
            path = start[:, :, None] + travel  # [n, candidates, T, 2]
            here = (now >= first) & (now < last)
            for other in range(slot):
                both = here & (now >= enter[todo, other][:, None])
                both &= (now < leave[todo, other][:, None]) & (kind[todo, other] >= 0)[:, None]
                gap = np.abs(path - centre[todo, :, other][:, None]).max(-1)
                apart = 0.46 * (side[todo, slot] + side[todo, other])[:, None, None]
                fits &= ((gap >= apart) | ~both[:, None]).all(-1)
            choice, found = fits.argmax(1), fits.any(1)
            rows, pick = todo[found], (np.flatnonzero(found), choice[found])
            direction[rows, slot], speed[rows, slot] = heading[pick], pace[pick]
            key[rows, slot], centre[rows, :, slot] = keys[pick], path[pick]
            todo = todo[~found]
        kind[todo, slot] = -1
    absent = kind < 0
    return _Paths(
        kind=kind,
        enter=np.where(absent, frames, enter),
        leave=np.where(absent, frames, leave),
        direction=np.where(absent, STILL, direction),
        speed=speed,
        key=np.where(absent, -1, key),
        centre=centre,
    )


def _candidates(
    rng: np.random.Generator,
    side: IntArray,
    moves: BoolArray,
    first: IntArray,
    last: IntArray,
    frames: int,
) -> tuple[IntArray, IntArray, IntArray]:
    """Random paths that stay inside: direction [n, C], speed [n, C], first top left corner [n, C, 2].

    Corners are whole grid units, so that pictures of 96 and 192 pixels show the same. A mover that
    enters late glides in from the edge half of the time; one that leaves may go up to the edge.
    """
    shape = (len(side), _CANDIDATES)
    # each path pair (left and right, say) is equally likely whatever the overlap test rejects
    heading = np.where(moves[:, None], rng.integers(4, size=shape), STILL)
    steps = np.broadcast_to(last - first - 1, shape)
    half = side[:, None] // 2
    glides = (first > 0) & (rng.random(shape) < 0.5) & moves[:, None]
    near = np.where(glides, EDGE, half)
    far = np.where((last < frames) & moves[:, None], EDGE, half)
    room = GRID - near - far
    fastest = np.minimum(MAX_SPEED, room // np.maximum(steps, 1))
    pace = MIN_SPEED + (rng.random(shape) * (fastest - MIN_SPEED + 1)).astype(np.int64)
    pace = np.where(moves[:, None], np.maximum(pace, MIN_SPEED), 0)
    spare = room - pace * steps
    spare = np.where(
        glides, np.minimum(spare, 6), spare
    )  # it comes in at the edge, not in mid-picture
    along = near + (rng.random(shape) * (spare + 1)).astype(np.int64)
    backwards = (heading == 0) | (heading == 2)
    along = np.where(backwards, GRID - along, along)
    across = half + (rng.random(shape) * (GRID - 2 * half + 1)).astype(np.int64)
    horizontal = (heading < 2)[..., None]
    place = np.stack([along, across], -1)
    centre = np.where(horizontal, place, place[..., ::-1])
    return heading, pace, centre - half[..., None]
