"""Rules for alerts: the runtime's own state machine over what was said, and people's marks."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_vlm.errors import ConfigError
from edge_vlm.evaluation.intervals import garwood
from edge_vlm.formats.calibrated.alerts import RULE_FIELDS, AlertsSection
from edge_vlm_calibration.alerts.checking import Series
from edge_vlm_calibration.alerts.make import alert_lines
from edge_vlm_calibration.alerts.marks import Watch, read_marks, watches_of
from edge_vlm_calibration.alerts.thresholds import (
    HOLDS_S,
    THRESHOLDS,
    Rule,
    choose,
    described,
    notes_on,
    outcome_of,
    shown_by,
    together,
)
from edge_vlm_runtime.cameras.config import read_plan
from edge_vlm_runtime.cli.common.config import read_toml

STEP_S = 0.5


def series(probabilities: list[float], *events: tuple[float, float], name: str = "cat") -> Series:
    times_s = [STEP_S * i for i in range(len(probabilities))]
    watch = Watch(name, "Is there a cat now?", "a.mp4", 0, tuple(events))
    return Series(watch, times_s, probabilities, 0.99, STEP_S * len(probabilities))


def noisy(seed: int, length: int = 400) -> Series:
    """Events of ten seconds that are seen, and shorter bursts that are none."""
    rng = np.random.default_rng(seed)
    values = rng.beta(1, 12, length)
    events = []
    for begin in range(40, length - 40, 80):
        values[begin : begin + 20] = rng.beta(8, 2, 20)
        events.append((begin * STEP_S, (begin + 20) * STEP_S))
        values[begin + 45 : begin + 47] = rng.beta(9, 2, 2)  # a second of something else
    return series(values.tolist(), *events)


def test_a_rule_is_as_good_as_any() -> None:
    """Against all thresholds and holds that there are, by brute force."""
    watched = [noisy(seed) for seed in range(3)]
    hours = sum(each.length_s for each in watched) / 3600
    others = [
        outcome_of(Rule(on, off * on, hold), watched, 0.0)
        for on, hold, off in itertools.product(THRESHOLDS, HOLDS_S, (0.6,))
    ]
    for wanted in (1.0, 40.0, 400.0):
        rule = choose(watched, wanted, 0.0)
        found = outcome_of(rule, watched, 0.0)
        allowed = [each for each in others if each.false_alarms <= wanted * hours]
        if allowed:
            assert found.false_alarms <= wanted * hours
            assert found.noticed >= max(each.noticed for each in allowed)
    assert choose(watched, 1.0, 0.0).hold_s > 0  # or the bursts would be alarms


def test_the_middle_of_equal_thresholds_is_taken() -> None:
    clean = series([0.1] * 20 + [0.9] * 20 + [0.1] * 20, (10.0, 20.0))
    rule = choose([clean], 1.0, 0.0)
    assert 0.4 < rule.on_threshold < 0.6
    assert 0.1 < rule.off_threshold < rule.on_threshold
    alert = described(rule, "a cat!", "Is there a cat now?", [clean], 1.0, 0.0)
    assert (alert.name, alert.noticed, alert.false_alarms, alert.delay_s) == ("a-cat", 1, 0, 0.0)
    assert alert.false_interval[1] == pytest.approx(3.689 / (30 / 3600), rel=1e-3)
    assert not notes_on(alert, 1.0)
    (note,) = shown_by([alert], 1.0)
    assert "3.7 h without one would" in note
    assert [p.false_alarms for p in alert.curve] == sorted(
        (p.false_alarms for p in alert.curve), reverse=True
    )


def test_what_cannot_be_held_is_said() -> None:
    wrong = series([0.1] * 10 + [0.999] * 10 + [0.1] * 10 + [0.9] * 10, (15.0, 20.0))
    alert = described(choose([wrong], 0.1, 0), "cat", "?", [wrong], 0.1, 0)
    assert alert.meets
    assert alert.noticed == 0
    assert any("no event is noticed" in note for note in notes_on(alert, 0.1))
    always = series([1.0] * 40)
    alert = described(choose([always], 0.1, 0), "cat", "?", [always], 0.1, 0)
    assert not alert.meets
    assert any("no rule holds 0.1 false alarms" in note for note in notes_on(alert, 0.1))


def test_one_rule_is_told_as_one() -> None:
    """Its false alarms are counted together; of one question alone they say nothing of rules."""
    quiet = series([0.1] * 7200, name="quiet")
    wrong = series([0.1] * 10 + [0.9] * 10 + [0.1] * 10, (0.0, 2.0))
    rule = Rule(0.5, 0.3)
    alerts = [described(rule, each.watch.alert, "?", [each], 1.0, 0) for each in (quiet, wrong)]
    assert [alert.meets for alert in alerts] == [True, False]
    assert together(alerts, 1.0).endswith("1 false alarms in 1.00 h (0.03..5.55 an hour)")
    assert together(alerts, 0.5).endswith("no rule holds 0.5 an hour here")
    assert "0 of 1 events noticed" in together(alerts, 1.0)
    (_, said) = notes_on(alerts[1], 1.0, is_shared=True)
    assert "the rule of all has 1 false alarms" in said
    assert "no rule holds" not in said


def test_duplicates_keep_what_was_measured() -> None:
    held = series([0.1, 0.9, math.nan, math.nan, 0.1, math.nan], (0.5, 2.0))
    assert outcome_of(Rule(0.5, 0.3, hold_s=1.0), [held], 0.0).noticed == 1
    assert outcome_of(Rule(0.5, 0.3, hold_s=2.0), [held], 0.0).noticed == 0


@pytest.mark.parametrize(
    ("count", "low", "high"),
    [(0, 0.0, 3.689), (1, 0.0253, 5.572), (5, 1.623, 11.668), (100, 81.364, 121.627)],
)
def test_intervals_are_those_of_the_tables(count: int, low: float, high: float) -> None:
    """F. Garwood (1936); a Poisson distribution's exact limits."""
    assert list(garwood(count)) == pytest.approx([low, high], abs=1e-3)


