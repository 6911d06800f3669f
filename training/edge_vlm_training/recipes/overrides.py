"""`--set key=value`: fields of a recipe by name, read by the field's own type."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from edge_vlm.errors import ConfigError

Recipe = TypeVar("Recipe")

_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """The dataclass `recipe` with every `key=value` applied, the whole checked once.

    A key goes down into parts: `stages.2.minutes`. A tuple is written with commas, an absent path
    as `none`. Raises ConfigError: no `=`, an unknown key (all valid ones are listed), a value that
    is not of the field's type or that the recipe refuses.
    """
    valid = valid_keys(recipe)
    changes: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {setting!r} is not key=value", remedy="write --set steps=100")
        name, *path = key.split(".")
        if ".".join("N" if part.isdigit() else part for part in (name, *path)) not in valid:
            near = difflib.get_close_matches(key, valid, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            remedy = f"{hint}valid keys: {', '.join(valid)}"
            raise ConfigError(f"--set: unknown key {key!r}", remedy=remedy)
        before = changes.get(name, getattr(recipe, name))
        changes[name] = _changed(type(recipe), name, before, path, text, key)
    try:
        return dataclasses.replace(recipe, **changes)  # type: ignore[type-var]
    except ValueError as error:
        raise ConfigError(f"--set {' '.join(settings)}: {error}") from error


def valid_keys(recipe: object, prefix: str = "") -> list[str]:
    """Every key of `override`; parts that repeat are listed once, with N for their number."""
    keys = []
    for field in dataclasses.fields(recipe):  # type: ignore[arg-type]
        value = getattr(recipe, field.name)
        if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            keys += valid_keys(value[0], f"{prefix}{field.name}.N.")
        elif field.name != "name" or prefix:
            keys.append(prefix + field.name)
    return keys


def _changed(owner: type, name: str, before: Any, path: list[str], text: str, key: str) -> Any:
    """The new value of field `name`: read from `text`, or a tuple with one part changed."""
    if not path:
        return _read(typing.get_type_hints(owner)[name], text, key)
    number = int(path[0])
    if number >= len(before):
        raise ConfigError(f"--set: {key}: {name} are numbered 0 to {len(before) - 1}")
    part = before[number]
    value = _read(typing.get_type_hints(type(part))[path[1]], text, key)
    try:
        part = dataclasses.replace(part, **{path[1]: value})
    except ValueError as error:
        raise ConfigError(f"--set {key}={text}: {error}") from error
    return (*before[:number], part, *before[number + 1 :])


def _read(kind: Any, text: str, key: str) -> Any:
    """`text` as a value of the annotation `kind`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if text.lower() in ("none", ""):
            return None
        return _read(next(a for a in arguments if a is not type(None)), text, key)
    if origin is Literal:
        if text not in arguments:
            raise _wrong(key, text, f"one of {', '.join(map(str, arguments))}")
        return text
    if origin is tuple:
        pieces = [piece.strip() for piece in text.strip("()[]").split(",") if piece.strip()]
        return tuple(_read(arguments[0], piece, key) for piece in pieces)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        try:
            return kind(text)
        except ValueError:
            raise _wrong(key, text, f"one of {', '.join(str(m.value) for m in kind)}") from None
    if kind is bool:
        if text.lower() not in _BOOLEANS:
            raise _wrong(key, text, "true or false")
        return _BOOLEANS[text.lower()]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise _wrong(key, text, what) from None
    if kind is Path:
        return Path(text)
    return text


def _wrong(key: str, text: str, expected: str) -> ConfigError:
    return ConfigError(f"--set {key}={text!r}: expected {expected}")
