"""JSON of strangers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MALFORMED = (
    *(LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError),
)
"""What comes of using values that are not what they should be, huge numbers included."""
MOST_DIGITS = 40
"""Of a whole number: longer ones are no float any more, and take long to read."""


def fault_of(error: Exception) -> str:
    """What is wrong, for people, where using a stranger's values raised one of MALFORMED."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, TypeError | AttributeError):
        return f"a value is of the wrong kind ({error})"
    return str(error) or type(error).__name__


def parse_json(text: str | bytes | bytearray) -> Any:
    """Raises ValueError, for what is nested too deeply too (`json` has RecursionError for that),
    and for whole numbers of very many digits."""
    try:
        return json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises ValueError, OSError."""
    data = parse_json(path.read_text(encoding="utf-8-sig"))
    if not isinstance(data, dict):
        raise ValueError(f"it holds {'a list' if isinstance(data, list) else 'a value'}, no object")
    return data


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """Of a file of JSON lines, those that say something, counted from 1. Raises ValueError,
    OSError."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")  # texts may hold other line breaks
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)
