"""The wire messages about alerts. No I/O here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from edge_vlm.console.options import About
from edge_vlm.errors import ConfigError
from edge_vlm_runtime.protocol.base import (
    UNSET,
    ClientMessage,
    EventId,
    Part,
    ServerEvent,
    Text,
    UnsetType,
)

OnThreshold = Annotated[
    float, About('The alert begins at this probability of "yes".', option="alert_on", metavar="P")
]
OffThreshold = Annotated[
    float,
    About("It ends below this one; not above `on_threshold`.", option="alert_off", metavar="P"),
]
Hold = Annotated[
    float,
    About(
        "The probability must have been high enough for this long before the alert begins.",
        option="alert_hold",
    ),
]
ClearHold = Annotated[
    float,
    About(
        "It must have been low enough for this long before the alert ends.",
        option="alert_clear_hold",
    ),
]
Cooldown = Annotated[
    float, About("After an end no new alert begins for this long.", option="alert_cooldown")
]
Interval = Annotated[
    float,
    About(
        "Least time between two checks; 0: every frame that joins the memory is checked.",
        option="alert_interval",
    ),
]


@dataclass(frozen=True, kw_only=True)
class AlertRule:
    """What to watch for. Raises ConfigError naming the field that is wrong."""

    question: str
    """Answered by yes or no, such as "Is there a cat now?"."""
    on_threshold: OnThreshold = 0.7
    off_threshold: OffThreshold = 0.4
    hold_s: Hold = 0.0
    clear_hold_s: ClearHold = 0.0
    cooldown_s: Cooldown = 0.0
    interval_s: Interval = 0.0
    evidence: bool = True
    """`alert.triggered` brings the picture it rests on."""
    report_checks: bool = False
    """Every check is told as `alert.checked`, to find thresholds by."""

    def __post_init__(self) -> None:
        self._require("question", bool(self.question.strip()), "must not be empty")
        for field in ("on_threshold", "off_threshold"):
            self._require(field, 0.0 <= getattr(self, field) <= 1.0, "must be in [0, 1]")
        self._require("on_threshold", self.on_threshold > 0.0, "must be above 0")
        if self.off_threshold > self.on_threshold:
            raise ConfigError(
                f"off_threshold must not be above on_threshold, got {self.off_threshold:g} above "
                f"{self.on_threshold:g}",
                where="alert rule",
            )
        for field in ("hold_s", "clear_hold_s", "cooldown_s", "interval_s"):
            self._require(field, 0.0 <= getattr(self, field) < math.inf, "must not be negative")

    def _require(self, field: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigError(f"{field} {rule}, got {getattr(self, field)!r}", where="alert rule")


# ---- parts -----------------------------------------------------------------------------------


class AlertStatus(Part, kw_only=True):
    """An alert and where it stands."""

    alert_id: str
    rule: AlertRule
    state: str
    """idle, holding (soon active if it goes on so) or active."""
    episodes: int
    """How often it began."""
    probability: float | None
    """Of "yes" against "no" at the last check; null before the first."""
    answer_mass: float | None
    """Share of all probability that lies on the two words; little means that the model would not
    answer this question by yes or no, so that `probability` says nothing."""
    frame_sequence: int | None
    """The frame checked last."""
    time_s: float | None
    """Its capture time."""
    name: str | UnsetType = UNSET
    """As `alert.create` gave it."""


class Evidence(Part, kw_only=True):
    """The picture an alert rests on."""

    frame_sequence: int
    time_s: float
    jpeg: bytes
    exact: bool
    """False: made smaller to fit into `max_evidence_bytes`. Else it is the JPEG that was sent."""


# ---- what a client sends ---------------------------------------------------------------------


class AlertCreate(ClientMessage, tag="alert.create"):
    """Watch for something from now on; answered by `alert.created`."""

    question: Text
    """Answered by yes or no, such as "Is there a cat now?"."""
    on_threshold: OnThreshold = AlertRule.on_threshold
    off_threshold: OffThreshold = AlertRule.off_threshold
    hold_s: Hold = AlertRule.hold_s
    clear_hold_s: ClearHold = AlertRule.clear_hold_s
    cooldown_s: Cooldown = AlertRule.cooldown_s
    interval_s: Interval = AlertRule.interval_s
    evidence: bool = AlertRule.evidence
    """`alert.triggered` brings the picture it rests on."""
    report_checks: bool = AlertRule.report_checks
    """Every check is told as `alert.checked`, to find thresholds by."""
    name: EventId | UnsetType = UNSET
    """Stands in its events as `alert_name`; the session may have no other alert of this name."""

    def rule(self) -> AlertRule:
        """Raises ConfigError naming the field that is wrong."""
        names = set(self.__struct_fields__) - {"event_id", "name"}
        return AlertRule(**{name: getattr(self, name) for name in names})


class AlertList(ClientMessage, tag="alert.list"):
    """Answered by `alert.listed` when every frame that is in the memory has been checked."""


class AlertDelete(ClientMessage, tag="alert.delete"):
    """Watch no longer; answered by `alert.deleted`, before it `alert.cleared` if it was active."""

    alert_id: str


# ---- what the server sends -------------------------------------------------------------------


class AlertCreated(ServerEvent, tag="alert.created"):
    """The alert is watched for; the newest frame is checked at once."""

    alert: AlertStatus
    event_id: str | None = None


class AlertListed(ServerEvent, tag="alert.listed"):
    """All alerts of the session."""

    alerts: list[AlertStatus]
    event_id: str | None = None


class AlertDeleted(ServerEvent, tag="alert.deleted"):
    """The alert is gone."""

    alert_id: str
    event_id: str | None = None


class AlertChecked(ServerEvent, tag="alert.checked"):
    """One check of an alert that asked for `report_checks`."""

    alert_id: str
    probability: float
    answer_mass: float
    """As in `AlertStatus`."""
    frame_sequence: int
    time_s: float


class AlertTriggered(ServerEvent, tag="alert.triggered"):
    """The alert began. Exactly one `alert.cleared` with the same `episode` follows."""

    alert_id: str
    episode: int
    """Counts the begins of this alert, from 1."""
    question: str
    probability: float
    frame_sequence: int
    """The newest frame it rests on."""
    time_s: float
    """Capture time of this moment since the first frame of the session."""
    age_s: float
    """From the arrival of that frame to this event."""
    evidence: Evidence | None
    alert_name: str | UnsetType = UNSET
    """Of an alert that has one."""
    camera: str | UnsetType = UNSET
    """Of a camera that the server owns."""


class AlertCleared(ServerEvent, tag="alert.cleared"):
    """The alert ended."""

    alert_id: str
    episode: int
    question: str
    reason: str
    """probability, deleted or session_closed."""
    probability: float
    frame_sequence: int
    time_s: float
    """Capture time of this moment since the first frame of the session."""
    lasted_s: float
    """Since it began, in capture time."""
    alert_name: str | UnsetType = UNSET
    """Of an alert that has one."""
    camera: str | UnsetType = UNSET
    """Of a camera that the server owns."""


PARTS: tuple[type[Part], ...] = (AlertStatus, Evidence)
CLIENT_MESSAGES: tuple[type[ClientMessage], ...] = (AlertCreate, AlertList, AlertDelete)
SERVER_EVENTS: tuple[type[ServerEvent], ...] = (
    AlertCreated,
    AlertListed,
    AlertDeleted,
    AlertChecked,
    AlertTriggered,
    AlertCleared,
)
