"""Whether decoding keeps up with a camera, and what is left out when it does not. No library."""

from __future__ import annotations

import math
from enum import Enum


class Skip(Enum):
    """What is left out."""

    NOTHING = "nothing"
    UNREFERENCED = "unreferenced"
    """Pictures that no other one needs."""
    TO_KEY = "to the next key picture"


_BUSY_SHARE = 0.1
"""Of the time is spent waiting for the camera at most, if decoding is what is slow."""
_IDLE_SHARE, _IDLE_S = 0.5, 5.0
"""Who waits this much, for this long, has everything: what seems late is the clock."""
_BEHIND_S, _FAR_BEHIND_S = 0.4, 1.0
_CAUGHT_UP_S, _CLOSE_S = 0.1, 0.2
_KEY_EVERY_S = 0.5
"""Of what is left out, a key picture is shown this often."""
_DRIFT = 1e-3
"""How much two clocks may differ each second."""


class Pace:
    """Compares a camera's clock with ours."""

    def __init__(self) -> None:
        self.skip = Skip.NOTHING
        self.behind_s = 0.0
        """How much later the last packet was read than the promptest one, by its own time."""
        self._promptest_s = math.inf
        """Our clock less the camera's, when nothing was late."""
        self._last_s: float | None = None
        self._waiting = 1.0
        """Share of the time spent waiting for packets, of the last second or so."""
        self._idle_s = 0.0
        self._key_s = -math.inf
        self._needs_key = False

    def captured_s(self, camera_s: float) -> float:
        """When the camera saw what it calls `camera_s`, on our clock."""
        return camera_s + self._promptest_s

    def takes(self, camera_s: float, is_key: bool, now_s: float, waited_s: float) -> bool:
        """Whether a packet that was read now, after waiting for it, is to be decoded."""
        passed_s = 0.0 if self._last_s is None else max(now_s - self._last_s, 1e-6)
        self._last_s = now_s
        if passed_s:
            stays = math.exp(-passed_s)
            share = min(waited_s / passed_s, 1.0)
            self._waiting = stays * self._waiting + (1 - stays) * share
        self._idle_s = self._idle_s + passed_s if self._waiting > _IDLE_SHARE else 0.0
        late_s = now_s - camera_s
        drifted_s = self._promptest_s + _DRIFT * passed_s
        self._promptest_s = late_s if self._idle_s > _IDLE_S else min(late_s, drifted_s)
        self.behind_s = late_s - self._promptest_s
        self.skip = self._next_skip()
        return self._is_taken(camera_s, is_key)

    def _next_skip(self) -> Skip:
        is_busy = self._waiting < _BUSY_SHARE
        enough_s = _CLOSE_S if self.skip is Skip.TO_KEY else _FAR_BEHIND_S
        if is_busy and self.behind_s > enough_s:
            return Skip.TO_KEY
        enough_s = _BEHIND_S if self.skip is Skip.NOTHING else _CAUGHT_UP_S
        return Skip.UNREFERENCED if is_busy and self.behind_s > enough_s else Skip.NOTHING

    def _is_taken(self, camera_s: float, is_key: bool) -> bool:
        if self.skip is Skip.TO_KEY:
            self._needs_key = True
            if not is_key or abs(camera_s - self._key_s) < _KEY_EVERY_S:
                return False
            self._key_s = camera_s
            return True
        if self._needs_key and not is_key:  # what it builds upon is missing
            return False
        self._needs_key = False
        return True
