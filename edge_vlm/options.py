"""What a field of a settings class is called and means outside the program.

A field says it once, `port: Annotated[int, About("0 takes a free one")] = 8765`; its command line
argument, its key in a file, its variable and its line in the documentation derive from that.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class About:
    """`typing.Annotated` metadata of a field."""

    text: str
    option: str | None = None
    """Key of the option where it is not the field's name without its unit `_s`."""
    metavar: str | None = None
    unit: int = 1
    """Of the option, counted in the field's."""
    shows_default: bool = True
    """Behind the text of `--help`."""
    is_secret: bool = False
    """May hold a password or a token: never printed."""


def fields_of(kind: type) -> dict[str, tuple[Any, About]]:
    """Type, without its metadata, and About of each field of a class that has one."""
    found = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        for about in getattr(hint, "__metadata__", ()):
            if isinstance(about, About):
                found[name] = (typing.get_args(hint)[0], about)
    return found
