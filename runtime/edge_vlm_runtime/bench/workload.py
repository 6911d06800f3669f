"""What is measured: keep ratios, contexts, rates, and the pictures that are shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from edge_vlm.config import ModelConfig
from edge_vlm.errors import ConfigError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.pixels.frames import Rgb
from edge_vlm.pruning.policies import Cells, Scores, top_cells
from edge_vlm.text.prompt import longest_frame

MAX = math.inf
"""As a rate: as fast as it goes."""
PICTURES = 32
"""That are shown in turn."""
QUESTION = "What is there now?"
QUESTION_ROOM = 64
"""Tokens that a question and its opening are allowed."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Everything that shapes a measurement. Raises ValueError naming field and value."""

    keep_ratios: tuple[float, ...] = (1.0, 0.5, 0.3, 0.2)
    """The first is what the others are compared with."""
    contexts: tuple[int, ...] = (0, 64, 512)
    """Tokens in memory when a question comes."""
    rates: tuple[float, ...] = (2.0, 10.0, 30.0, MAX)
    """Frames a second that a live stream is paced to."""
    source: str | None = None
    """A video file in the place of made-up pictures."""
    repeat: int = 5
    """Turns of A B A."""
    samples: int = 20
    """Of each point in a turn."""
    warmups: int = 10
    """Of each point, before the first turn."""
    point_s: float = 4.0
    """A point in a turn takes no more samples after so long, three at least."""
    stream_s: float = 5.0
    """Of each rate."""
    answer_tokens: int = 32
    reuse: float = 0.0
    """Of the streams' sessions; a session's own where that is 0."""
    picture: tuple[int, int] = (640, 480)
    """Width and height of made-up pictures, in pixels."""

    def __post_init__(self) -> None:
        for name in ("keep_ratios", "contexts", "rates"):
            values: tuple[float, ...] = getattr(self, name)
            if len(set(values)) != len(values) or not values:
                raise ValueError(f"{name} {values}: must be one or more, none twice")
        if not all(0 < ratio <= 1 for ratio in self.keep_ratios):
            raise ValueError(f"keep_ratios {self.keep_ratios}: must lie in 0..1, 0 excluded")
        if not all(context >= 0 for context in self.contexts):
            raise ValueError(f"contexts {self.contexts}: must be 0 or more tokens")
        if not all(rate > 0 for rate in self.rates):
            raise ValueError(f"rates {self.rates}: must be positive")
        for name in ("repeat", "samples", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")
        for name in ("point_s", "stream_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)}: must be positive")
        if not 0.0 <= self.reuse <= 255.0:
            raise ValueError(f"reuse {self.reuse}: must lie in 0..255")
        if self.warmups < 0:
            raise ValueError(f"warmups {self.warmups}: must not be negative")

    @property
    def frame_context(self) -> int:
        """Tokens in memory when a frame is prefilled."""
        return sorted(self.contexts)[len(self.contexts) // 2]

    def room(self, cfg: ModelConfig) -> int:
        """Tokens behind a context: a question and its answer, or a whole frame."""
        return max(QUESTION_ROOM + self.answer_tokens, longest_frame(cfg.vision.num_cells))

    def require_fits(self, bundle: EngineBundle) -> None:
        """Raises ConfigError for a context that the model or its graph cannot look back at."""
        most = longest_context(bundle, self)
        for context in self.contexts:
            if context > most:
                raise ConfigError(
                    f"a context of {context} tokens does not fit: with room for a frame, a "
                    f"question and {self.answer_tokens} tokens of an answer this bundle takes "
                    f"{most}",
                    where=bundle.path,
                    remedy=f"take --context 0,{max(most, 0)} or less",
                )

    def to_dict(self) -> dict[str, Any]:
        return {
            "keep_ratios": list(self.keep_ratios),
            "contexts": list(self.contexts),
            "rates": [rate_name(rate) for rate in self.rates],
            "source": "synthetic" if self.source is None else Path(self.source).name,
            "picture": list(self.picture),
            "repeat": self.repeat,
            "samples": self.samples,
            "warmups": self.warmups,
            "point_s": self.point_s,
            "stream_s": self.stream_s,
            "answer_tokens": self.answer_tokens,
            "frame_context": self.frame_context,
            **({"reuse": self.reuse} if self.reuse else {}),
        }


def rate_name(rate: float) -> str:
    return "max" if rate == MAX else f"{rate:g}"


def longest_context(bundle: EngineBundle, workload: Workload) -> int:
    """Tokens behind which a frame, a question and its answer still fit."""
    cfg = bundle.config
    most = min(bundle.specs["llm"].dims["p"].max, cfg.language.max_positions)
    return most - workload.room(cfg)


def cells_at(ratio: float, num_cells: int) -> int:
    """Cells of a frame that keeps this share."""
    return max(1, round(ratio * num_cells))


def notes_on_cells(ratios: Sequence[float], num_cells: int) -> list[str]:
    """What a frame of whole cells cannot keep: the share that it keeps instead."""
    counts = {ratio: cells_at(ratio, num_cells) for ratio in ratios}
    notes = [
        f"keep {ratio:g} is not reached: {count} of {num_cells} cells are {count / num_cells:.3g}"
        for ratio, count in counts.items()
        if abs(count - ratio * num_cells) > 0.5
    ]
    for count in sorted(set(counts.values())):
        alike = [f"{ratio:g}" for ratio, cells in counts.items() if cells == count]
        if len(alike) > 1:
            notes.append(f"keep {', '.join(alike)} are all {count} of {num_cells} cells")
    return notes


class FixedCells:
    """The `count` cells that score highest, of every frame alike: a fixed shape to measure."""

    def __init__(self, count: int) -> None:
        self._count = count

    def reset(self) -> None:
        """Nothing to forget."""

    def select(self, scores: Scores, frame_rgb: Rgb | None, is_first: bool) -> Cells:
        return top_cells(scores, self._count)


def pictures_of(workload: Workload) -> list[Rgb]:
    """What is shown, in turn: of a file its first PICTURES pictures at two a second.

    Raises VideoError and its leaves.
    """
    if workload.source is None:
        return synthetic_pictures(*workload.picture)
    from edge_vlm_runtime.sources.open import open_file

    source = open_file(workload.source, 2.0)
    try:
        return [picture.rgb for picture in islice(source.pictures(), PICTURES)]
    finally:
        source.close()


def synthetic_pictures(width: int, height: int, count: int = PICTURES) -> list[Rgb]:
    """A square that moves over a still ground of soft noise, u8 [height, width, 3] each; the same
    every time."""
    noise = np.random.default_rng(0).integers(96, 160, (height // 8 + 1, width // 8 + 1, 3))
    ground = np.kron(noise, np.ones((8, 8, 1)))[:height, :width].astype(np.uint8)
    side = max(1, min(width, height) // 4)
    found = []
    for index in range(count):
        picture = ground.copy()
        left = (width - side) * index // max(1, count - 1)
        top = (height - side) * ((index * 7) % count) // max(1, count)
        picture[top : top + side, left : left + side] = (220, 40, 40)
        found.append(picture)
    return found


def a_b_a(items: Sequence[Any]) -> list[Any]:
    """The first before and after each of the others: A B A C A D A."""
    first, *others = items
    order = [first]
    for other in others:
        order += [other, first]
    return order
