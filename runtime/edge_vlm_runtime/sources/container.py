"""What every source of pictures is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from edge_vlm.pixels.frames import Rgb

CREDENTIALS = re.compile(r"(\w+://)\S*@")


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """rgb u8 [H, W, 3] and its time in seconds from the start of the source."""

    rgb: Rgb
    time_s: float


class Source(Protocol):
    name: str
    """For people; credentials are masked."""
    is_live: bool

    def pictures(self) -> Iterator[Picture]:
        """Blocks until the next picture. Raises VideoError and its leaves."""

    def close(self) -> None:
        """Makes `pictures` end soon. May be called from another thread, and twice."""


def mask_credentials(text: str) -> str:
    """User and password of any URL in `text` become ***."""
    return CREDENTIALS.sub(r"\1***@", text)
