"""What a client believes of a server at most: it may be anybody's, or an older one gone wrong."""

from __future__ import annotations

import re
from collections import Counter

from edge_vlm.errors import ProtocolError
from edge_vlm.errors.words import shortened, visible
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.alerts import AlertCleared, AlertTriggered
from edge_vlm_runtime.protocol.base import Part, ServerEvent, UnknownEvent

MOST_GRID = 256
"""Cells along one side of a picture, which terminals draw."""
MOST_UNACKNOWLEDGED = 64
"""Frames under way, each of which is kept until its outcome comes."""
MOST_RECONNECT_S = 3600.0
"""For which a connection that broke is tried again."""
MOST_ANSWER = 1 << 20
"""Characters of one answer: the longest context has fewer."""
MOST_NAMES = 100
"""Reasons and types of events that are counted each for itself."""
OTHERS = "others"
MOST_TOLD = 100
"""Lines in the log about what one server reports."""
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,127}")
LARGEST_NUMBER = 1 << 62
BIG = f"the server says a number above {LARGEST_NUMBER}"
LARGEST_FRAME = 0xFFFFFFFF


def check_opening(event: protocol.SessionCreated | protocol.SessionResumed) -> None:
    """Raises ProtocolError for limits that no server of ours has."""
    _require_name(event.session_id)
    limits = event.model.limits
    grid_fits = 1 <= limits.cell_grid <= MOST_GRID and limits.num_cells == limits.cell_grid**2
    if not grid_fits:
        raise ProtocolError(
            f"the server's model has {limits.num_cells} cells in rows of {limits.cell_grid}"
        )
    if isinstance(event, protocol.SessionResumed):
        newest = event.newest_frame_sequence or 0
        if not (0 <= newest < LARGEST_FRAME and event.messages_received >= 0):
            raise ProtocolError(
                f"the server goes on behind frame {newest} and message {event.messages_received}"
            )


def check_event(event: protocol.ServerEvent, num_cells: int) -> None:
    """Raises ProtocolError for cells that the model has not, and names that files cannot have."""
    if isinstance(event, (AlertTriggered, AlertCleared)):
        _require_name(event.alert_id)
    if isinstance(event, protocol.FrameAccepted):
        cells = event.kept_cells
        if len(cells) > num_cells or any(not 0 <= cell < num_cells for cell in cells):
            raise ProtocolError(f"frame {event.frame_sequence} keeps cells that there are not")
    elif isinstance(event, UnknownEvent):
        return
    _require_small(event)


def _require_small(value: object) -> None:
    """Raises ProtocolError for a number that cannot be reckoned with."""
    if isinstance(value, (int, float)):
        if abs(value) > LARGEST_NUMBER:
            raise ProtocolError(f"the server says {value:.3g}" if type(value) is float else BIG)
    elif isinstance(value, (ServerEvent, Part)):
        for name in value.__struct_fields__:
            _require_small(getattr(value, name))
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            _require_small(each)


def _require_name(name: str) -> None:
    """Files are called by it, and headers of webhooks hold it."""
    if not NAME.fullmatch(name):
        raise ProtocolError(f"the server calls something {name!r:.80}")


def count(counter: Counter[str], name: str) -> None:
    """One more of this name, or of the others once there are many."""
    known = name in counter or len(counter) < MOST_NAMES
    counter[shortened(name) if known else OTHERS] += 1


class Told:
    """How much has been said in the log of what one server reports: it could fill a disk."""

    def __init__(self) -> None:
        self._count = 0

    def line(self, text: str) -> str | None:
        """As it may be written; None: there has been enough."""
        self._count += 1
        if self._count > MOST_TOLD:
            return None
        more = "; what it reports from now on is not told" if self._count == MOST_TOLD else ""
        return visible(shortened(text)) + more
