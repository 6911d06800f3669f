"""Reads fields of a foreign JSON object and remembers every fault, so that one error lists all."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from edge_vlm.config import MOST_OF_ANYTHING

_NO_DEFAULT = object()
MOST_NUMBER = 1e30
_SHORT = reprlib.Repr()  # lists that hold themselves many times over have no end
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 200
_SHORT.maxlist = _SHORT.maxdict = _SHORT.maxtuple = 20


class Section:
    """One object of a config.json, whose faults go into the list that is given.

    Fields may have several names, by generation; the first that is there counts. A faulty value is
    stood in for by 1, so that reading can go on. An absent section is one fault, not one per field.
    """

    def __init__(self, name: str, data: object, problems: list[str]) -> None:
        self.name = name
        self.data: Mapping[str, Any] = data if isinstance(data, Mapping) else {}
        self._problems = problems
        if not isinstance(data, Mapping):
            problems.append(f"{name} is {show(data)}, expected an object")
            self._problems = []

    def fault(self, field: str, value: object, expected: str) -> None:
        self._problems.append(f"{self.name}.{field} is {show(value)}, expected {expected}")

    def inner(self, *names: str) -> Section:
        """An object inside this one; an empty one where there is none."""
        name = self._present(*names)
        data = self.data[name] if self.has(name) else {}
        return Section(f"{self.name}.{name}", data, self._problems)

    def has(self, *names: str) -> bool:
        return any(self.data.get(name) is not None for name in names)

    def _present(self, *names: str) -> str:
        return next((name for name in names if self.has(name)), names[0])

    def number(self, *names: str, default: object = _NO_DEFAULT) -> Any:
        """A number above 0, of a size that can be reckoned with."""
        name = self._present(*names)
        value: Any = self.data[name] if self.has(name) else default
        if value is _NO_DEFAULT:
            self._problems.append(f"{self.name} lacks {' or '.join(names)}")
        elif type(value) in (int, float) and 0 < value < MOST_NUMBER:
            return value
        else:
            self.fault(name, value, "a number above 0")
        return 1

    def whole(
        self, *names: str, default: object = _NO_DEFAULT, most: int = MOST_OF_ANYTHING
    ) -> int:
        value = self.number(*names, default=default)
        if value != int(value):
            self.fault(self._present(*names), value, "a whole number")
        elif value > most:
            self.fault(self._present(*names), value, f"at most {most}")
            return 1
        return max(1, int(value))

    def wholes(self, *names: str) -> list[int]:
        """A list of one or more whole numbers, which may be negative; [1] stands in for a fault."""
        name = self._present(*names)
        value = self.data.get(name)
        if isinstance(value, list) and value and all(type(item) is int for item in value):
            return value
        self.fault(name, value, "a list of whole numbers")
        return [1]

    def expect(self, wanted: object, *names: str) -> None:
        """Where one of these fields is given, it must have the one value that is computed here."""
        for name in names:
            if name in self.data and self.data[name] != wanted:
                self.fault(name, self.data[name], repr(wanted))


def show(value: object) -> str:
    """A value as it stands in a message, cut off where it is long."""
    text = _SHORT.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
