"""Lines of the log that anybody who reaches the port can cause: the first of a kind are written,
of the rest how many there were."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

BURST = 5
"""Lines of one kind that are written within WINDOW_S of the first."""
WINDOW_S = 60.0
MAX_KINDS = 256
"""That are told apart; further ones count as one."""
PREFIXES = (
    "uvicorn",
    "websockets",
    "asyncio",
    "edge_vlm_runtime.server",
    "edge_vlm_runtime.openai",
)
"""Of loggers that tell what strangers do."""


@dataclass
class _Kind:
    num_written: int = 0
    num_held: int = 0


class RepeatedLines(logging.Filter):
    """Filter of a handler. A kind is a logger and its text without the figures in it."""

    def __init__(
        self,
        handler: logging.Handler,
        start_timer: Callable[[float, Callable[[], None]], object] | None = None,
    ) -> None:
        """`start_timer` makes a call after so many seconds (default: on a thread of its own)."""
        super().__init__()
        self._handler = handler
        self._start_timer = start_timer or _on_a_thread
        self._kinds: dict[tuple[str, str], _Kind] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.name.startswith(PREFIXES):
            return True
        name = record.name, str(record.msg)
        with self._lock:
            if name not in self._kinds and len(self._kinds) >= MAX_KINDS:
                name = "", "lines of other kinds"
            kind = self._kinds.get(name)
            is_new = kind is None
            if kind is None:
                kind = self._kinds[name] = _Kind()
            if kind.num_written < BURST:
                kind.num_written += 1
                written = True
            else:
                kind.num_held += 1
                written = False
        if is_new:
            self._start_timer(WINDOW_S, lambda: self._sum_up(name, record.levelno))
        return written

    def _sum_up(self, name: tuple[str, str], level: int) -> None:
        with self._lock:
            kind = self._kinds.pop(name)
        if kind.num_held:
            text = f"{kind.num_held} more like this in {WINDOW_S:g} s: {name[1].splitlines()[0]}"
            self._handler.handle(
                logging.LogRecord("edge_vlm.log", level, __file__, 0, text, None, None)
            )


def quiet(handler: logging.Handler) -> None:
    """Of a server's log."""
    handler.addFilter(RepeatedLines(handler))


def _on_a_thread(seconds: float, call: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
