"""Reading the JSON of a request: each value with its path, so that an error can name it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from edge_vlm.errors.requests import RequestError

MAX_SHOWN = 60
"""Characters of something wrong that are repeated."""


class Fields:
    """An object of a request. What nobody took is left over."""

    def __init__(self, value: object, path: str) -> None:
        """Raises RequestError unless it is an object."""
        if not isinstance(value, dict):
            raise wrong(value, path, "an object")
        self._values = {name: each for name, each in value.items() if each is not None}
        self.path = path

    def _at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def has(self, name: str) -> bool:
        """Whether it is there, and not null."""
        return name in self._values

    def any(self, name: str) -> Any:
        return self._values.pop(name, None)

    def object(self, name: str) -> Fields:
        """An empty one if it is absent."""
        return Fields(self._values.pop(name, {}), self._at(name))

    def text(self, name: str, default: str | None = None) -> str:
        """Raises RequestError when it is absent and has no default."""
        value = self._values.pop(name, default)
        if not isinstance(value, str):
            raise wrong(value, self._at(name), "text")
        return value

    def one_of(self, name: str, allowed: Iterable[str], default: str) -> str:
        value = self.text(name, default)
        if value not in allowed:
            raise wrong(value, self._at(name), f"one of {', '.join(allowed)}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._values.pop(name, default)
        if not isinstance(value, bool):
            raise wrong(value, self._at(name), "true or false")
        return value

    def whole(self, name: str, least: int, most: int = 1 << 53) -> int | None:
        value = self._values.pop(name, None)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise wrong(value, self._at(name), f"a whole number in {least}..{most}")
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self._values.pop(name, None)
        return None if value is None else as_number(value, self._at(name), least, most)

    def items(self, name: str) -> list[Any]:
        """An empty one if it is absent."""
        value = self._values.pop(name, [])
        if not isinstance(value, list):
            raise wrong(value, self._at(name), "a list")
        return value

    def rest(self) -> list[str]:
        """Names of what nobody took."""
        return sorted(self._values)

    def require_empty(self) -> None:
        """Raises RequestError naming what nobody took."""
        if self._values:
            name = self.rest()[0]
            raise RequestError(
                f"unknown field {name[:MAX_SHOWN]!r}",
                param=self._at(name)[:MAX_SHOWN],
                remedy="docs/api.md names the fields that are known",
            )


def as_number(value: object, path: str, least: float, most: float) -> float:
    """Raises RequestError unless it is a finite number in the range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong(value, path, "a number")
    if not least <= value <= most:  # whole numbers have no bound, and may be too large for a float
        raise wrong(value, path, f"a number in {least:g}..{most:g}")
    return float(value)


def wrong(value: object, path: str, wanted: str) -> RequestError:
    """What to raise: the value at this path is something else than was wanted."""
    if value is None:
        return RequestError(
            f"{path or 'the body'} is missing, it must be {wanted}", param=path or None
        )
    shown = repr(value)
    shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
    return RequestError(f"{path or 'the body'} must be {wanted}, got {shown}", param=path or None)
