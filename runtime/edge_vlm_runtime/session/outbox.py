"""What a session has to say and nobody has fetched yet."""

from __future__ import annotations

from edge_vlm.errors import EdgeVlmError
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.alerts import AlertTriggered


class Outbox:
    """A session's events, in order."""

    def __init__(self) -> None:
        self._events: list[protocol.ServerEvent] = []
        self._received_ns: dict[int, int] = {}

    def add(self, event: protocol.ServerEvent) -> None:
        self._events.append(event)

    def add_aged(self, event: protocol.FrameAccepted | AlertTriggered, received_ns: int) -> None:
        """An event that tells the age of a frame, which is known when it is fetched."""
        self._received_ns[len(self._events)] = received_ns
        self._events.append(event)

    def add_error(self, error: EdgeVlmError, event_id: str | None = None) -> None:
        self._events.append(protocol.error_event(error, event_id=event_id))

    def drain(self, now_ns: int) -> list[protocol.ServerEvent]:
        """Everything added since the last call."""
        events, self._events = self._events, []
        for place, received_ns in self._received_ns.items():
            event = events[place]
            if isinstance(event, protocol.FrameAccepted):
                event.age_ms = (now_ns - received_ns) * 1e-6
            elif isinstance(event, AlertTriggered):
                event.age_s = (now_ns - received_ns) * 1e-9
        self._received_ns.clear()
        return events
