"""The tree of errors is the one that is drawn at its top."""

from __future__ import annotations

import re
from collections.abc import Iterator

from edge_vlm import errors
from edge_vlm.errors import EdgeVlmError, export, requests
from edge_vlm.errors.export import ExportError, NoSpaceLeft

DRAWN = re.compile(r"^    ((?:\|   |    )*(?:\|-- |`-- )?)(\w+) +(\d+) +(E-[\w-]+)", re.MULTILINE)


def below(kind: type[EdgeVlmError], depth: int = 0) -> Iterator[tuple[int, str, int, str]]:
    if kind.__module__ in (errors.__name__, export.__name__, requests.__name__):
        yield depth, kind.__name__, kind.exit_code, kind.code
        for leaf in kind.__subclasses__():
            yield from below(leaf, depth + 1)


def parents(tree: list[tuple[int, str, int, str]]) -> set[tuple[str, str, int, str]]:
    """Each error with its parent: the order of leaves is free."""
    path: list[str] = []
    found = set()
    for depth, name, exit_code, code in tree:
        path[depth:] = [name]
        found.add((path[depth - 1] if depth else "", name, exit_code, code))
    return found


def test_the_tree_is_drawn_as_it_is() -> None:
    drawn = [
        (len(lines) // 4, name, int(exit_code), code)
        for lines, name, exit_code, code in DRAWN.findall(errors.__doc__ or "")
    ]
    real = list(below(EdgeVlmError))
    assert parents(drawn) == parents(real)
    assert len(drawn) == len(real)
    assert len({code for *_, code in real}) == len(real)  # an error is known by its code


def test_a_full_disk_is_no_matter_of_exports() -> None:
    """Training, building engines and exporting all may meet one."""
    assert not issubclass(NoSpaceLeft, ExportError)
    assert NoSpaceLeft.exit_code == 12  # as ever


def test_a_remedy_follows_a_sentence_or_a_piece_of_one() -> None:
    for what, shown in (("It is full.", "It is full"), ("waits ...", "waits ..."), ("no", "no")):
        assert str(EdgeVlmError(what, remedy="buy more")) == f"{shown}: buy more"
    assert str(EdgeVlmError("It is full.")) == "It is full."
