"""How good alerts are as a user gets them: footage with known events streamed to a server.

Each stretch of footage is one session with one alert for each question and setting. What the server
tells is compared with the times at which the answer was yes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_vlm.console.tables import columns
from edge_vlm.errors import ConfigError
from edge_vlm.evaluation.intervals import Proportion
from edge_vlm.formats.alert_set import Footage, LabelledAlert
from edge_vlm.formats.calibrated import AlertsSection
from edge_vlm.formats.calibration import Calibration
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.protocol.alerts import AlertCleared, AlertRule, AlertTriggered
from edge_vlm_runtime.protocol.typed import Settings

RuleOf = Callable[[str], Mapping[str, Any] | None]
"""Fields of `alert.create` for a question; None: it is not asked."""
CALIBRATED = "calibrated"
"""In place of thresholds: each question's own, of a calibration."""


@dataclass(frozen=True)
class Episode:
    """One begin and end of an alert, in seconds of the footage."""

    begin_s: float
    end_s: float
    age_s: float
    """From the arrival of the frame to the begin."""


@dataclass
class Score:
    """One setting over all footage and questions."""

    events: Proportion = field(default_factory=Proportion)
    """Noticed events of all."""
    delays_s: list[float] = field(default_factory=list)
    """From the begin of each noticed event to that of its alert, in capture time."""
    overhangs_s: list[float] = field(default_factory=list)
    """From the end of each noticed event to that of its alert; negative if that was before."""
    false_alarms: int = 0
    """Alerts that began while the answer was no."""
    repeats: int = 0
    """Alerts that began again during the same event."""
    watched_s: float = 0.0
    """Footage, once for each question."""
    ages_s: list[float] = field(default_factory=list)
    slack_s: float = 0.0
    """How far outside its times an event may be noticed."""

    @property
    def false_per_hour(self) -> float:
        """Of one alert."""
        return self.false_alarms / self.watched_s * 3600.0 if self.watched_s else 0.0

    def add(self, watch: LabelledAlert, episodes: Sequence[Episode], length_s: float) -> None:
        """One question over one stretch of footage."""
        self.watched_s += length_s
        self.events.asked += len(watch.events)
        noticed: set[int] = set()
        for episode in episodes:
            self.ages_s.append(episode.age_s)
            during = [
                number
                for number, (begin_s, end_s) in enumerate(watch.events)
                if begin_s - self.slack_s <= episode.begin_s < end_s + self.slack_s
            ]
            fresh = [number for number in during if number not in noticed]
            if not during:
                self.false_alarms += 1
            elif not fresh:
                self.repeats += 1
            else:
                begin_s, end_s = watch.events[fresh[0]]
                noticed.add(fresh[0])
                self.delays_s.append(episode.begin_s - begin_s)
                self.overhangs_s.append(episode.end_s - end_s)
        self.events.right += len(noticed)

    def to_dict(self) -> dict[str, Any]:
        low, high = self.events.interval()
        return {
            "events": self.events.asked,
            "noticed": self.events.right,
            "recall_percent": round(100 * self.events.share, 1),
            "recall_interval_95": [round(100 * low, 1), round(100 * high, 1)],
            "delay_s": _spread(self.delays_s),
            "overhang_s": _spread(self.overhangs_s),
            "false_alarms": self.false_alarms,
            "false_alarms_per_hour": round(self.false_per_hour, 2),
            "repeats": self.repeats,
            "watched_hours": round(self.watched_s / 3600, 3),
            "frame_to_alert_ms": {
                name: round(1e3 * value, 1) for name, value in _spread(self.ages_s).items()
            },
        }


def _spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    return {
        "mean": round(statistics.fmean(ordered), 4),
        "median": round(statistics.median(ordered), 4),
        "p90": round(ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))], 4),
        "max": round(ordered[-1], 4),
    }


async def evaluate_alerts(
    url: str,
    footage: Iterable[Footage],
    rules: Mapping[str, RuleOf],
    settings: Settings,
    on_footage: Callable[[int], None] | None = None,
    slack_s: float = 0.0,
) -> dict[str, Score]:
    """Streams all footage and scores each of `rules`, by a name; a question that has no rule there
    is not asked. `slack_s`: how far outside its times an event may be noticed.

    Raises what the client raises, and RuntimeError if a frame was not taken, because the times
    after it would not be those of the footage.
    """
    scores = {name: Score(slack_s=slack_s) for name in rules}
    for number, part in enumerate(footage, start=1):
        watches = [
            (name, watch)
            for name, rule_of in rules.items()
            for watch in part.watches
            if rule_of(watch.question) is not None
        ]
        while watches:
            async with await Client.connect(url, {**settings, "delivery": "wait"}) as client:
                most = client.created.limits.max_alerts
                batch, watches = watches[:most], watches[most:]
                episodes = await _watch(client, part, batch, rules)
            for (name, watch), found in zip(batch, episodes, strict=True):
                scores[name].add(watch, found, _length_s(part))
        if on_footage is not None:
            on_footage(number)
    return scores


