"""Chooses a rule: no more false alarms than wanted, then as many events noticed as can be.

The state machine is the runtime's own (`edge_vlm.hysteresis`), run over what the model said. Of
thresholds that do equally well the middle one is taken, as far from either mistake as can be.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from edge_vlm.evaluation.intervals import garwood, wilson
from edge_vlm.formats.calibrated.alerts import AlertPoint, CalibratedAlert
from edge_vlm.hysteresis import Change, Hysteresis
from edge_vlm_calibration.alerts.checking import Series
from edge_vlm_calibration.alerts.marks import slug

TAILS = (0.001, 0.002, 0.005, 0.01)
THRESHOLDS = (
    *TAILS,
    *(round(0.02 * step, 2) for step in range(1, 50)),
    *(round(1 - tail, 3) for tail in reversed(TAILS)),
)
HOLDS_S = (0.0, 0.5, 1.0, 2.0, 3.0, 5.0)
OFF_SHARES = (1.0, 0.8, 0.6, 0.4, 0.2)
CLEARS_S = (0.0, 1.0, 2.0, 4.0)
COOLDOWNS_S = (0.0, 5.0, 10.0, 30.0)
FIRST_OFF = 0.6
SURE_H = -math.log(0.025)
"""Hours without a false alarm, times a rate, after which the rate is shown at 97.5 %."""


@dataclass(frozen=True)
class Rule:
    on_threshold: float
    off_threshold: float
    hold_s: float = 0.0
    clear_hold_s: float = 0.0
    cooldown_s: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a rule does on the footage."""

    noticed: int
    false_alarms: int
    repeats: int
    delay_s: float | None


def outcome_of(rule: Rule, series: Iterable[Series], slack_s: float) -> Outcome:
    noticed = false_alarms = repeats = 0
    delays_s: list[float] = []
    for each in series:
        events, seen = each.watch.events, set[int]()
        for begin_s in begins(rule, each):
            during = [
                number
                for number, (start_s, end_s) in enumerate(events)
                if start_s - slack_s <= begin_s < end_s + slack_s
            ]
            if not during:
                false_alarms += 1
                continue
            fresh = [number for number in during if number not in seen]
            if not fresh:
                repeats += 1
                continue
            seen.add(fresh[0])
            delays_s.append(begin_s - events[fresh[0]][0])
        noticed += len(seen)
    delay_s = statistics.median(delays_s) if delays_s else None
    return Outcome(noticed, false_alarms, repeats, delay_s)


def begins(rule: Rule, series: Series) -> list[float]:
    """When the alert begins, in seconds of the stream."""
    hysteresis, last = Hysteresis(rule), math.nan
    found = []
    for time_s, probability in zip(series.times_s, series.probabilities, strict=True):
        last = last if math.isnan(probability) else probability
        if not math.isnan(last) and hysteresis.update(time_s, last) is Change.BEGAN:
            found.append(time_s)
    return found


def choose(series: Sequence[Series], wanted_per_h: float, slack_s: float) -> Rule:
    """The rule for these streams."""
    allowed = wanted_per_h * _hours(series)

    def tried(rule: Rule) -> Outcome:
        return outcome_of(rule, series, slack_s)

    def merit(outcome: Outcome) -> tuple[float, ...]:
        """Larger is better. Where no rule holds the rate, the fewest false alarms count first."""
        excess = max(outcome.false_alarms - allowed, 0.0)
        return (-excess, outcome.noticed, -outcome.false_alarms, -outcome.repeats)

    table = {
        hold_s: [(on, tried(Rule(on, FIRST_OFF * on, hold_s))) for on in THRESHOLDS]
        for hold_s in HOLDS_S
    }
    best = max(merit(outcome) for row in table.values() for _, outcome in row)
    # A shorter hold is a shorter delay.
    hold_s = next(h for h, row in table.items() if any(merit(o) == best for _, o in row))
    on = _middle([on for on, outcome in table[hold_s] if merit(outcome) == best])
    rule = Rule(on, FIRST_OFF * on, hold_s)
    clearing = {
        clear_s: [
            (share, tried(replace(rule, off_threshold=round(share * on, 4), clear_hold_s=clear_s)))
            for share in OFF_SHARES
        ]
        for clear_s in CLEARS_S
    }
    best = max(merit(outcome) for row in clearing.values() for _, outcome in row)
    clear_s = next(c for c, row in clearing.items() if any(merit(o) == best for _, o in row))
    share = _middle([share for share, outcome in clearing[clear_s] if merit(outcome) == best])
    rule = replace(rule, off_threshold=round(share * on, 4), clear_hold_s=clear_s)
    options = [replace(rule, cooldown_s=cooldown_s) for cooldown_s in COOLDOWNS_S]
    return max(options, key=lambda option: merit(tried(option)))


