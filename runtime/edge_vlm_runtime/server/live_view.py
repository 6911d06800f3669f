"""What a session keeps for those who look at it from outside: the newest picture that the model was
shown, and the begins and ends of its alerts. Bounded. Lives on the event loop."""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from dataclasses import dataclass
from typing import Any

from edge_vlm.waiting import within
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.alerts import AlertCleared, AlertTriggered
from edge_vlm_runtime.protocol.base import UNSET
from edge_vlm_runtime.session.frames import EncodedFrame

MAX_HAPPENED = 500
"""Begins and ends that are kept."""
MAX_UNDER_WAY = 16
"""Frames whose outcome is not known yet; of more the oldest are not kept."""


@dataclass(frozen=True, kw_only=True)
class SeenPicture:
    """A picture, and what was said of it."""

    frame: EncodedFrame
    time_s: float
    """Capture time since the first frame of the session."""


@dataclass(frozen=True, kw_only=True)
class Happened:
    """An alert began or ended."""

    number: int
    """From 1."""
    at_ns: int
    """By the server's monotonic clock."""
    event: AlertTriggered | AlertCleared

    def fields(self, now_ns: int) -> dict[str, Any]:
        """For JSON, without the picture."""
        event = self.event
        found: dict[str, Any] = {
            "number": self.number,
            "type": protocol.tag_of(type(event)),
            "ago_s": (now_ns - self.at_ns) * 1e-9,
        }
        names = ("alert_id", "episode", "question", "probability", "frame_sequence", "time_s")
        found |= {name: getattr(event, name) for name in names}
        names_of_camera = {"alert_name": event.alert_name, "camera": event.camera}
        found |= {name: value for name, value in names_of_camera.items() if value is not UNSET}
        if isinstance(event, AlertCleared):
            found |= {"reason": event.reason, "lasted_s": event.lasted_s}
        return found


class LiveView:
    """Of one session."""

    def __init__(self) -> None:
        self.newest: SeenPicture | None = None
        self.num_accepted = 0
        self.cells_seen = 0
        self.cells_kept = 0
        self.stats: protocol.SessionStats | None = None
        """The last ones."""
        self.num_happened = 0
        self._happened: deque[Happened] = deque(maxlen=MAX_HAPPENED)
        self._under_way: dict[int, EncodedFrame] = {}
        self._news = asyncio.Event()

    def offered(self, frame: EncodedFrame) -> None:
        """A frame came."""
        self._under_way[frame.seq] = frame
        while len(self._under_way) > MAX_UNDER_WAY:
            self._under_way.pop(next(iter(self._under_way)))

    def said(self, event: protocol.ServerEvent, now_ns: int) -> None:
        """The session's next event."""
        if isinstance(event, protocol.FrameDropped):
            self._under_way.pop(event.frame_sequence, None)
        elif isinstance(event, protocol.FrameAccepted):
            self.num_accepted += 1
            self.cells_seen += event.cells_seen
            self.cells_kept += event.cells_kept
            frame = self._under_way.pop(event.frame_sequence, None)
            if frame is not None:
                self.newest = SeenPicture(frame=frame, time_s=event.time_s)
        elif isinstance(event, protocol.SessionStats):
            self.stats = event
        elif isinstance(event, (AlertTriggered, AlertCleared)):
            self.num_happened += 1
            if isinstance(event, AlertTriggered):  # nobody asks for its picture, which is large
                event = copy.copy(event)
                event.evidence = None
            self._happened.append(Happened(number=self.num_happened, at_ns=now_ns, event=event))
            self.wake()

    def wake(self) -> None:
        """Whoever waits looks again."""
        self._news.set()
        self._news = asyncio.Event()

    def happened(self, after: int) -> list[Happened]:
        """Behind that number, as far as it is kept."""
        return [each for each in self._happened if each.number > after]

    async def wait(self, seconds: float) -> None:
        """Until something happens, but no longer."""
        try:
            await within(seconds, self._news.wait())
        except asyncio.TimeoutError:
            return
