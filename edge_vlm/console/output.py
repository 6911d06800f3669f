"""Standard output and error of a command: what becomes of text that cannot be written there.

- A closed pipe (`edge-vlm ... | head`) ends the command without a word, as it ends other programs;
  the exit code is the 141 that a shell gives those (128 + SIGPIPE).
- Anything else, such as a full disk, is an OutputError.
- A character that the encoding lacks is written as an escape, `\\u2588`.
- A descriptor that was closed from the start (`>&-`) takes everything and keeps nothing.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from edge_vlm.errors import OutputError

CLOSED_PIPE_EXIT_CODE = 141
STANDARD = ("stdin", "stdout", "stderr")


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
    guarded = io.TextIOWrapper(
        raw,
        encoding,
        "backslashreplace",
        line_buffering=line_buffering,
        write_through=write_through,
    )
    setattr(sys, name, guarded)
    return descriptor
