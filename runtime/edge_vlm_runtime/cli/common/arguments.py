"""What a settings class says about its fields as arguments of a command.

An option is a field with a default; everything else derives from it: the field `max_sessions` is
`--max-sessions`, `max_sessions` in a file and EDGE_VLM_MAX_SESSIONS in the environment. Light to
import, and `doctor` uses it where nothing is installed: plain Python, no library.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from edge_vlm.console.options import About, abouts_of
from edge_vlm.errors import ConfigError
from edge_vlm_runtime.sources.masking import mask_credentials

PREFIX = "EDGE_VLM_"
WORDS = {"1": True, "true": True, "yes": True, "on": True} | {
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}
KINDS = {bool: "true or false", list: "a list of texts", str: "a text", Path: "a text"}
"""What a value must be; the others are numbers."""
TOML_KINDS: dict[type, Any] = {Path: str, float: (int, float)}
METAVARS = {int: "N", float: "N", str: "TEXT", Path: "FILE", list: "TEXT"}
UNIT_METAVARS = {"_s": "SECONDS", "_bytes": "BYTES"}

Kind = TypeVar("Kind")


@dataclass(frozen=True, eq=False)
class Option:
    """One option, which command line, variable or file may set."""

    key: str
    owner: type
    field: str
    kind: type
    """bool, int, float, str, Path or list (of texts)."""
    choices: tuple[str, ...]
    default: Any
    about: About

    @property
    def variable(self) -> str:
        return PREFIX + self.key.upper()

    @property
    def noun(self) -> str:
        return KINDS.get(self.kind, "a number")

    @property
    def example(self) -> str:
        text = json.dumps(str(self.default or next(iter(self.choices), "TEXT")))
        examples = {bool: "true", list: '["TEXT"]', str: text, Path: text}
        return f"{self.key} = {examples.get(self.kind, self.default or 1)}"

    def add_to(self, parser: Any, *, default: Any, is_checked: bool) -> None:
        """To a parser or a group of one."""
        flag = f"--{self.key.replace('_', '-')}"
        text = self.about.text.removesuffix(".").replace("%", "%%")
        has_default = self.kind is not bool and self.default not in (None, "", [])
        if has_default and self.about.shows_default:
            number = isinstance(self.default, float)
            text += f" (default: {self.default:g})" if number else f" (default: {self.default})"
        arguments: dict[str, Any] = {"dest": self.key, "default": default, "help": text}
        if self.kind is bool:
            switch = self.default is False
            arguments["action"] = "store_true" if switch else argparse.BooleanOptionalAction
        else:
            units = (
                metavar for unit, metavar in UNIT_METAVARS.items() if self.field.endswith(unit)
            )
            arguments["metavar"] = self.about.metavar or next(units, METAVARS[self.kind])
            arguments["type"] = partial(self._argument, is_checked)
        if self.kind is list:
            arguments["action"] = "append"
            arguments["type"] = str
        if self.choices:
            del arguments["metavar"]
            arguments["choices"] = self.choices
        parser.add_argument(flag, **arguments)

    def _argument(self, is_checked: bool, text: str) -> Any:
        try:
            value = self.of_text(text)
            if is_checked:
                self.check(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    def of_text(self, text: str) -> Any:
        """The value of a variable or argument. Raises ValueError saying what it must be."""
        if self.kind is list:
            return text.split()
        if self.kind is bool:
            if text.lower() not in WORDS:
                raise ValueError(f"must be true or false, got {text!r}")
            return WORDS[text.lower()]
        return self._converted(text, text)

    def of_toml(self, given: Any, beside: Path) -> Any:
        """The value in a file; a relative path is meant from its folder. Raises ValueError."""
        wanted = TOML_KINDS.get(self.kind, self.kind)
        texts = given if self.kind is list and isinstance(given, list) else ()
        if (
            not isinstance(given, wanted)
            or isinstance(given, bool) != (self.kind is bool)
            or not all(isinstance(text, str) for text in texts)
        ):
            raise ValueError(f"must be {self.noun}, got {mask_credentials(repr(given))}")
        if self.kind in (bool, list):
            return given
        value = self._converted(given, given)
        return beside / value.expanduser() if isinstance(value, Path) else value

    def _converted(self, given: Any, shown: object) -> Any:
        try:
            value = self.kind(given)
        except (ValueError, OverflowError):
            raise ValueError(f"must be {self.noun}, got {mask_credentials(repr(shown))}") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"must be {self.noun}, got {mask_credentials(repr(shown))}")
        if self.choices and value not in self.choices:
            raise ValueError(f"cannot be {shown!r}, only one of {', '.join(self.choices)}")
        return value

    def check(self, value: Any) -> None:
        """Raises ValueError when the class that it belongs to refuses it, and what its own check
        raises."""
        if self.about.check is not None and value is not None:
            self.about.check(value)
        try:
            self.owner(**{self.field: self.in_field(value)})
        except ValueError as error:
            raise ValueError(str(error).removeprefix(f"{self.field} ")) from error

    def in_field(self, value: Any) -> Any:
        return value if self.about.unit == 1 else value * self.about.unit


def options_of(
    owner: type, *, only: Iterable[str] | None = None, unset: bool = False
) -> list[Option]:
    """The options of a dataclass whose fields have defaults. `only`: these fields; `unset`: None
    means that something else decides, not the class."""
    defaults = {field.name: field for field in dataclasses.fields(owner)}
    found = []
    for name, (hint, about) in abouts_of(owner).items():
        if only is not None and name not in only:
            continue
        kind = _kind_of(hint)
        choices: tuple[str, ...] = ()
        if issubclass(kind, Enum):
            choices, kind = tuple(member.value for member in kind), str
        field = defaults[name]
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        default = default.value if isinstance(default, Enum) else default
        if about.unit != 1:
            default //= about.unit
        key = about.option or name.removesuffix("_s")
        found.append(Option(key, owner, name, kind, choices, None if unset else default, about))
    return found


def _kind_of(hint: Any) -> type:
    """Of `X`, `X | None` and `list[X]`."""
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) is list:
        return list
    kind: type = parts[0] if parts else hint
    return kind


Groups = Mapping[str, list[Option]]
"""Options by the title that `--help` shows above them; "" for none."""


def add_options(
    parser: argparse.ArgumentParser, groups: Groups, *, is_checked: bool = False
) -> None:
    """Adds arguments with their defaults. `is_checked`: what the class refuses, argparse does."""
    for option, place in places(parser, groups):
        option.add_to(place, default=option.default, is_checked=is_checked)


def places(parser: argparse.ArgumentParser, groups: Groups) -> Iterable[tuple[Option, Any]]:
    for title, options in groups.items():
        place = parser.add_argument_group(title) if title else parser
        for option in options:
            yield option, place


def flat(groups: Groups) -> list[Option]:
    return [option for options in groups.values() for option in options]


def given(options: Iterable[Option], args: argparse.Namespace) -> dict[str, Any]:
    """The values of the options that are set, by the fields they belong to."""
    values = ((option, getattr(args, option.key)) for option in options)
    return {option.field: option.in_field(v) for option, v in values if v is not None}


def build(owner: type[Kind], args: argparse.Namespace) -> Kind:
    """The settings object that the options of its class describe. Raises ConfigError."""
    try:
        return owner(**given(options_of(owner), args))
    except ValueError as error:
        raise ConfigError(str(error)) from error
