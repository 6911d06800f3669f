"""Counters, gauges and histograms in Prometheus' text format (exposition format 0.0.4).

Not safe for threads: one thread changes and renders them. Names carry base units (`_seconds`,
`_bytes`); a metric has at most one label.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LATENCY_BUCKETS_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 30.0),
)


class Metric(Protocol):
    def lines(self) -> list[str]:
        """Samples, behind the lines about the metric."""


class Counter:
    """Only rises."""

    def __init__(self, name: str, help: str, label: str | None = None) -> None:
        self._name, self._help, self._label = name, help, label
        self._values: dict[str, float] = {} if label else {"": 0.0}

    def inc(self, amount: float = 1.0, label: str = "") -> None:
        """`label`: value of the metric's label."""
        if amount < 0:
            raise ValueError(f"{self._name} only rises, got {amount}")
        self._values[label] = self._values.get(label, 0.0) + amount

    def lines(self) -> list[str]:
        return _head(self._name, self._help, "counter") + [
            _sample(self._name, _labels(self._label, value), number)
            for value, number in sorted(self._values.items())
        ]


class Gauge:
    """Read when it is asked for; no sample when there is nothing to read."""

    def __init__(
        self,
        name: str,
        help: str,
        read: Callable[[], float | Mapping[str, float] | None],
        label: str | None = None,
    ) -> None:
        """`read` returns a value, with a label one for each of its values, or None."""
        self._name, self._help, self._read, self._label = name, help, read, label

    def lines(self) -> list[str]:
        found = self._read()
        values = found if isinstance(found, Mapping) else {} if found is None else {"": found}
        if not values:
            return []
        return _head(self._name, self._help, "gauge") + [
            _sample(self._name, _labels(self._label, value), number)
            for value, number in sorted(values.items())
        ]


class Histogram:
    """How often values lay below each of some bounds."""

    def __init__(
        self,
        name: str,
        help: str,
        label: str | None = None,
        buckets: Sequence[float] = LATENCY_BUCKETS_S,
    ) -> None:
        self._name, self._help, self._label = name, help, label
        self._buckets = tuple(buckets)
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}
        if label is None:
            self._of("")

    def _of(self, label: str) -> list[int]:
        if label not in self._counts:
            self._counts[label] = [0] * (len(self._buckets) + 1)
            self._sums[label] = 0.0
        return self._counts[label]

    def observe(self, value: float, label: str = "") -> None:
        counts = self._of(label)
        counts[bisect_left(self._buckets, value)] += 1
        self._sums[label] += value

    def lines(self) -> list[str]:
        lines = _head(self._name, self._help, "histogram")
        for value, counts in sorted(self._counts.items()):
            labels = _labels(self._label, value)
            below = 0
            for bound, count in zip((*self._buckets, math.inf), counts, strict=True):
                below += count
                le = {**labels, "le": _number(bound)}
                lines.append(_sample(f"{self._name}_bucket", le, below))
            lines.append(_sample(f"{self._name}_sum", labels, self._sums[value]))
            lines.append(_sample(f"{self._name}_count", labels, below))
        return lines


def render(metrics: Sequence[Metric]) -> str:
    """The whole page."""
    return "".join(f"{line}\n" for metric in metrics for line in metric.lines())


def _head(name: str, help: str, kind: str) -> list[str]:
    text = help.replace("\\", "\\\\").replace("\n", "\\n")
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _labels(name: str | None, value: str) -> dict[str, str]:
    return {} if name is None else {name: value}


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"{name}{{{inside}}} {_number(value)}" if inside else f"{name} {_number(value)}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(float(value))
