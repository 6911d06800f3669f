"""What `edge-vlm inspect` found out about a folder, as lines for people or JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edge_vlm.console.tables import columns
from edge_vlm.errors.words import visible


@dataclass(frozen=True, kw_only=True)
class Report:
    """`facts` are sentences by name; `tables` hold figures by name, each table under its title.

    A figure is an amount and its unit, such as (81, "cells") or (4_850_869_200, "").
    """

    title: str
    facts: Mapping[str, str]
    tables: Mapping[str, Mapping[str, tuple[float, str]]]
    notes: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    """More for programs alone, such as the whole config."""

    def text(self) -> str:
        lines = [self.title, "", *columns(list(self.facts.items()))]
        for title, rows in self.tables.items():
            figures = [(name, _amount(*figure)) for name, figure in rows.items()]
            lines += ["", title, *columns(figures, "<>")]
        if self.notes:
            lines += ["", *self.notes]
        return "\n".join(map(visible, lines))  # some are words of strangers

    def json(self) -> str:
        tables = {
            title: {name: amount for name, (amount, _) in rows.items()}
            for title, rows in self.tables.items()
        }
        known = {"title": self.title, "facts": dict(self.facts), **tables}
        return json.dumps(known | dict(self.data), indent=1)


def _amount(amount: float, unit: str) -> str:
    if unit == "bytes":
        return gigabytes(amount)
    return f"{amount:,} {unit}".rstrip()


def gigabytes(num_bytes: float) -> str:
    """In the largest decimal unit that leaves a whole number in front: "19.40 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} B"
