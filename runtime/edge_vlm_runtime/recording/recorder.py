"""Writes down the calls that are made on sessions, so that `replay` can make them again.

Each session's file has a thread of its own: neither the event loop nor the engines ever wait for a
disk. What does not fit any more, comes faster than the disk takes it, or cannot be written ends the
recording with a warning; the session goes on.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import edge_vlm
from edge_vlm import private_files
from edge_vlm.errors import RecordingError
from edge_vlm.formats.bundle import MANIFEST, EngineBundle, sha256_of_file
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.settings import ServerLimits, SessionSettings
from edge_vlm_runtime.recording.file import SUFFIX, Entry, entry_bytes, header_bytes
from edge_vlm_runtime.recording.folder import RecordFolder, mark
from edge_vlm_runtime.session.calls import FrameCall
from edge_vlm_runtime.session.frames import DroppedFrame

log = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 4 << 30
MAX_WAITING_BYTES = 64 << 20
"""Of entries that the disk has not taken yet."""
CLOSE_TIMEOUT_S = 30.0
"""A disk that takes longer for what waits has died."""


def create(path: Path) -> BinaryIO:
    """A new file for its owner alone, that no other process deletes while it is written. Raises
    OSError, also when it is there already."""
    file = private_files.create(path)
    mark(file)
    return file


class SessionRecorder:
    """Records one session into a file. Neither `write` nor `close` waits."""

    def __init__(
        self,
        path: Path,
        header: dict[str, Any],
        max_bytes: int = DEFAULT_MAX_BYTES,
        open_file: Callable[[Path], BinaryIO] = create,
        folder: RecordFolder | None = None,
    ) -> None:
        """`folder`: whose recordings have a limit together."""
        self.path = path
        self._folder = folder
        self._header = header
        self._max_bytes = max_bytes
        self._open_file = open_file
        self._entries: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting_bytes = 0
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="edge-vlm-recorder", daemon=True)
        self._thread.start()

    def write(self, entry: Entry) -> None:
        """Notes an entry. May be called by any thread, after `close` without effect."""
        with self._lock:
            if self._has_ended:
                return
            self._waiting_bytes += _weight(entry)
            if self._waiting_bytes <= MAX_WAITING_BYTES:
                self._entries.put(entry)
                return
            self._has_ended = True
        self._entries.put(None)
        log.warning("recording %s ends: the disk is too slow", self.path)

    def close(self) -> None:
        """Nothing more will come; what was noted is still written."""
        with self._lock:
            self._has_ended = True
        self._entries.put(None)

    def wait(self, timeout_s: float) -> bool:
        """Until everything is written; False when that takes longer."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # ---- the writing thread ------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with self._open_file(self.path) as file:
                self._write_all(file)
        except OSError as error:
            self._stop(f"it cannot be written: {error.strerror or error}")
        except Exception:  # the session goes on without its recording
            log.exception("recording %s ends", self.path)
            self._stop("of a bug")
        finally:
            if self._folder is not None:
                self._folder.finish(self.path)

    def _write_all(self, file: BinaryIO) -> None:
        """Each entry is handed to the system at once, so that a killed process loses what waits."""
        data = header_bytes(self._header)
        num_bytes = 0
        while True:
            num_bytes += len(data)
            if num_bytes > self._max_bytes:
                self._stop(f"it has reached {self._max_bytes} bytes (--record-limit)")
                return
            if self._folder is not None and not self._folder.add(self.path, len(data)):
                self._stop("all of its folder have reached their limit (--record-total)")
                return
            file.write(data)
            file.flush()
            entry = self._entries.get()
            if entry is None:
                return
            data = entry_bytes(entry)
            with self._lock:
                self._waiting_bytes -= _weight(entry)

    def _stop(self, why: str) -> None:
        with self._lock:
            self._has_ended = True
        log.warning("recording %s ends: %s", self.path, why)


def _weight(entry: Entry) -> int:
    """About how many bytes an entry holds in memory."""
    if isinstance(entry, DroppedFrame):
        return len(entry.frame.data) + 1000
    picture = entry.call.frame.data if isinstance(entry.call, FrameCall) else b""
    return len(picture) + sum(map(len, entry.events)) + 1000


class Recorder:
    """Records each session of a server."""

    def __init__(
        self,
        *,
        path: Path,
        bundle: EngineBundle,
        threads: int,
        max_bytes: int = DEFAULT_MAX_BYTES,
        max_total_bytes: int = 0,
        open_file: Callable[[Path], BinaryIO] = create,
    ) -> None:
        """`path`: a folder, or the file of the only session if it ends in `.evlm`. `threads` of the
        engines. `max_bytes` of one recording, `max_total_bytes` of all in a folder (0: no bound);
        then the oldest are deleted. Raises RecordingError when nothing can be written there, or a
        file is there."""
        self._path = path
        self._is_file = path.suffix == SUFFIX
        self._bundle = bundle
        self._bundle_sha256 = sha256_of_file(bundle.path / MANIFEST)
        self._threads = threads
        self._max_bytes = max_bytes
        self._open_file = open_file
        self._numbers = itertools.count()
        self._recorders: list[SessionRecorder] = []
        self._require_place()
        self._folder = None if self._is_file else RecordFolder(path, max_total_bytes)

    def _require_place(self) -> None:
        folder = self._path.parent if self._is_file else self._path
        try:
            exposed = private_files.make_folder(folder)
            handle, probe = tempfile.mkstemp(prefix=".", dir=folder)
            os.close(handle)
            Path(probe).unlink()
        except OSError as error:
            raise RecordingError(f"cannot be written: {error.strerror}", where=folder) from error
        if exposed is not None and not self._is_file:
            log.warning("recordings: %s", exposed)
        if self._is_file and self._path.exists():
            raise RecordingError(
                "there is a file of this name already", where=self._path, remedy="choose another"
            )

    def record(
        self, session_id: str, settings: SessionSettings, limits: ServerLimits, now_ns: int
    ) -> SessionRecorder:
        """Begins the recording of a session that is opened at `now_ns`, without waiting for a disk.

        Raises RecordingError when the only file has a session already.
        """
        now = datetime.now(timezone.utc)
        number = next(self._numbers)
        if self._is_file and number > 0:
            raise RecordingError(
                "this file has its session already",
                where=self._path,
                remedy="record several sessions into a folder",
            )
        name = f"{now:%Y-%m-%dT%H-%M-%S}Z-{session_id}{SUFFIX}"
        header = {
            "edge_vlm": edge_vlm.__version__,
            "protocol_version": protocol.PROTOCOL_VERSION,
            "bundle": self._bundle.name,
            "bundle_sha256": self._bundle_sha256,
            "threads": self._threads,
            "started": now.isoformat(timespec="milliseconds"),
            "now_ns": now_ns,
            "settings": dataclasses.asdict(settings),
            "limits": dataclasses.asdict(limits),
        }
        path = self._path if self._is_file else self._path / name
        recorder = SessionRecorder(path, header, self._max_bytes, self._open_file, self._folder)
        self._recorders = [each for each in self._recorders if not each.wait(0.0)]
        self._recorders.append(recorder)
        return recorder

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Waits until the recordings of ended sessions are written."""
        deadline_s = time.monotonic() + timeout_s
        for recorder in self._recorders:
            recorder.close()
            if not recorder.wait(max(0.0, deadline_s - time.monotonic())):
                log.warning("recording %s is not whole: the disk is stuck", recorder.path)
