"""How far a measurement is: a bar on a terminal, else a line for each step, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edge_vlm.errors import MissingExtraError


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A function to be told of each of `total` steps as it begins."""
    if not sys.stderr.isatty():

        def line(text: str) -> None:
            print(text, file=sys.stderr, flush=True)

        yield line
        return
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
    except ImportError as error:
        raise MissingExtraError.for_library("rich", "client") from error
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=total)
        begun = 0

        def advance(text: str) -> None:
            nonlocal begun
            bar.update(task, description=text, completed=begun, total=max(total, begun + 1))
            begun += 1

        yield advance
