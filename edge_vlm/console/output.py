"""Standard output and error of a command: what becomes of text that cannot be written there.

- A closed pipe (`edge-vlm ... | head`) ends the command without a word, as it ends other programs;
  the exit code is the 141 that a shell gives those (128 + SIGPIPE).
- Anything else, such as a full disk, is an OutputError.
- A character that the encoding lacks is written as an escape, `\\u2588`, and so is one that a
  terminal obeys: answers, names and recordings come from others. What is to be obeyed goes to
  `obeyed(stream)`.
- A descriptor that was closed from the start (`>&-`) takes everything and keeps nothing.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from edge_vlm.errors import OutputError

CLOSED_PIPE_EXIT_CODE = 141
STANDARD = ("stdin", "stdout", "stderr")


_OBEYED = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]|[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def visible_lines(text: str) -> str:
    """`text` with all control characters but tabs and line feeds written out, marks of writing
    direction too."""
    return _OBEYED.sub(lambda found: ascii(found[0])[1:-1], text)


class OutputClosed(Exception):
    """Whoever read our output is gone. Only `edge_vlm.cli.main` has to know."""


class _Descriptor(io.FileIO):
    """Remembers why nothing more can be written, so that this is never taken for the failure of
    another file or socket, nor the other way round."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


class _Guarded(io.TextIOWrapper):
    """Writes what can be read."""

    def write(self, text: str, /) -> int:
        super().write(visible_lines(text))
        return len(text)

    def write_obeyed(self, text: str) -> int:
        return super().write(text)


class _Obeyed:
    """The stream below, control characters and all."""

    def __init__(self, stream: _Guarded) -> None:
        self._stream = stream
        self.write = stream.write_obeyed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def obeyed(stream: TextIO) -> TextIO:
    """Where a command writes what a terminal is to obey. Nothing of others goes there that did not
    go through `visible_lines`."""
    return cast(TextIO, _Obeyed(stream)) if isinstance(stream, _Guarded) else stream


@contextmanager
def standard_output() -> Iterator[None]:
    """Raises OutputClosed, OutputError instead of what failed to be written, at the latest at the
    end, where everything is written out."""
    for number in range(len(STANDARD)):  # or the next file opened would become standard output
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = {name: getattr(sys, name) for name in STANDARD[1:]}
    descriptors = [_guard(name) for name in before]
    try:
        cause: BaseException | None = None
        try:
            yield
        except (OSError, SystemExit) as error:
            cause = error
        try:
            for name in before:
                getattr(sys, name).flush()
        except OSError as error:
            cause = cause or error
        failed = [one for one in descriptors if one is not None and one.failure is not None]
        for descriptor in failed:
            # What is left in the buffers fails no more, now or when the interpreter ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor.fileno())
        if failed:
            raise _error_of(failed[0].failure) from cause
        if cause is not None:
            raise cause
    finally:
        for name, stream in before.items():
            setattr(sys, name, stream)


def _error_of(failure: OSError | None) -> Exception:
    if isinstance(failure, BrokenPipeError):
        return OutputClosed()
    return OutputError(f"cannot write the output: {getattr(failure, 'strerror', failure)}")


def _guard(name: str) -> _Descriptor | None:
    """Puts a stream of ours in place of the interpreter's; leaves one that somebody else, such as
    a test, has put there."""
    stream: TextIO | None = getattr(sys, name)
    if stream is not getattr(sys, f"__{name}__"):
        return None
    encoding, line_buffering, write_through = "utf-8", False, False
    if isinstance(stream, io.TextIOWrapper):
        stream.flush()
        encoding, line_buffering = stream.encoding, stream.line_buffering
        write_through = stream.write_through
    descriptor = _Descriptor(STANDARD.index(name), "w", closefd=False)
    raw: Any = descriptor if write_through else io.BufferedWriter(descriptor)
    guarded = _Guarded(
        raw,
        encoding,
        "backslashreplace",
        line_buffering=line_buffering,
        write_through=write_through,
    )
    setattr(sys, name, guarded)
    return descriptor
