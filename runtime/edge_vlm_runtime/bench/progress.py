"""How far a measurement is: a bar on a terminal, else a line for each step, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edge_vlm.progress import Progress


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A function to be told of each of `total` steps as it begins. Raises MissingExtraError."""
    if not sys.stderr.isatty():

        def line(text: str) -> None:
            print(text, file=sys.stderr, flush=True)

        yield line
        return
    with Progress("bench", total) as bar:
        begun = 0

        def advance(text: str) -> None:
            nonlocal begun
            bar.total = max(total, begun + 1)
            bar.at(begun, text)
            begun += 1

        yield advance
