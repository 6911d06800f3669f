"""Ports that nobody else is given."""

from __future__ import annotations

import socket
import weakref


class KeptPort:
    """A port of 127.0.0.1 for a server that comes, goes and comes back.

    It is bound and nothing listens there: whoever connects is refused, and a server with
    SO_REUSEADDR, as all of them have, may take it again and again. A port that was only found free
    is anybody's, another test's connection included.
    """

    def __init__(self) -> None:
        kept = socket.socket()
        self._close = weakref.finalize(self, kept.close)
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        self.number = int(kept.getsockname()[1])

    def close(self) -> None:
        """Gives it back; so does the end of this object."""
        self._close()
