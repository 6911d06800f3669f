"""What a file's numbers must be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SettingValue = bool | int | float | str


def number(value: Any) -> float:
    """Raises TypeError for no number, ValueError for one that is not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is no number")
    if not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def count(value: Any) -> int:
    """Raises TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is no whole number")
    if value < 0:
        raise ValueError(f"{value!r} is below 0")
    return value


def numbers(values: Any) -> tuple[float, ...]:
    return tuple(number(value) for value in values)


def settings(given: Any, known: frozenset[str]) -> Mapping[str, SettingValue]:
    """Raises ValueError for a setting that the section has no say in."""
    strangers = sorted(set(given) - known)
    if strangers:
        raise ValueError(f"it holds settings that it has no say in: {', '.join(strangers)}")
    for name, value in given.items():
        if not isinstance(value, (bool, str)):
            number(value)
        elif name not in ("policy", "drop_duplicates"):
            raise TypeError(f"{name} is {value!r}, no number")
    return dict(given)
