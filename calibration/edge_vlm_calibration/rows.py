"""What was seen of the footage, frame by frame, on disk: memory does not grow with it, and a run
that was stopped goes on where it was.

A work folder beside the result holds a file of fixed rows for each clip and says what they were
made with. Rows are mapped when they are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import ConfigError
from edge_vlm.pixels.duplicates import THUMBNAIL

if sys.platform != "win32":
    import fcntl

Rows = npt.NDArray[Any]
FLUSH_EVERY = 16
STATE, DONE = "made-with.json", ".done"


def score_rows(num_cells: int, num_thresholds: int = 0) -> np.dtype[Any]:
    """A frame as the model scored it. `moved`: mean change (0..255) of each cell's pixels since the
    picture before; `counts`: cells kept at each threshold of change."""
    return np.dtype(
        [
            ("time_s", "<f8"),
            ("first", "?"),
            ("thumb", "<f4", (THUMBNAIL, THUMBNAIL)),
            ("moved", "<f4", (num_cells,)),
            ("scores", "<f4", (num_cells,)),
            ("counts", "<i4", (num_thresholds,)),
        ]
    )


def check_rows(num_questions: int) -> np.dtype[Any]:
    """A frame as alerts were checked on it; NaN where it was not."""
    return np.dtype(
        [
            ("time_s", "<f8"),
            ("first", "?"),
            ("probability", "<f4", (num_questions,)),
            ("answer_mass", "<f4", (num_questions,)),
        ]
    )


@contextmanager
def only_run(out: Path) -> Iterator[None]:
    """No other run adds to this file or its work folder meanwhile: two would mix their rows, and
    the later one would lose the sections of the first. Raises ConfigError where one does."""
    path = out.with_name(f"{out.name}.lock")
    try:
        file = path.open("wb")
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", where=path) from error
    with file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_ours = os.path.samestat(os.fstat(file.fileno()), path.stat())
            except (BlockingIOError, FileNotFoundError):  # or it ends just now
                is_ours = False
            except OSError:  # a file system without locks
                is_ours = True
            if not is_ours:
                raise ConfigError(
                    "another run is writing this file",
                    where=out,
                    remedy="wait for it, or give this one another -o and join them by merge",
                )
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


class WorkFolder:
    """Use as a context manager: removed when all went well, kept when the run was stopped."""

    def __init__(self, path: Path, made_with: Mapping[str, Any]) -> None:
        """`made_with`: what the rows depend on; a folder of other rows is begun anew."""
        self.path = path
        self._key = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()
        state = path / STATE
        self.is_resumed = state.is_file() and state.read_text() == self._key
        if not self.is_resumed:
            shutil.rmtree(path, ignore_errors=True)
        path.mkdir(exist_ok=True)
        state.write_text(self._key)

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            shutil.rmtree(self.path, ignore_errors=True)

    def rows(self, name: str, dtype: np.dtype[Any]) -> RowFile:
        return RowFile(self.path / name, dtype)


class RowFile:
    """Rows of one clip."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path, self._dtype = path, dtype
        self._done = path.with_name(path.name + DONE)

    @property
    def is_done(self) -> bool:
        return self._done.is_file()

    @property
    def why_not(self) -> str | None:
        """Why a clip has no rows and never will."""
        return self._done.read_text() or None if self.is_done else None

    def finish(self, why_not: str = "") -> None:
        """The clip has no more; with `why_not` it could not be read."""
        self._done.write_text(why_not)

    def forget(self) -> None:
        self._path.unlink(missing_ok=True)
        self._done.unlink(missing_ok=True)

    def read(self) -> Rows:
        """All whole rows, mapped."""
        size = self._path.stat().st_size if self._path.is_file() else 0
        count = size // self._dtype.itemsize
        if count == 0:
            return np.empty(0, self._dtype)
        return np.memmap(self._path, self._dtype, "r", shape=(count,))

    def append(self) -> RowWriter:
        """Goes on behind the last whole row."""
        kept = len(self.read()) * self._dtype.itemsize
        file = self._path.open("ab")
        file.truncate(kept)
        return RowWriter(file, self._dtype)


class RowWriter:
    """Use as a context manager: what was added is on disk then, however it ended."""

    def __init__(self, file: BinaryIO, dtype: np.dtype[Any]) -> None:
        self._file, self._dtype = file, dtype
        self._waiting: list[tuple[Any, ...]] = []

    def add(self, row: tuple[Any, ...]) -> None:
        self._waiting.append(row)
        if len(self._waiting) >= FLUSH_EVERY:
            self._flush()

    def _flush(self) -> None:
        np.array(self._waiting, self._dtype).tofile(self._file)
        self._waiting = []

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._waiting:
            self._flush()
        self._file.close()