def test_a_server_reads_the_lines(tmp_path: Path) -> None:
    watched = [noisy(0)]
    rule = choose(watched, 1.0, 0.0)
    alert = described(rule, 'the "cat"', 'Is it a "cat" \\ now?', watched, 1.0, 0.0)
    section = AlertsSection(wanted_false_per_h=1.0, slack_s=0.0, alerts=(alert,))
    assert AlertsSection.from_data(json.loads(json.dumps(section.to_data()))) == section
    file = tmp_path / "server.toml"
    file.write_text(
        '[[camera]]\nname = "door"\nsource = "a.mp4"\n\n' + alert_lines(section, "door")
    )
    (found,) = read_plan(read_toml(file), file).alerts
    assert (found.name, found.camera) == ("the-cat", "door")
    assert found.rule.question == alert.question
    assert {name: getattr(found.rule, name) for name in RULE_FIELDS} == alert.rule


def read(tmp_path: Path, text: str, clips: tuple[str, ...] = ("a.mp4",)) -> Any:
    file = tmp_path / "marks.csv"
    file.write_text(text)
    return watches_of(read_marks(file, clips), dict.fromkeys(clips, 90.0))


def test_marks_in_both_forms_are_the_same(tmp_path: Path) -> None:
    text = (
        "\ufeffalert, question, clip, start, end\n"
        'cat,"Is there a cat, now?",a.mp4,0:12,14.5\n'
        "cat,,a.mp4,1:05.5,0:01:20\n"
        "dog,Is there a dog?,a.mp4,,\n"
    )
    marks = [
        {"alert": "cat", "question": "Is there a cat, now?", "start": 65.5, "end": 80},
        {"alert": "cat", "start": 12, "end": "14.5"},
        {"alert": "dog", "question": "Is there a dog?"},
    ]
    expected = [
        Watch("cat", "Is there a cat, now?", "a.mp4", 0, ((12.0, 14.5), (65.5, 80.0))),
        Watch("dog", "Is there a dog?", "a.mp4", 0, ()),
    ]
    assert read(tmp_path, text) == expected
    assert read(tmp_path, json.dumps(marks)) == expected


HEAD = "alert,question,clip,start,end\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the first line must name the columns"),
        ("cat,1,2\n", "the first line must name the columns"),
        (HEAD, "there are no marks"),
        (HEAD + "cat,Cat?,a.mp4,80,95\n", r"80\.\.95 s lies outside a\.mp4, which is 90\.0 s long"),
        (HEAD + "cat,Cat?,a.mp4,10,20\ncat,,a.mp4,15,30\n", r"overlap.*csv:2 and .*csv:3"),
        (HEAD + "cat,Cat?,a.mp4,20,10\n", "start must be before end"),
        (HEAD + "cat,Cat?,a.mp4,soon,20\n", r"'soon' is no time \(.*csv:2\)"),
        (HEAD + "cat,Cat?,a.mp4,1:75,200\n", "'1:75' is no time"),
        (HEAD + "cat,Cat?,a.mp4,10,\n", "'' is no time"),
        (HEAD + "cat,Cat?,a.mp4,nan,20\n", "'nan' is no time"),
        (HEAD + "cat,Cat?,b.mp4,10,20\n", "there is no clip 'b.mp4'.*there are: a.mp4"),
        (HEAD + "cat,,a.mp4,10,20\n", "the question of 'cat' is missing"),
        (HEAD + ",Cat?,a.mp4,10,20\n", "alert is missing"),
        (HEAD + "cat,Cat?,a.mp4,1,2\ncat,Dog?,a.mp4,3,4\n", "has two questions"),
        (HEAD + "cat,Cat?,a.mp4,1,2,3\n", "more fields than columns"),
        (HEAD + "cat,Cat?,a.mp4,1,2\ncat,,a.mp4,,\n", r"nothing of it happens.*csv:3 and .*csv:2"),
        ('[{"alert": "cat", "begin": 1}]', "unknown field 'begin'"),
        ('[{"alert": "cat", "question": ["Cat?"]}]', r"question is \['Cat\?'\], no text"),
        ("{}", "must be a list"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_wrong_marks_are_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, text)
