"""What a connection may send and when: websocket frames, cut out of the bytes that came, and an
allowance for them. No I/O, no library; the clock is an argument.

A frame of eight bytes costs as much to parse as one of a megabyte, and there are ten thousands of
them in what a socket hands over at once: so frames are counted before they are parsed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

TEXT, PING = 0x1, 0x9
"""RFC 6455, 11.8: kinds of frames that are told apart here."""
BURST_S = 0.25
"""So much of a connection's messages may come at once."""
TEXT_BYTES = 1 << 14
"""A text costs one message more for each so many bytes: all of it is parsed."""


class FrameHead(NamedTuple):
    opcode: int
    payload_bytes: int

    @property
    def cost(self) -> float:
        """In messages."""
        return 1.0 + (self.payload_bytes / TEXT_BYTES if self.opcode <= TEXT else 0.0)


class FrameCutter:
    """Cuts a stream of bytes where one frame ends and the next one begins."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._left = 0
        """Bytes to come of the frame that was begun."""

    def push(self, data: bytes) -> None:
        self._bytes += data

    @property
    def num_bytes(self) -> int:
        """That wait."""
        return len(self._bytes)

    @property
    def head(self) -> FrameHead | None:
        """Of the frame that begins here; None inside of one, and before its head is whole."""
        return None if self._left or (found := self._parsed()) is None else found[0]

    def _parsed(self) -> tuple[FrameHead, int] | None:
        """And the bytes of the frame with its head."""
        data = self._bytes
        if len(data) < 2:
            return None
        length, place = data[1] & 0x7F, 2
        if length > 125:
            place = 4 if length == 126 else 10
            if len(data) < place:
                return None
            length = int.from_bytes(data[2:place], "big")
        masked = 4 if data[1] & 0x80 else 0
        return FrameHead(data[0] & 0x0F, length), place + masked + length

    def cut(self) -> bytes:
        """What is there of one frame; b"" when there is nothing to hand on."""
        if not self._left:
            found = self._parsed()
            if found is None:
                return b""
            self._left = found[1]
        piece = bytes(self._bytes[: self._left])
        del self._bytes[: self._left]
        self._left -= len(piece)
        return piece


class Allowance:
    """So many messages a second, and those of BURST_S at once.

    One may be taken as long as any is left: what a dear one costs beyond that is owed.
    """

    def __init__(self, per_s: float, clock_s: Callable[[], float]) -> None:
        self._per_s = per_s
        self._clock_s = clock_s
        self._most = max(1.0, BURST_S * per_s)
        self._left = self._most
        self._at_s = clock_s()

    def take(self, cost: float) -> bool:
        now_s = self._clock_s()
        self._left = min(self._most, self._left + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        if self._left <= 0.0:
            return False
        self._left -= cost
        return True

    @property
    def wait_s(self) -> float:
        """Until one may be taken that was refused."""
        return max(0.0, -self._left / self._per_s) + 1.0 / self._per_s