def _hours(series: Sequence[Series]) -> float:
    return sum(each.length_s for each in series) / 3600


def described(
    rule: Rule,
    name: str,
    question: str,
    series: Sequence[Series],
    wanted_per_h: float,
    slack_s: float,
) -> CalibratedAlert:
    """What a rule does with one question, with its curve and intervals."""

    def tried(rule: Rule) -> Outcome:
        return outcome_of(rule, series, slack_s)

    hours = _hours(series)
    outcome = tried(rule)
    events = sum(len(each.watch.events) for each in series)
    low, high = garwood(outcome.false_alarms)
    share = outcome.noticed / events if events else 0.0
    curve = []
    for on in THRESHOLDS:
        off = on * rule.off_threshold / rule.on_threshold
        found = tried(replace(rule, on_threshold=on, off_threshold=off))
        curve.append(
            AlertPoint(
                on_threshold=on,
                noticed=found.noticed,
                false_alarms=found.false_alarms,
                delay_s=found.delay_s,
            )
        )
    return CalibratedAlert(
        name=slug(name),
        question=question,
        rule={**vars(rule)},
        meets=outcome.false_alarms <= wanted_per_h * hours,
        events=events,
        noticed=outcome.noticed,
        recall_interval=wilson(share, events),
        false_alarms=outcome.false_alarms,
        watched_h=hours,
        false_interval=(low / hours, high / hours),
        repeats=outcome.repeats,
        delay_s=outcome.delay_s,
        answer_mass=statistics.fmean(each.answer_mass for each in series),
        curve=tuple(curve),
    )


def _middle(values: Sequence[float]) -> float:
    return values[(len(values) - 1) // 2]


def notes_on(alert: CalibratedAlert, wanted_per_h: float, *, is_shared: bool = False) -> list[str]:
    """What to know of it before it is relied on. `is_shared`: its rule is that of all alerts
    together."""
    notes = []
    if alert.events == 0:
        notes.append(f"{alert.name}: no event is marked, so only false alarms could be counted")
    elif alert.noticed == 0:
        notes.append(f"{alert.name}: no event is noticed; the model may not know what is asked")
    if not alert.meets and is_shared:
        notes.append(
            f"{alert.name}: the rule of all has {alert.false_alarms} false alarms in its "
            f"{alert.watched_h:.2f} h; one of its own might have fewer"
        )
    elif not alert.meets:
        notes.append(
            f"{alert.name}: no rule holds {wanted_per_h:g} false alarms an hour here; this one has "
            f"{alert.false_alarms} in {alert.watched_h:.2f} h"
        )
    if alert.answer_mass < 0.5:
        notes.append(
            f"{alert.name}: only {alert.answer_mass:.0%} of the probability is on yes and no: the "
            "model would not answer this question so, ask another way"
        )
    return notes


def together(alerts: Sequence[CalibratedAlert], wanted_per_h: float) -> str:
    """What one rule does with all questions, by which it was chosen."""
    events, noticed = (sum(getattr(a, n) for a in alerts) for n in ("events", "noticed"))
    count, hours = sum(a.false_alarms for a in alerts), sum(a.watched_h for a in alerts)
    least, most = wilson(noticed / events if events else 0.0, events)
    low, high = garwood(count)
    held = "" if count <= wanted_per_h * hours else f": no rule holds {wanted_per_h:g} an hour here"
    return (
        f"one rule for all: {noticed} of {events} events noticed ({least:.0%}..{most:.0%}), "
        f"{count} false alarms in {hours:.2f} h ({low / hours:.2f}..{high / hours:.2f} an hour)"
        f"{held}"
    )


def shown_by(alerts: Sequence[CalibratedAlert], wanted_per_h: float) -> list[str]:
    """How much footage it takes to show the wanted rate, where there was less."""
    short = [each for each in alerts if each.meets and each.false_interval[1] > wanted_per_h]
    if not short:
        return []
    least_h = min(each.watched_h for each in short)
    most = max(each.false_interval[1] for each in short)
    names = short[0].name if len(short) == 1 else f"{len(short)} alerts"
    return [
        f"{names}: {least_h:.2f} h of footage cannot show that there are no more than "
        f"{wanted_per_h:g} false alarms an hour (up to {most:.1f} are possible); "
        f"{SURE_H / wanted_per_h:.1f} h without one would"
    ]
