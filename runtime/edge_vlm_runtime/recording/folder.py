"""The recordings of one folder: how much of the disk they may take together, oldest first.

Counted and deleted are files that a server has recorded there, by their names and first bytes; all
others are left alone, and so is what is still being written, here or by another process.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from edge_vlm_runtime.recording.file import MAGIC, SUFFIX

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

NAME = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\dZ-[0-9a-z_-]+" + re.escape(SUFFIX))
"""As `Recorder.record` calls them: their order is that of time."""


def mark(file: BinaryIO) -> None:
    """As one that is being written, until it is closed."""
    if sys.platform != "win32":
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class RecordFolder:
    """Any thread may use it; each call may wait for the disk."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        """`max_bytes` of all recordings together; 0: no bound."""
        self.path = path
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._written: dict[Path, int] = {}
        """Bytes of those that this process writes."""
        self._finished_bytes = 0
        """Of the others, as far as is known: somebody else may have deleted some."""
        if max_bytes:
            with suppress(OSError):
                self._finished_bytes = sum(self._finished().values())

    def add(self, path: Path, num_bytes: int) -> bool:
        """So many are about to be written to a recording; the oldest others are deleted for them.
        False when that does not give enough room."""
        with self._lock:
            self._written[path] = self._written.get(path, 0) + num_bytes
            return not self._max_bytes or self._fits() or self._make_room()

    def finish(self, path: Path) -> None:
        """Nothing more will be written to it."""
        with self._lock:
            self._finished_bytes += self._written.pop(path, 0)

    def _fits(self) -> bool:
        return self._finished_bytes + sum(self._written.values()) <= self._max_bytes

    def _make_room(self) -> bool:
        try:
            found = self._finished()
        except OSError as error:
            log.warning("%s: cannot be looked at: %s", self.path, error.strerror)
            return False
        self._finished_bytes = sum(found.values())
        for path in sorted(found):
            if self._fits():
                break
            if self._delete(path):
                self._finished_bytes -= found[path]
        return self._fits()

    def _finished(self) -> dict[Path, int]:
        """Recordings that this process does not write, with their sizes. Raises OSError."""
        found = {}
        for path in self.path.iterdir():
            if path in self._written or not NAME.fullmatch(path.name) or path.is_symlink():
                continue
            with suppress(OSError), path.open("rb") as file:
                if file.read(len(MAGIC) - 1) == MAGIC[:-1]:
                    found[path] = path.stat().st_size
        return found

    def _delete(self, path: Path) -> bool:
        try:
            with path.open("rb") as file:
                if sys.platform != "win32":
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        except BlockingIOError:  # another process writes it
            return False
        except OSError as error:
            log.warning("recording %s cannot be deleted: %s", path, error.strerror)
            return False
        log.warning(
            "recording %s is deleted: those of its folder have reached %d bytes (--record-total)",
            path,
            self._max_bytes,
        )
        return True
