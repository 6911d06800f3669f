"""The section `alerts`: thresholds for a wanted rate of false alarms, from known events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from edge_vlm.formats.calibrated.checks import count, number

RULE_FIELDS = ("on_threshold", "off_threshold", "hold_s", "clear_hold_s", "cooldown_s")


@dataclass(frozen=True, kw_only=True)
class AlertPoint:
    """One threshold on the curve, with the chosen times and the same ratio of off to on."""

    on_threshold: float
    noticed: int
    false_alarms: int
    delay_s: float | None
    """Median, from an event's begin to that of its alert."""


@dataclass(frozen=True, kw_only=True)
class CalibratedAlert:
    """One question's rule and what it did on the footage it was chosen on."""

    name: str
    question: str
    rule: Mapping[str, float]
    """RULE_FIELDS"""
    meets: bool
    """The wanted rate of false alarms was held."""
    events: int
    noticed: int
    recall_interval: tuple[float, float]
    """95 %, Wilson."""
    false_alarms: int
    watched_h: float
    false_interval: tuple[float, float]
    """False alarms per hour, 95 %, exact Poisson (Garwood)."""
    repeats: int
    """Begins during an event that had begun an alert already."""
    delay_s: float | None
    answer_mass: float
    """Mean share of all probability on the words yes and no; little means that the model would not
    answer the question so."""
    curve: tuple[AlertPoint, ...]

    @property
    def false_per_h(self) -> float:
        return self.false_alarms / self.watched_h if self.watched_h else 0.0

    @classmethod
    def from_data(cls, data: Any) -> CalibratedAlert:
        if set(data["rule"]) != set(RULE_FIELDS):
            raise ValueError(f"a rule has {', '.join(RULE_FIELDS)}")
        for value in (*data["rule"].values(), data["watched_h"], data["answer_mass"]):
            number(value)
        for name in ("events", "noticed", "false_alarms", "repeats"):
            count(data[name])
        names = {field.name for field in fields(AlertPoint)}
        curve = tuple(AlertPoint(**{name: each[name] for name in names}) for each in data["curve"])
        recall, false = tuple(data["recall_interval"]), tuple(data["false_interval"])
        return cls(**{**data, "curve": curve, "recall_interval": recall, "false_interval": false})


@dataclass(frozen=True, kw_only=True)
class AlertsSection:
    """Alerts in the order of their marks."""

    SECTION: ClassVar[str] = "alerts"
    VERSION: ClassVar[int] = 1

    wanted_false_per_h: float
    slack_s: float
    """How far outside its marks an event's alert may begin."""
    alerts: tuple[CalibratedAlert, ...]

    def to_data(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_data(cls, data: Any) -> AlertsSection:
        number(data["wanted_false_per_h"]), number(data["slack_s"])
        alerts = tuple(CalibratedAlert.from_data(each) for each in data["alerts"])
        return cls(**{**data, "alerts": alerts})
