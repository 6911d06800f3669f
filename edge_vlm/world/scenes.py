"""Scenes of the rendered world: which things are where, when, in what colour. No pictures here.

A scene is a short clip of one to five named, coloured things that enter, leave, move and change
colour over a cluttered background. ``sampling`` makes scenes, ``render`` draws them, ``questions``
asks about them.

Train and held-out scenes share neither seeds nor (kind, background) pairs nor paths (``splits``).

Shapes: B clips, T frames, M things per clip (absent ones have kind -1).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from edge_vlm.world.paths import FloatArray
from edge_vlm.world.splits import MOST_THINGS, SEED_SPACE, BoolArray, IntArray, Split

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
UNCLEAR = -1
"""A direction that cannot be told from what is seen."""
_HARDER = ("small", "brief", "overlapping", "night", "panning", "cuts")


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """What clips look like. ``num_frames`` >= 1, ``fps`` > 0, 1 <= ``max_objects`` <= 5.

    ``crowded`` is the share of clips that have ``max_objects`` things whatever was drawn, and
    ``gathering`` that of clips where all have come by half-time, stand still and stay: elsewhere
    many things are hardly ever there at once.

    The last six are shares of what makes the `harder` world: small things, things that soon leave,
    clips in which things may hide one another, dark ones, and clips whose camera turns or is cut to
    another place.
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
    small: float = 0.0
    brief: float = 0.0
    overlapping: float = 0.0
    night: float = 0.0
    panning: float = 0.0
    cuts: float = 0.0

    @property
    def is_harder(self) -> bool:
        return any(getattr(self, name) for name in _HARDER)

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
            *_HARDER,
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """A batch of clips as numpy arrays; positions and sizes are shares of the picture's side.

    ``x``, ``y`` are centres of the unshaken picture, also given for frames where the thing is not
    there. ``enter`` is the first visible frame, ``leave`` the first frame after it in which the
    thing is gone (T if it stays). ``direction`` indexes paths.DIRECTIONS or is UNCLEAR, ``speed``
    is per frame.
    """

    kind: IntArray  # [B, M] index into KINDS, -1 if the clip has fewer things
    colour: IntArray  # [B, T, M] index into COLOUR_NAMES
    x: FloatArray  # [B, T, M]
    y: FloatArray  # [B, T, M]
    size: FloatArray  # [B, M] side of the sprite's square
    visible: BoolArray  # [B, T, M]
    enter: IntArray  # [B, M]
    leave: IntArray  # [B, M]
    direction: IntArray  # [B, T, M]
    speed: FloatArray  # [B, M]
    path_key: IntArray  # [B, M] the discretised path that decides the split
    background: IntArray  # [B, T]
    shake: FloatArray  # [B, T, 2] shift of the whole picture, x then y
    pan: FloatArray  # [B, T, 2] shift of the background alone: the camera has turned
    noise_sd: FloatArray  # [B] in grey levels of 255
    noise_key: IntArray  # [B, T] which noise picture, 0 .. NOISE_KEYS - 1
    brightness: FloatArray  # [B, T] factor
    times_s: FloatArray  # [B, T] time stamps in seconds
    told: BoolArray  # [B, M] whether the frames tell when it came

    BY_THING: ClassVar = frozenset(
        {
            *("kind", "colour", "x", "y", "size", "visible", "enter", "leave", "direction"),
            *("speed", "path_key", "told"),
        }
    )
    """Fields whose last dimension is M."""
    BY_FRAME: ClassVar = frozenset(
        {"background", "shake", "pan", "noise_key", "brightness", "times_s"}
    )
    """Fields of frames and of no thing: [B, T] or [B, T, 2]."""

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def num_frames(self) -> int:
        return int(self.visible.shape[1])

    def select(self, clips: npt.NDArray[np.integer] | slice) -> Scenes:
        """The chosen clips only."""
        return Scenes(**{f.name: getattr(self, f.name)[clips] for f in fields(self)})
