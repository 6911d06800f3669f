"""Scenes of the rendered world: which things are where, when, in what colour. No pictures here.

A scene is a short clip of one to five named, coloured things that enter, leave, move and change
colour over a cluttered background. ``render`` draws scenes, ``questions`` asks about them.

Train and held-out scenes share neither seeds nor (kind, background) pairs nor paths (``splits``).

Shapes: B clips, T frames, M things per clip (absent ones have kind -1).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_vlm_training.world.backgrounds import GRID
from edge_vlm_training.world.paths import MAX_SIDE, MIN_SIDE, FloatArray, Spans, place
from edge_vlm_training.world.splits import (
    MOST_THINGS,
    SEED_SPACE,
    BoolArray,
    IntArray,
    Split,
    allowed_pairs,
)
from edge_vlm_training.world.sprites import KINDS

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
NOISE_KEYS = 4096


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """What clips look like. ``num_frames`` >= 1, ``fps`` > 0, 1 <= ``max_objects`` <= 5.

    ``crowded`` is the share of clips that have ``max_objects`` things whatever was drawn, and
    ``gathering`` that of clips where all have come by half-time, stand still and stay: elsewhere
    many things are hardly ever there at once.
    Raises ValueError naming the field for values outside these ranges.
    """

    num_frames: int = 16
    fps: float = 2.0
    max_objects: int = MOST_THINGS
    split: Split = "train"
    late_entry: float = 0.55
    early_leave: float = 0.35
    moving: float = 0.5
    crowded: float = 0.0
    gathering: float = 0.2
    colour_change: float = 0.12
    start_at_zero: float = 0.6
    max_start_s: float = 50.0

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {self.num_frames}")
        if not self.fps > 0:
            raise ValueError(f"fps must be positive, got {self.fps}")
        if not 1 <= self.max_objects <= MOST_THINGS:
            raise ValueError(f"max_objects must lie in 1..{MOST_THINGS}, got {self.max_objects}")
        if self.split not in SEED_SPACE:
            raise ValueError(f"split must be 'train' or 'heldout', got {self.split!r}")
        for name in (
            "late_entry",
            "early_leave",
            "moving",
            "crowded",
            "gathering",
            "colour_change",
            "start_at_zero",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """A batch of clips as numpy arrays; positions and sizes are shares of the picture's side.

    ``x``, ``y`` are centres of the unshaken picture, also given for frames where the thing is not
    there. ``enter`` is the first visible frame, ``leave`` the first frame after it in which the
    thing is gone (T if it stays). ``direction`` indexes paths.DIRECTIONS, ``speed`` is per frame.
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
        return int(self.visible.shape[1])

    def times_s(self) -> FloatArray:
        """Time stamp of every frame, f32 [B, T] in seconds."""
        steps = np.arange(self.num_frames, dtype=np.float32) / np.float32(self.fps)
        return self.start_s[:, None] + steps

    def select(self, clips: npt.NDArray[np.integer] | slice) -> Scenes:
        """The chosen clips only."""
        arrays = {f.name: getattr(self, f.name)[clips] for f in fields(self) if f.name != "fps"}
        return replace(self, **arrays)


def sample_scenes(seed: int, count: int, cfg: WorldConfig) -> Scenes:
    """``count`` clips, a function of (seed, count, cfg) only; the splits' seeds are unrelated.

    Raises ValueError for a negative seed.
    """
    rng = np.random.default_rng([SEED_SPACE[cfg.split], seed])
    frames, slots = cfg.num_frames, cfg.max_objects
    allowed, backgrounds = allowed_pairs(cfg.split)
    background = backgrounds[rng.integers(len(backgrounds), size=count)]
    ranks = np.where(allowed[background], rng.random((count, len(KINDS))), 2.0)
    kind = np.argsort(ranks, axis=1)[:, :slots]
    wanted = rng.integers(1, slots + 1, size=count)
    if cfg.crowded:
        wanted = np.where(rng.random(count) < cfg.crowded, slots, wanted)
    kind[np.arange(slots) >= wanted[:, None]] = -1

    side = rng.integers(MIN_SIDE, MAX_SIDE + 1, size=(count, slots))
    spans = _sample_spans(rng, count, cfg)
    paths = place(rng, side, kind >= 0, spans, frames, cfg.split == "heldout")
    kind, enter, leave = np.where(paths.placed, kind, -1), paths.enter, paths.leave
    now = np.arange(frames)[:, None]
    visible = (kind >= 0)[:, None] & (now >= enter[:, None]) & (now < leave[:, None])

    # all first and later colours of a clip differ, so they are distinct at every moment
    palette = np.argsort(rng.random((count, len(COLOURS))), axis=1)
    later = np.arange(slots, 2 * slots)
    changes = (rng.random((count, slots)) < cfg.colour_change) & (leave - enter >= 2)
    changes &= later < len(COLOURS)  # of five things only three find a free colour to change to
    change_at = enter + 1 + (rng.random((count, slots)) * (leave - enter - 1)).astype(np.int64)
    changed = changes[:, None] & (now >= change_at[:, None])
    free = palette[:, np.minimum(later, len(COLOURS) - 1)]
    colour = np.where(changed, free[:, None], palette[:, None, :slots])

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
    arrays: dict[str, Any] = {
        n: np.take_along_axis(getattr(scenes, n), order, 1) for n in per_thing
    }
    for name in ("colour", "x", "y", "visible"):
        arrays[name] = np.take_along_axis(getattr(scenes, name), order[:, None], 2)
    return replace(scenes, **arrays)


def _sample_spans(rng: np.random.Generator, count: int, cfg: WorldConfig) -> Spans:
    """Life spans as ``cfg`` wants them; nothing stays for less than two frames of a longer clip."""
    frames, shape = cfg.num_frames, (count, cfg.max_objects)
    moves = (rng.random(shape) < cfg.moving) & (frames > 1)
    late = (rng.random(shape) < cfg.late_entry) & (frames > 1)
    enter = np.where(late, rng.integers(1, max(2, frames - 1), size=shape), 0)
    leaves = (rng.random(shape) < cfg.early_leave) & (enter + 2 < frames)
    gathers = (rng.random(count) < cfg.gathering)[:, None]
    enter, moves, leaves = np.where(gathers, enter // 2, enter), moves & ~gathers, leaves & ~gathers
    length = 2 + (rng.random(shape) * (frames - enter - 2)).astype(np.int64)
    return Spans(enter=enter, leave=np.where(leaves, enter + length, frames), moves=moves)
