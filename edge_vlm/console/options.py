"""What a field of a settings class is called and means outside the program.

A field says it once:

    max_sessions: int = 4
    \"\"\"Viewers at the same time.\"\"\"

Its command line argument, its key in a file, its variable and its line in the documentation derive
from that; where they differ from the field, its type is `Annotated` with an `About`.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any


@dataclass(frozen=True)
class About:
    """`typing.Annotated` metadata of a field."""

    text: str = ""
    """Where there is none below the field."""
    option: str | None = None
    """Key of the option where it is not the field's name without its unit `_s`."""
    metavar: str | None = None
    unit: int = 1
    """Of the option, counted in the field's."""
    shows_default: bool = True
    """Behind the text of `--help`."""
    check: Callable[[Any], object] | None = None
    """Raises the typed error of a value that cannot be used, before the command begins."""
    is_secret: bool = False
    """May hold a password or a token: never printed."""


@cache
def texts_of(kind: type) -> Mapping[str, str]:
    """What each field of a class means: the text literal below it, or that of its About."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, text in itertools.pairwise(definition.body):
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                texts[field.target.id] = " ".join(str(text.value.value).split())
            elif isinstance(field, ast.Assign) and isinstance(field.targets[0], ast.Name):
                texts[field.targets[0].id] = " ".join(str(text.value.value).split())
    return texts | {name: about.text for name, (_, about) in _hints_of(kind) if about.text}


@cache
def abouts_of(kind: type) -> Mapping[str, tuple[Any, About]]:
    """Type, without its metadata, and About of each field of a class, texts included."""
    texts = texts_of(kind)
    return {
        name: (hint, replace(about, text=texts.get(name, "")))
        for name, (hint, about) in _hints_of(kind)
    }


def _hints_of(kind: type) -> list[tuple[str, tuple[Any, About]]]:
    found = []
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        abouts = [about for about in getattr(hint, "__metadata__", ()) if isinstance(about, About)]
        found.append((name, (typing.get_args(hint)[0], abouts[0]) if abouts else (hint, About())))
    return found
