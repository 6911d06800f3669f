"""The rules of an alert, without a model and without a session."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_vlm.errors import (
    AlertsUnsupported,
    ConfigError,
    TooManyAlerts,
    UnknownAlert,
)
from edge_vlm.hysteresis import AlertState, Change, Hysteresis
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.protocol.alerts import AlertCreate, AlertRule
from edge_vlm_runtime.session.alert_rules import Alert, AlertFrame, AlertRegistry, YesNo

QUESTION = "is there a red ball ?"
BEGAN, ENDED = Change.BEGAN, Change.ENDED


def rule(**fields: Any) -> AlertRule:
    return AlertRule(**{"question": QUESTION, "on_threshold": 0.7, "off_threshold": 0.4, **fields})


def changes(machine: Hysteresis, *probabilities: float) -> list[Change | None]:
    """One measurement a second."""
    return [machine.update(float(second), p) for second, p in enumerate(probabilities)]


def test_hysteresis_begins_high_and_ends_low() -> None:
    found = changes(Hysteresis(rule()), 0.1, 0.69, 0.7, 0.5, 0.4, 0.39, 0.5, 0.8)
    assert found == [None, None, BEGAN, None, None, ENDED, None, BEGAN]


def test_equal_thresholds_change_at_every_crossing_and_never_at_once() -> None:
    machine = Hysteresis(rule(on_threshold=0.5, off_threshold=0.5))
    assert changes(machine, 0.5, 0.5, 0.49, 0.5) == [BEGAN, None, ENDED, BEGAN]


def test_a_hold_lets_only_what_lasts_begin() -> None:
    machine = Hysteresis(rule(hold_s=2.0))
    assert changes(machine, 0.9, 0.9, 0.6, 0.9, 0.9, 0.9) == [None] * 5 + [BEGAN]
    assert machine.began_s == 5.0


def test_states_tell_what_is_about_to_happen() -> None:
    machine = Hysteresis(rule(hold_s=1.0))
    states = [machine.state]
    for time_s in (0.0, 1.0):
        machine.update(time_s, 0.9)
        states.append(machine.state)
    assert states == [AlertState.IDLE, AlertState.HOLDING, AlertState.ACTIVE]


def test_a_hold_at_the_end_bridges_gaps() -> None:
    machine = Hysteresis(rule(clear_hold_s=2.0))
    found = changes(machine, 0.9, 0.1, 0.1, 0.5, 0.1, 0.1, 0.1)
    assert found == [BEGAN, None, None, None, None, None, ENDED]


def test_a_cool_down_delays_the_next_begin() -> None:
    machine = Hysteresis(rule(cooldown_s=3.0))
    found = changes(machine, 0.9, 0.1, 0.9, 0.9, 0.9, 0.9)
    assert found == [BEGAN, ENDED, None, None, BEGAN, None]


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=60),
    st.floats(0.05, 1),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.5, 1.0, 2.5]),
    st.sampled_from([0.0, 1.0, 2.0]),
    st.sampled_from([0.0, 1.5, 4.0]),
)
def test_begins_and_ends_keep_every_promise(
    probabilities: list[float],
    on: float,
    share: float,
    hold_s: float,
    clear_hold_s: float,
    cooldown_s: float,
) -> None:
    machine = Hysteresis(
        rule(
            on_threshold=on,
            off_threshold=on * share,
            hold_s=hold_s,
            clear_hold_s=clear_hold_s,
            cooldown_s=cooldown_s,
        )
    )
    times = [0.5 * i for i in range(len(probabilities))]
    last: Change | None = ENDED
    ended_s = -math.inf
    for time_s, probability in zip(times, probabilities, strict=True):
        change = machine.update(time_s, probability)
        if change is None:
            continue
        hold = hold_s if change is BEGAN else clear_hold_s
        recent = [
            p for t, p in zip(times, probabilities, strict=True) if time_s - hold <= t <= time_s
        ]
        assert change is not last
        if change is BEGAN:
            assert min(recent) >= on
            assert time_s >= ended_s + cooldown_s - 1e-5
        else:
            assert max(recent) < on * share
            ended_s = time_s
        last = change


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("question", ""),
        ("question", "  \n"),
        ("on_threshold", 1.5),
        ("on_threshold", math.nan),
        ("off_threshold", -0.1),
        ("off_threshold", 0.8),
        ("hold_s", -1.0),
        ("clear_hold_s", math.inf),
        ("cooldown_s", math.nan),
        ("interval_s", -0.5),
    ],
)
def test_rules_that_make_no_sense_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        rule(**{field: value})


def test_a_threshold_of_nothing_would_always_be_reached() -> None:
    with pytest.raises(ConfigError, match="on_threshold"):
        rule(on_threshold=0.0, off_threshold=0.0)


def test_a_message_holds_a_rule_and_nothing_else() -> None:
    assert AlertCreate(question=QUESTION, event_id="e").rule() == AlertRule(question=QUESTION)


# ---- the alerts of a session -----------------------------------------------------------------


def frame(seq: int, time_s: float) -> AlertFrame:
    return AlertFrame(
        seq=seq,
        time_s=time_s,
        capture_us=round((100 + time_s) * 1e6),
        received_ns=0,
        data=b"",
    )


def test_the_registry_names_alerts_and_is_bounded() -> None:
    registry = AlertRegistry(max_alerts=2)
    names = [registry.create(rule()).alert_id for _ in range(2)]
    with pytest.raises(TooManyAlerts, match="2 alerts"):
        registry.create(rule())
    with pytest.raises(UnknownAlert, match="alert_9"):
        registry.delete("alert_9")
    registry.delete(names[0])
    assert registry.create(rule()).alert_id not in names


def test_every_new_frame_is_checked_once() -> None:
    registry = AlertRegistry(max_alerts=4)
    alert = registry.create(rule())
    assert registry.due() == []  # there is nothing to look at
    for sequence in (1, 2):
        registry.on_frame(frame(sequence, sequence * 0.5))
        assert registry.due() == [alert]
        registry.measured(alert, 0.1, 1.0)
        assert registry.due() == []


def test_an_interval_spares_checks_and_catches_up_on_the_newest_frame() -> None:
    registry = AlertRegistry(max_alerts=4)
    alert = registry.create(rule(interval_s=1.0))
    checked = []
    for sequence in range(1, 8):
        registry.on_frame(frame(sequence, sequence * 0.4))
        if registry.due():
            registry.measured(alert, 0.1, 1.0)
            checked.append(sequence)
    assert checked == [1, 4, 7]
    registry.on_frame(frame(8, 3.2))
    assert registry.due() == []
    registry.on_duplicate(round(103.8 * 1e6))  # the picture stays; time comes
    assert registry.due() == [alert]


def test_time_alone_completes_a_hold_while_the_picture_stays() -> None:
    registry = AlertRegistry(max_alerts=4)
    alert = registry.create(rule(hold_s=2.0))
    registry.on_frame(frame(1, 0.0))
    registry.measured(alert, 0.9, 1.0)
    assert registry.on_duplicate(round(101.9 * 1e6)) == []
    assert registry.on_duplicate(round(102.0 * 1e6)) == [(alert, BEGAN)]
    assert (alert.episode, registry.now_s) == (1, 2.0)


def test_time_says_nothing_about_a_picture_that_was_not_checked() -> None:
    registry = AlertRegistry(max_alerts=4)
    alert = registry.create(rule(hold_s=2.0))
    registry.on_frame(frame(1, 0.0))
    registry.measured(alert, 0.9, 1.0)
    registry.on_frame(frame(2, 1.0))
    assert registry.on_duplicate(round(104 * 1e6)) == []


def test_a_failed_check_changes_nothing_and_is_told_once() -> None:
    registry = AlertRegistry(max_alerts=4)
    alert = registry.create(rule())
    told = []
    for sequence in range(1, 5):
        registry.on_frame(frame(sequence, float(sequence)))
        told.append(registry.failed(alert))
        assert registry.due() == []
    assert told == [True, False, False, False]
    assert alert.hysteresis.state is AlertState.IDLE
    registry.on_frame(frame(5, 5.0))
    assert registry.measured(alert, 0.9, 1.0) is BEGAN
    assert registry.failed(alert)


def test_an_alert_that_was_never_measured_does_not_move() -> None:
    assert Alert("alert_1", rule()).update(5.0) is None


# ---- reading logits --------------------------------------------------------------------------


class Words:
    """A tokenizer of whole words; others are cut into letters."""

    def __init__(self, *words: str) -> None:
        self._words = words

    def encode(self, text: str) -> list[int]:
        return [self._words.index(text)] if text in self._words else [90 + len(text)] * len(text)

    def decode(self, ids: list[int]) -> str:
        return " ".join(self._words[i] if i < len(self._words) else "?" for i in ids)


def test_yes_and_no_are_summed_over_their_spellings() -> None:
    reader = YesNo(Words("maybe", "yes", " Yes", "no", "No"))  # type: ignore[arg-type]
    shares = np.array([0.2, 0.3, 0.3, 0.1, 0.1])
    probability, mass = reader.read(np.log(shares).astype(np.float32))
    assert probability == pytest.approx(0.75, abs=1e-6)
    assert mass == pytest.approx(0.8, abs=1e-6)


def test_a_vocabulary_without_the_words_cannot_watch() -> None:
    with pytest.raises(AlertsUnsupported, match="'no'"):
        YesNo(Words("yes", "nope"))  # type: ignore[arg-type]


@given(st.lists(st.floats(-80, 80, width=32), min_size=2, max_size=2))
def test_any_logits_give_a_share(pair: list[float]) -> None:
    tokenizer = Tokenizer.from_file(DEMO_BUNDLE / "tokenizer.json")
    logits = np.zeros(200, np.float32)
    yes, no = tokenizer.encode("yes")[0], tokenizer.encode("no")[0]
    logits[[yes, no]] = pair
    probability, mass = YesNo(tokenizer).read(logits)
    assert 0 <= probability <= 1
    assert 0 <= mass <= 1 + 1e-9
    expected = 1 / (1 + math.exp(min(pair[1] - pair[0], 700)))
    assert probability == pytest.approx(expected, rel=1e-6, abs=1e-12)
