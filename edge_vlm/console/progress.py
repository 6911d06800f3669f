"""How far a long command is: a bar with the time left on a terminal, a line a minute elsewhere.

    with Progress("questions", total=1100) as progress:
        for question in questions:
            ...
            progress.advance()

All of it goes to standard error, so that results can be piped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from edge_vlm.console.output import obeyed
from edge_vlm.errors import MissingExtraError

LINE_EVERY_S = 60.0
Item = TypeVar("Item")


class Progress:
    """`total`: of what is counted; None where nobody knows, which gives no rest of time either.
    `unit`: "B" shows sizes in MB, anything else plain numbers. Raises MissingExtraError on a
    terminal without rich."""

    def __init__(
        self,
        title: str,
        total: float | None,
        *,
        unit: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, 0.0
        self._clock = clock
        self._began = self._said = clock()
        self._bar = _bar(unit) if sys.stderr.isatty() else None
        self._task = None if self._bar is None else self._bar.add_task(title, total=total, note="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: float = 1, note: str | None = None) -> None:
        """`count` more are done; `note` stands behind the bar."""
        self.at(self.done + count, note)

    def at(self, done: float, note: str | None = None) -> None:
        """`done` of the total are done."""
        self.done = done
        if self._bar is not None and self._task is not None:
            fields = {} if note is None else {"note": note}
            self._bar.update(self._task, completed=done, total=self.total, **fields)
        elif self._clock() - self._said >= LINE_EVERY_S:
            self._said = self._clock()
            print(self.line(note), file=sys.stderr, flush=True)

    @property
    def left_s(self) -> float | None:
        """Seconds to the end at the mean speed so far; None before the first step, or without a
        total."""
        if not self.total or not self.done:
            return None
        passed = self._clock() - self._began
        return max(0.0, passed / self.done * (self.total - self.done))

    def line(self, note: str | None = None) -> str:
        """As it is said where there is no terminal."""
        scale, unit = (1e6, " MB") if self.unit == "B" else (1, "")
        count = f"{self.done / scale:.0f}"
        share = ""
        if self.total:
            count += f" of {self.total / scale:.0f}"
            share = f", {self.done / self.total:.0%}"
        left = "" if self.left_s is None else f", {duration(self.left_s)} left"
        return f"{self.title}: {count}{unit}{share}{left}" + (f", {note}" if note else "")


def counted(items: Iterable[Item], title: str, total: float | None) -> Iterator[Item]:
    """The same items, each one step."""
    with Progress(title, total) as progress:
        yield from told(items, progress)


def told(
    items: Iterable[Item], progress: Progress, size: Callable[[Item], float] = lambda item: 1
) -> Iterator[Item]:
    """The same items; each is so much of `progress` when it is done."""
    for item in items:
        yield item
        progress.advance(size(item))


def duration(seconds: float) -> str:
    """In the words of a person: 40 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def _bar(unit: str) -> Any:
    try:
        from rich import console, progress
    except ModuleNotFoundError as error:
        raise MissingExtraError.for_library("rich", "client") from error

    counts = progress.DownloadColumn() if unit == "B" else progress.MofNCompleteColumn()
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        counts,
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}"),
        console=console.Console(file=obeyed(sys.stderr)),
    )
