"""When the answer to a yes/no question, asked of a stream again and again, is an event.

    idle --p >= on--> holding --for hold_s--> active --p < off, for clear_hold_s--> idle (cooling)

`p` is the probability of "yes" against "no". Times are capture times in seconds, so a recording
gives the same events as the camera did.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import Protocol

TOLERANCE_S = 1e-6
"""Capture times are whole microseconds."""


class Rule(Protocol):
    """What a rule says of its thresholds and times."""

    @property
    def on_threshold(self) -> float: ...
    @property
    def off_threshold(self) -> float: ...
    @property
    def hold_s(self) -> float: ...
    @property
    def clear_hold_s(self) -> float: ...
    @property
    def cooldown_s(self) -> float: ...


class AlertState(str, Enum):
    IDLE = "idle"
    HOLDING = "holding"
    """The probability is high enough, but not yet for `hold_s`, or it is still cooling down."""
    ACTIVE = "active"
    """The alert has begun and not ended."""


class Change(Enum):
    BEGAN = "began"
    ENDED = "ended"


class Hysteresis:
    """Turns probabilities over time into begins and ends."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.active = False
        self.began_s = 0.0
        """Time of the last begin."""
        self._since_s: float | None = None
        """How long the probability has asked for a change."""
        self._cool_until_s = -math.inf

    @property
    def state(self) -> AlertState:
        if self.active:
            return AlertState.ACTIVE
        return AlertState.IDLE if self._since_s is None else AlertState.HOLDING

    def update(self, time_s: float, probability: float) -> Change | None:
        """One measurement, or the same picture some time later; `time_s` never falls."""
        rule = self.rule
        if self.active:
            wants_change, hold_s = probability < rule.off_threshold, rule.clear_hold_s
        else:
            wants_change, hold_s = probability >= rule.on_threshold, rule.hold_s
        if not wants_change:
            self._since_s = None
            return None
        if self._since_s is None:
            self._since_s = time_s
        if time_s - self._since_s < hold_s - TOLERANCE_S:
            return None
        if not self.active and time_s < self._cool_until_s - TOLERANCE_S:
            return None
        self.active = not self.active
        self._since_s = None
        if self.active:
            self.began_s = time_s
            return Change.BEGAN
        self._cool_until_s = time_s + rule.cooldown_s
        return Change.ENDED
