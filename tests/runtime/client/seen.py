"""What a client saw: `on_event=Seen()`."""

from __future__ import annotations

from edge_vlm_runtime import protocol


class Seen:
    """Outcomes by frame, and errors."""

    def __init__(self) -> None:
        self.accepted: dict[int, protocol.FrameAccepted] = {}
        self.dropped: dict[int, protocol.FrameDropped] = {}
        self.errors: list[protocol.ErrorDetail] = []

    def __call__(self, event: protocol.ServerEvent) -> None:
        if isinstance(event, protocol.FrameAccepted):
            self.accepted[event.frame_sequence] = event
        elif isinstance(event, protocol.FrameDropped):
            self.dropped[event.frame_sequence] = event
        elif isinstance(event, protocol.Error):
            self.errors.append(event.error)
