"""The wire messages about a camera that the server owns, for those who subscribe to it. No I/O."""

from __future__ import annotations

from edge_vlm_runtime.protocol.base import Part, ServerEvent

STREAM_PARAMETER = "stream"
"""In the query of a connection that subscribes to a camera: its name."""
PICTURES_PARAMETER = "subscribe_pictures"
"""Beside it: `true` to get the pictures, too."""


class Stream(Part, kw_only=True):
    """A camera of the server."""

    name: str
    state: str
    """live: pictures come; waiting: they do not, and it is tried again; ended: it was a file, and
    that is over."""
    detail: str | None = None
    """Why it waits, in words."""


class StreamUpdated(ServerEvent, tag="stream.updated"):
    """The camera went away, came back or ended; only for subscribers."""

    stream: Stream


PARTS: tuple[type[Part], ...] = (Stream,)
SERVER_EVENTS: tuple[type[ServerEvent], ...] = (StreamUpdated,)
