"""How large a picture a receiver takes. Finding out costs pictures, never an alert."""

from __future__ import annotations

import asyncio
import logging

from edge_vlm.errors import FrameDecodeError
from edge_vlm.pixels.frames import shrink_jpeg
from edge_vlm_runtime.alert_sinks.evidence import EvidenceSize

log = logging.getLogger(__name__)

STEPS_BYTES = (64_000, 4_000)
"""Tried one after the other where the receiver does not say what it takes, then none. The first
fits into what cloud brokers take (128 kB), also in base64."""


CHOSEN_BYTES = {EvidenceSize.NONE: 0, EvidenceSize.SMALL: 16_000, EvidenceSize.FULL: None}


class PictureLimit:
    """Of one receiver, for as long as the process runs."""

    def __init__(self, receiver: str, evidence: EvidenceSize = EvidenceSize.FULL) -> None:
        self._receiver = receiver
        self._chosen_bytes = CHOSEN_BYTES[evidence]
        self._most_bytes: int | None = None
        self._reported: set[str] = set()

    def announced(self, num_bytes: int | None) -> None:
        """The receiver has said what it takes; None: it has no limit."""
        self._most_bytes = num_bytes

    def refused(self, num_bytes: int) -> None:
        """A picture of this size was not taken: the next one will be smaller, or none."""
        self._most_bytes = next((step for step in STEPS_BYTES if step < num_bytes), 0)

    async def fit(self, jpeg: bytes | None) -> bytes | None:
        """The picture, a smaller copy, or None if there is no room for one."""
        limits = [most for most in (self._chosen_bytes, self._most_bytes) if most is not None]
        if jpeg is None or not limits or len(jpeg) <= min(limits):
            return jpeg
        if min(limits) <= 0:
            return None
        try:  # takes a while, and other receivers must not wait for it
            smaller = await asyncio.to_thread(shrink_jpeg, jpeg, min(limits))
        except FrameDecodeError:
            return None
        return smaller if len(smaller) <= min(limits) else None

    def delivered(self, jpeg: bytes | None, sent: bytes | None) -> None:
        """Says once that pictures go out smaller, and once that they are left out."""
        most = self._most_bytes
        if (
            jpeg is None
            or sent is jpeg
            or most is None
            or most >= (self._chosen_bytes or len(jpeg))
        ):
            return  # all is as it was chosen
        outcome = "left out" if sent is None else "sent smaller"
        if outcome not in self._reported:
            self._reported.add(outcome)
            text = "%s does not take pictures of %d bytes: they are %s"
            log.warning(text, self._receiver, len(jpeg), outcome)
