"""How many connections a server has at once, and whose.

A connection takes a descriptor and some memory before it has said a word. So there are so many in
all and for each address; who comes when all are taken gets the place of one that asks for nothing:
first those that never asked, then those between two requests, then those without a session. One
that is served is never cut off for another. This machine's own users have some places for
themselves.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from typing import Protocol

from edge_vlm_runtime.server.access.addresses import TrustedProxies, is_loopback, neighbourhood

if sys.platform != "win32":
    import resource

log = logging.getLogger(__name__)

LOCAL_PLACES = 8
"""For this machine's own, a quarter of all at most."""
SPARE_DESCRIPTORS = 12
"""For files that are opened meanwhile."""
STALL_S = 30.0
"""A connection whose other side takes nothing for so long is cut."""
SWEEP_S = 1.0


class Stage(IntEnum):
    """How much a connection has earned, least first."""

    NEW = 0
    """It has not asked for anything yet."""
    BETWEEN = 1
    """It has been answered, and asks for nothing now."""
    STRANGER = 2
    """A websocket without a session or subscription."""
    SERVED = 3


class Carrier(Protocol):
    """What is needed of asyncio's transport."""

    def get_write_buffer_size(self) -> int: ...


class Visitor:
    """One connection."""

    def __init__(self, number: int, party: str | None, is_local: bool) -> None:
        """`party`: whose it is; None while only the proxy is known."""
        self.number = number
        self.party = party
        self.is_local = is_local
        self.stage = Stage.NEW
        self.cut: Callable[[], object] = lambda: None
        """Ends it at once."""
        self.carrier: Carrier | None = None
        """Once it is there."""
        self.is_taken = False
        """What the other side was sent has gone out, some of it, since this was last looked at."""
        self._last_bytes = 0
        self._stuck_since_s: float | None = None

    def is_stuck(self, now_s: float) -> bool:
        """Whether the other side has taken nothing of what waits for it for STALL_S. To be asked
        again and again."""
        num_bytes = 0 if self.carrier is None else self.carrier.get_write_buffer_size()
        if num_bytes == 0 or num_bytes < self._last_bytes or self.is_taken:
            self._stuck_since_s = None
        if num_bytes and self._stuck_since_s is None:
            self._stuck_since_s = now_s
        self._last_bytes, self.is_taken = num_bytes, False
        return self._stuck_since_s is not None and now_s - self._stuck_since_s > STALL_S


class Doors:
    """All connections of one server. Lives on its event loop."""

    def __init__(
        self,
        places: int,
        places_per_party: int,
        proxies: TrustedProxies,
        on_refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """`on_refused` is told why each connection was refused or cut: full, address, stuck."""
        self._places = places
        self._places_per_party = places_per_party
        self._local_places = min(LOCAL_PLACES, places // 4)
        self._proxies = proxies
        self.on_refused = on_refused
        self._visitors: dict[int, Visitor] = {}
        self._of_party: Counter[str] = Counter()
        self._number = 0

    @property
    def num_visitors(self) -> int:
        return len(self._visitors)

    def let_in(self, peer: str) -> Visitor | None:
        """A place for a connection from this address; None when there is none."""
        is_proxy = peer in self._proxies
        party = None if is_proxy else neighbourhood(peer)
        is_local = is_loopback(peer) and not is_proxy
        if party is not None and not (is_local or self._has_room_for(party)):
            return None
        room = self._places if is_local else self._places - self._local_places
        if len(self._visitors) >= room and not self._cut_one("full"):
            self._refuse("full")
            return None
        self._number += 1
        visitor = Visitor(self._number, party, is_local)
        self._visitors[visitor.number] = visitor
        if party is not None:
            self._of_party[party] += 1
        return visitor

    def know(self, visitor: Visitor, client: str) -> bool:
        """Whose request a trusted proxy passes on now; False when that party has too many."""
        party = neighbourhood(client)
        if party == visitor.party or visitor.number not in self._visitors:
            return True
        if not (is_loopback(client) or self._has_room_for(party)):
            return False
        self._let_go(visitor.party)
        visitor.party = party
        self._of_party[party] += 1
        return True

    def leave(self, visitor: Visitor) -> None:
        """Twice does no harm."""
        if self._visitors.pop(visitor.number, None) is not None:
            self._let_go(visitor.party)

    def make_room(self) -> bool:
        """Descriptors ran out: cuts one that asks for nothing; False if there is none."""
        return self._cut_one("full")

    def cut_stranger(self, newcomer: Visitor) -> bool:
        """Another websocket without a session gives way; False if there is none."""
        return self._cut_one("full", but=newcomer, least=Stage.STRANGER)

    def sweep(self, now_s: float) -> None:
        """Cuts those whose other side takes nothing. To be called every SWEEP_S."""
        for visitor in [each for each in self._visitors.values() if each.is_stuck(now_s)]:
            self._cut(visitor, "stuck")

    def _has_room_for(self, party: str) -> bool:
        if self._of_party[party] < self._places_per_party or self._cut_one("address", party):
            return True
        self._refuse("address")
        return False

    def _cut_one(
        self,
        why: str,
        party: str | None = None,
        but: Visitor | None = None,
        least: Stage = Stage.NEW,
    ) -> bool:
        """That of the party with the most, and of these the oldest."""
        idle = [
            each
            for each in self._visitors.values()
            if least <= each.stage < Stage.SERVED
            and each is not but
            and (party is None or each.party == party)
        ]
        if not idle:
            return False
        of_party = self._of_party
        self._cut(
            min(idle, key=lambda v: (v.stage, -of_party.get(v.party or "", 0), v.number)), why
        )
        return True

    def _cut(self, visitor: Visitor, why: str) -> None:
        self.leave(visitor)
        self._refuse(why)
        visitor.cut()

    def _refuse(self, why: str) -> None:
        self.on_refused(why)

    def _let_go(self, party: str | None) -> None:
        if party is not None:
            self._of_party[party] -= 1
            if not self._of_party[party]:
                del self._of_party[party]


def room_for_connections(wanted: int, num_files: int) -> int:
    """Of `wanted` connections, those that this process' limit of open files leaves room for beside
    the files it has open and `num_files` to come. At least one."""
    if sys.platform == "win32":  # has no such limit
        return wanted
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, limit - _num_open() - num_files - SPARE_DESCRIPTORS))


def _num_open() -> int:
    """Of this process; a guess where the system does not say."""
    for folder in ("/proc/self/fd", "/dev/fd"):
        with suppress(OSError):
            return len(os.listdir(folder))
    return 32
