from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_vlm.metrics import Counter, Gauge, Histogram, Metric, render

SAMPLE = re.compile(
    r'([a-z_:]+)(?:\{((?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? (\+Inf|-?[0-9.e+-]+)'
)


def samples(metric: Metric) -> dict[str, float]:
    """Every sample by its name and labels; fails on a line that is none of the format."""
    found = {}
    for line in render([metric]).splitlines():
        if line.startswith("# "):
            assert re.match(r"# (HELP|TYPE) [a-z_:]+ .", line)
            continue
        match = SAMPLE.fullmatch(line)
        assert match, line
        name = match[1] if match[2] is None else f"{match[1]}{{{match[2]}}}"
        assert name not in found
        found[name] = math.inf if match[3] == "+Inf" else float(match[3])
    return found


def test_counters() -> None:
    counter = Counter("frames_total", "Frames.\nAll of them.")
    assert samples(counter) == {"frames_total": 0}
    counter.inc()
    counter.inc(2)
    assert render([counter]) == (
        "# HELP frames_total Frames.\\nAll of them.\n# TYPE frames_total counter\nframes_total 3\n"
    )
    with pytest.raises(ValueError, match="only rises"):
        counter.inc(-1)
    labelled = Counter("dropped_total", "Dropped.", "reason")
    assert samples(labelled) == {}
    labelled.inc(label="busy")
    labelled.inc(label="rate")
    labelled.inc(label="busy")
    assert samples(labelled) == {
        'dropped_total{reason="busy"}': 2,
        'dropped_total{reason="rate"}': 1,
    }


def test_gauges_are_read_when_asked_for_and_absent_when_there_is_nothing() -> None:
    values: list[float | None] = [None, 1.5]
    gauge = Gauge("memory_bytes", "Memory.", lambda: values[0])
    assert render([gauge]) == ""
    values[0] = 3e9
    assert samples(gauge) == {"memory_bytes": 3e9}
    assert samples(Gauge("w", "Power.", lambda: {"0": 1.5, "1": 2.0}, "gpu")) == {
        'w{gpu="0"}': 1.5,
        'w{gpu="1"}': 2.0,
    }
    assert render([Gauge("w", "Power.", lambda: {}, "gpu")]) == ""


@given(st.text(max_size=20))
def test_any_label_stays_one_sample(text: str) -> None:
    counter = Counter("errors_total", text, "code")
    counter.inc(label=text)
    lines = render([counter]).split("\n")
    assert len(lines) == 4 and lines[3] == ""
    escaped = lines[2].removeprefix('errors_total{code="').removesuffix('"} 1')
    unescaped = re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], escaped)
    assert unescaped == text


@given(st.lists(st.floats(-10, 100)), st.lists(st.floats(0.01, 50), unique=True, min_size=1))
def test_histograms_count_what_lies_at_or_below_each_bound(
    values: list[float], bounds: list[float]
) -> None:
    histogram = Histogram("seconds", "Time.", buckets=sorted(bounds))
    for value in values:
        histogram.observe(value)
    found = samples(histogram)
    buckets = {
        float(name.removeprefix('seconds_bucket{le="').removesuffix('"}').replace("+I", "i")): count
        for name, count in found.items()
        if "bucket" in name
    }
    assert set(buckets) == {*bounds, math.inf}
    for bound, count in buckets.items():
        assert count == sum(value <= bound for value in values)
    assert found["seconds_count"] == len(values)
    assert found["seconds_sum"] == pytest.approx(sum(values), abs=1e-6)


def test_histograms_with_a_label() -> None:
    histogram = Histogram("stage_seconds", "Time.", "stage", buckets=(0.1,))
    histogram.observe(0.05, "decode")
    histogram.observe(0.5, "prefill")
    found = samples(histogram)
    assert found['stage_seconds_bucket{stage="decode",le="0.1"}'] == 1
    assert found['stage_seconds_bucket{stage="prefill",le="0.1"}'] == 0
    assert found['stage_seconds_count{stage="prefill"}'] == 1
