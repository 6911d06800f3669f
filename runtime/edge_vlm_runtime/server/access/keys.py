"""Guesses at the API key are slowed down, and counted.

A key that is right at the first attempt of its address is let in at once, whoever else is guessing.
An address that has given wrong ones has so many free, then it may try once a second: the attempt
is looked at when its turn comes, whether its sender still waits or not. All such addresses together
have a pace, too, which slows each of many machines down; this machine's own users do not feel it.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edge_vlm.errors import TooManyRequests, Unauthorized
from edge_vlm_runtime.server.access.addresses import address_of, is_loopback, neighbourhood
from edge_vlm_runtime.server.access.auth import REMEDY, given_key, is_guarded

log = logging.getLogger(__name__)

FREE = 5
"""Wrong keys of an address before it has to wait."""
PAUSE_S = 1.0
"""Between its further ones; after as long without one, it has one more free."""
FREE_IN_ALL, PAUSE_IN_ALL_S = 50, 0.05
"""The same of all addresses together that have given a wrong one."""
LONGEST_S = 10.0
"""Nobody waits longer for their turn, however many guess."""
MAX_WAITING = 4
"""Attempts of one address; further ones are refused unseen."""
MAX_ADDRESSES = 16_384
"""That are kept apart; when so many guess, new ones share one place."""


@dataclass
class _Pace:
    """Attempts that are free at first, then one in each pause."""

    free: int
    pause_s: float
    due_s: float = float("-inf")
    """When all of the free ones are there again."""
    num_waiting: int = 0

    def wait_s(self, now_s: float) -> float:
        """Until the next attempt may be looked at."""
        return max(0.0, self.due_s - self.free * self.pause_s - now_s + self.pause_s)

    def count(self, now_s: float) -> None:
        latest_s = now_s + (self.free - 1) * self.pause_s + LONGEST_S
        self.due_s = min(max(self.due_s, now_s) + self.pause_s, latest_s)

    def uncount(self) -> None:
        self.due_s -= self.pause_s


class KeyCheck:
    """The API key of one server, and who has guessed at it. Lives on the event loop."""

    def __init__(
        self,
        key: str | None,
        *,
        clock_s: Callable[[], float] | None = None,
        on_attempt: Callable[[str], None] = lambda outcome: None,
    ) -> None:
        """`on_attempt` gets what became of each that was not right: wrong, or refused."""
        self._key = key
        self._clock_s = clock_s or (lambda: asyncio.get_running_loop().time())
        self.on_attempt = on_attempt
        self._paces: OrderedDict[str, _Pace] = OrderedDict()
        self._in_all = _Pace(FREE_IN_ALL, PAUSE_IN_ALL_S)

    async def require(self, scope: Mapping[str, Any], *, everywhere: bool = False) -> None:
        """Checks an ASGI scope if its path is guarded, or `everywhere`. Raises Unauthorized,
        TooManyRequests."""
        if self._key is None or not (everywhere or is_guarded(scope["path"])):
            return
        given = given_key(scope)
        if given is None:
            raise Unauthorized("this server wants an API key", remedy=REMEDY)
        host = address_of(scope)
        name = neighbourhood(host)
        pace = self._paces.get(name)
        if pace is None and len(self._paces) >= MAX_ADDRESSES and not is_loopback(host):
            self._forget()
            name = "" if len(self._paces) >= MAX_ADDRESSES else name
            pace = self._paces.get(name)
        if pace is not None:
            await self._turn(pace, is_loopback(host))
        if hmac.compare_digest(given, self._key.encode()):
            if pace is not None:
                pace.uncount()
            return
        if pace is None:
            pace = self._paces.setdefault(name, _Pace(FREE, PAUSE_S))
            pace.count(self._clock_s())
        self._in_all.count(self._clock_s())
        self.on_attempt("wrong")
        log.warning("a wrong API key came from %s", host)
        raise Unauthorized("this is not the server's API key", remedy=REMEDY)

    async def _turn(self, pace: _Pace, is_local: bool) -> None:
        """Waits for it. The attempt counts from now on, so those that come meanwhile wait behind
        it."""
        now_s = self._clock_s()
        wait_s = max(pace.wait_s(now_s), 0.0 if is_local else self._in_all.wait_s(now_s))
        if wait_s > 0.0 and pace.num_waiting >= MAX_WAITING:
            self.on_attempt("refused")
            raise TooManyRequests(
                "too many wrong API keys came from this address",
                retry_after_s=int(wait_s) + 1,
                remedy="wait, then try the right one",
            )
        pace.count(now_s)
        if wait_s > 0.0:
            pace.num_waiting += 1
            try:
                await asyncio.sleep(wait_s)
            finally:
                pace.num_waiting -= 1

    def _forget(self) -> None:
        """Addresses that have been quiet for long enough to have all attempts free again."""
        now_s = self._clock_s()
        for name in [name for name, pace in self._paces.items() if pace.due_s <= now_s]:
            del self._paces[name]
