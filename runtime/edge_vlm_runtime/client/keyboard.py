"""Lines that somebody types, or that come through a pipe, while something else is shown."""

from __future__ import annotations

import asyncio
import codecs
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import ModuleType
from typing import Any

MAX_LINE = 20_000
"""Characters; the rest of a longer line is dropped."""


class LineEditor:
    """What keys make of a line, where the terminal neither shows nor edits it. No I/O."""

    def __init__(self) -> None:
        self.text = ""
        """The line so far."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._escape = ""

    def keys(self, data: bytes) -> Iterator[str]:
        """The lines that these keys end."""
        for key in self._decoder.decode(data):
            if self._escape:
                self._skip(key)
            elif key == "\x1b":
                self._escape = key
            elif key in "\r\n":
                line, self.text = self.text, ""
                yield line
            elif key in "\x7f\b":
                self.text = self.text[:-1]
            elif key == "\x15":  # Ctrl-U
                self.text = ""
            elif key == "\x17":  # Ctrl-W
                kept = self.text.rstrip().rfind(" ") + 1
                self.text = self.text[:kept]
            elif key.isprintable() and len(self.text) < MAX_LINE:
                self.text += key

    def _skip(self, key: str) -> None:
        """An arrow or another key that sends a sequence: ESC [ ... letter, or ESC letter."""
        self._escape += key
        if not (key == "[" and len(self._escape) == 2) and (key.isalpha() or key == "~"):
            self._escape = ""


class Keyboard:
    """Standard input, line by line, from `start` to `close`. Lives on the event loop."""

    def __init__(
        self,
        on_line: Callable[[str], None],
        on_typing: Callable[[str], None] | None = None,
        descriptor: int | None = None,
    ) -> None:
        """`on_typing`: shows the line so far; without it the terminal does that itself."""
        self._on_line = on_line
        self._on_typing = on_typing
        self._descriptor = descriptor
        self._editor = LineEditor()
        self._loop: asyncio.AbstractEventLoop
        self._is_closed = False

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Does nothing where there is no input."""
        descriptor = self._descriptor if self._descriptor is not None else _standard_input()
        if descriptor is None:
            yield
            return
        self._loop = asyncio.get_running_loop()
        keys = _single_keys(descriptor) if self._on_typing is not None else nullcontext()
        with _never_stopped(), keys:
            # A thread that waits for input cannot be ended: it is left behind, without a lock.
            threading.Thread(
                target=self._read, args=(descriptor,), name="edge-vlm-keyboard", daemon=True
            ).start()
            try:
                yield
            finally:
                self._is_closed = True

    def _read(self, descriptor: int) -> None:
        while not self._is_closed:
            try:
                data = os.read(descriptor, 4096)
            except OSError:  # the terminal belongs to another job now, or is gone
                return
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._take, data or b"\n")
            if not data:
                return

    def _take(self, data: bytes) -> None:
        if self._is_closed:
            return
        for line in self._editor.keys(data):
            if line.strip():
                self._on_line(line.strip())
        if self._on_typing is not None:
            self._on_typing(self._editor.text)


def _standard_input() -> int | None:
    try:
        return sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):  # none, or not a real one
        return None


@contextmanager
def _never_stopped() -> Iterator[None]:
    """In the background of a terminal reading fails, instead of stopping the whole program."""
    if not hasattr(signal, "SIGTTIN") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTTIN, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTTIN, before)


@contextmanager
def _single_keys(descriptor: int) -> Iterator[None]:
    """The terminal hands over each key as it is typed and shows none, so that a picture on it stays
    intact; Ctrl-C works as ever."""
    termios = _termios()
    if termios is None or not os.isatty(descriptor):
        yield
        return
    before: list[Any] = termios.tcgetattr(descriptor)
    now = [*before]
    now[3] = now[3] & ~(termios.ICANON | termios.ECHO)
    try:
        if _is_ours(descriptor):
            termios.tcsetattr(descriptor, termios.TCSADRAIN, now)
        yield
    finally:
        if _is_ours(descriptor):
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _is_ours(descriptor: int) -> bool:
    """False while this program runs in the background of the terminal."""
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:  # a terminal without jobs
        return True


def _termios() -> ModuleType | None:
    """Not on Windows."""
    try:
        import termios
    except ImportError:
        return None
    return termios
