"""Alerts: a yes/no question asked of the stream again and again, see `edge_vlm.hysteresis`.

No I/O, no clock, no threads, no model.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm.errors import AlertsUnsupported, ConfigError, TooManyAlerts, UnknownAlert
from edge_vlm.hysteresis import TOLERANCE_S, Change, Hysteresis
from edge_vlm_runtime.protocol.alerts import AlertRule
from edge_vlm_runtime.protocol.base import UNSET, UnsetType

if TYPE_CHECKING:
    from edge_vlm.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class AlertFrame:
    """A frame that the model remembers, as much of it as alerts need."""

    seq: int
    time_s: float
    """Capture time since the first frame of the session."""
    capture_us: int
    """The same moment on the sender's clock."""
    received_ns: int
    data: bytes = dataclasses.field(repr=False)
    """As it arrived."""


class Alert:
    """One rule and where it stands."""

    def __init__(self, alert_id: str, rule: AlertRule, name: str | UnsetType = UNSET) -> None:
        self.alert_id = alert_id
        self.rule = rule
        self.name = name
        self.hysteresis = Hysteresis(rule)
        self.episode = 0
        """Number of the last begin."""
        self.probability: float | None = None
        self.answer_mass: float | None = None
        self.frame: AlertFrame | None = None
        """The newest frame that was checked."""
        self.checked_s = -math.inf
        self.is_failing = False

    def is_due(self, newest: AlertFrame | None, now_s: float) -> bool:
        return (
            newest is not None
            and newest is not self.frame
            and now_s >= self.checked_s + self.rule.interval_s - TOLERANCE_S
        )

    def update(self, now_s: float) -> Change | None:
        """Lets `now_s` come with the probability that was measured last."""
        if self.probability is None:
            return None
        change = self.hysteresis.update(now_s, self.probability)
        if change is Change.BEGAN:
            self.episode += 1
        return change


class AlertRegistry:
    """The alerts of one session and the time they live in."""

    def __init__(self, max_alerts: int) -> None:
        self._max_alerts = max_alerts
        self._alerts: dict[str, Alert] = {}
        self._num_created = 0
        self.newest: AlertFrame | None = None
        self.now_s = 0.0

    def create(self, rule: AlertRule, name: str | UnsetType = UNSET) -> Alert:
        """Raises TooManyAlerts, ConfigError for a name that another alert has."""
        if name is not UNSET and any(alert.name == name for alert in self.alerts):
            raise ConfigError(f"there is an alert called {name!r} already", where="alert rule")
        if len(self._alerts) >= self._max_alerts:
            raise TooManyAlerts(
                f"the session has {len(self._alerts)} alerts already", remedy="delete one first"
            )
        self._num_created += 1
        alert = Alert(f"alert_{self._num_created}", rule, name)
        self._alerts[alert.alert_id] = alert
        return alert

    def delete(self, alert_id: str) -> Alert:
        """Raises UnknownAlert."""
        if alert_id not in self._alerts:
            known = ", ".join(self._alerts) or "none"
            raise UnknownAlert(f"there is no alert {alert_id[:80]!r}", remedy=f"known are: {known}")
        return self._alerts.pop(alert_id)

    @property
    def alerts(self) -> list[Alert]:
        """In the order they were created."""
        return list(self._alerts.values())

    def on_frame(self, frame: AlertFrame) -> None:
        """A newer frame is in the memory."""
        self.newest = frame
        self.now_s = frame.time_s

    def on_duplicate(self, capture_us: int) -> list[tuple[Alert, Change]]:
        """The picture at this later time looks like the newest frame: what was measured holds on.

        Returns what began or ended by time alone.
        """
        if self.newest is None:
            return []
        elapsed_us = capture_us - self.newest.capture_us
        self.now_s = max(self.now_s, self.newest.time_s + elapsed_us * 1e-6)
        changes = [(a, a.update(self.now_s)) for a in self.alerts if a.frame is self.newest]
        return [(alert, change) for alert, change in changes if change is not None]

    def due(self) -> list[Alert]:
        """Alerts to check now, oldest first."""
        return [alert for alert in self.alerts if alert.is_due(self.newest, self.now_s)]

    def measured(self, alert: Alert, probability: float, answer_mass: float) -> Change | None:
        """The newest frame was checked."""
        alert.probability, alert.answer_mass = probability, answer_mass
        alert.is_failing = False
        self._checked(alert)
        return alert.update(self.now_s)

    def failed(self, alert: Alert) -> bool:
        """The newest frame could not be checked; True if the check before it could."""
        first, alert.is_failing = not alert.is_failing, True
        self._checked(alert)
        return first

    def _checked(self, alert: Alert) -> None:
        alert.frame, alert.checked_s = self.newest, self.now_s


class YesNo:
    """Reads the probability of "yes" against "no" from logits."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises AlertsUnsupported if the vocabulary lacks the words."""
        self._yes = _token_ids(tokenizer, "yes")
        self._no = _token_ids(tokenizer, "no")

    def read(self, logits: np.ndarray) -> tuple[float, float]:
        """Logits f32 [vocab] -> probability of yes against no, and how much of all probability lies
        on the two: little means that the question is not one of yes and no."""
        yes, no = _log_sum(logits[self._yes]), _log_sum(logits[self._no])
        both = _log_sum(np.array([yes, no]))
        return math.exp(yes - both), math.exp(both - _log_sum(logits))


def _token_ids(tokenizer: Tokenizer, word: str) -> list[int]:
    """Tokens that are the whole word, whatever its case."""
    found = set()
    for text in (word, word.capitalize(), word.upper(), f" {word}", f" {word.capitalize()}"):
        ids = tokenizer.encode(text)
        if len(ids) == 1 and tokenizer.decode(ids).strip().lower() == word:
            found.add(ids[0])
    if not found:
        raise AlertsUnsupported(f"the model's vocabulary has no token for {word!r}")
    return sorted(found)


def _log_sum(logits: np.ndarray) -> float:
    values = logits.astype(np.float64)
    top = float(values.max())
    return top + math.log(float(np.exp(values - top).sum()))