async def _watch(
    client: Client,
    part: Footage,
    batch: Sequence[tuple[str, LabelledAlert]],
    rules: Mapping[str, RuleOf],
) -> list[list[Episode]]:
    """The episodes of each alert of the batch."""
    names = []
    for name, watch in batch:
        rule = rules[name](watch.question) or {}
        status = await client.create_alert(watch.question, evidence=False, **rule)
        names.append(status.alert_id)
    begins: dict[tuple[str, int], AlertTriggered] = {}
    ends: dict[tuple[str, int], AlertCleared] = {}

    def note(event: protocol.ServerEvent) -> None:
        if isinstance(event, AlertTriggered):
            begins[event.alert_id, event.episode] = event
        elif isinstance(event, AlertCleared):
            ends[event.alert_id, event.episode] = event

    client.on_event = note
    for jpeg, time_s in zip(part.jpegs, part.times_s, strict=True):
        await client.send_frame(jpeg, round(time_s * 1e6))
        await client.wait_processed()  # no frame waits for another, as with a camera
    await client.list_alerts()  # comes when everything has been checked
    for reason in client.frames.dropped:
        raise RuntimeError(f"footage {part.name}: a frame was dropped ({reason})")
    first_s = part.times_s[0]
    last_s = first_s + _length_s(part)
    return [
        [
            Episode(
                first_s + begin.time_s,
                first_s + ends[key].time_s if key in ends else last_s,
                begin.age_s,
            )
            for key, begin in begins.items()
            if key[0] == alert_id
        ]
        for alert_id in names
    ]


def _length_s(part: Footage) -> float:
    """Of the footage, its last picture included."""
    times_s = part.times_s
    if len(times_s) == 1:
        return 0.0
    return (times_s[-1] - times_s[0]) * len(times_s) / (len(times_s) - 1)


def parse_rule(text: str) -> dict[str, Any]:
    """`ON:OFF[:HOLD[:CLEAR_HOLD[:COOLDOWN]]]` as fields of `alert.create`. Raises ConfigError."""
    names = ("on_threshold", "off_threshold", "hold_s", "clear_hold_s", "cooldown_s")
    try:
        values = [float(part) for part in text.split(":")]
        if not 2 <= len(values) <= len(names):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"cannot read --at {text!r}", remedy="write ON:OFF, for example 0.7:0.4"
        ) from None
    rule: dict[str, Any] = dict(zip(names, values, strict=False))
    AlertRule(question="?", **rule)  # raises if it makes no sense
    return rule


def calibrated_rules(path: Path | None) -> dict[str, dict[str, Any]]:
    """The rules of a calibration's section `alerts`, by their questions. Raises ConfigError."""
    section = None if path is None else Calibration.read(path).find(AlertsSection, path)
    if section is None:
        raise ConfigError(
            f"--at {CALIBRATED} takes the alerts of a calibration, and there are none",
            where=path,
            remedy="name with --calibration a file that `edge-vlm calibrate --marks` wrote",
        )
    return {alert.question: dict(alert.rule) for alert in section.alerts}


HEAD = (
    *("on:off:hold", "recall", "delay median, p90", "false alarms", "per hour", "repeats"),
    *("overhang", "frame to alert"),
)


def table(scores: Mapping[str, Score]) -> str:
    """One row a setting."""
    rows = [HEAD]
    for name, score in scores.items():
        low, high = score.events.interval()
        recall = f"{score.events.right}/{score.events.asked} {score.events.share:.1%}"
        delay, overhang, age = map(_spread, (score.delays_s, score.overhangs_s, score.ages_s))
        rows.append(
            (
                name,
                f"{recall} [{low:.0%}, {high:.0%}]",
                f"{delay['median']:.1f} s, {delay['p90']:.1f} s" if delay else "-",
                str(score.false_alarms),
                f"{score.false_per_hour:.1f}",
                str(score.repeats),
                f"{overhang['median']:.1f} s" if overhang else "-",
                f"{1e3 * age['median']:.0f} ms" if age else "-",
            )
        )
    return "\n".join(columns(rows, "<>"))
