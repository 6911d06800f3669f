"""What every source of pictures is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from edge_vlm.pixels.frames import Rgb
from edge_vlm_runtime.sources.masking import mask_credentials as mask_credentials


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """rgb u8 [H, W, 3], upright, and its time in seconds from the start of the source."""

    rgb: Rgb
    time_s: float
    age_s: float = 0.0
    """How long before it was handed out the camera saw it, where its clock says so."""


class Source(Protocol):
    name: str
    """For people; credentials are masked."""
    is_live: bool
    max_side: int | None
    """Of the pictures to come; larger ones are scaled down."""

    @property
    def counts(self) -> Counter[str]:
        """What was not shown and why, and what was odd: as `pixels.video.Video.counts`."""

    def pictures(self) -> Iterator[Picture]:
        """Blocks until the next picture. Raises VideoError and its leaves."""

    def close(self) -> None:
        """Makes `pictures` end soon. May be called from another thread, and twice."""
