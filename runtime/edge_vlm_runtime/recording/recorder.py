"""Writes down what a session does, so that `replay` can do it again.

A `Tape` stands between a session and the rest: it hands the session its clock, its frame slot and
its way out, and notes what goes through them. `NoTape` hands over the same and notes nothing.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import edge_vlm
from edge_vlm.errors import EdgeVlmError, RecordingError
from edge_vlm.formats.bundle import MANIFEST, EngineBundle, sha256_of_file
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.frames import DropReason
from edge_vlm_runtime.protocol.settings import ServerLimits, SessionSettings
from edge_vlm_runtime.recording.file import (
    SUFFIX,
    Event,
    Op,
    Refused,
    SlotTouch,
    entry_bytes,
    header_bytes,
)
from edge_vlm_runtime.session.frame_queue import Dropped, EncodedFrame, FrameQueue
from edge_vlm_runtime.session.video_feed import Emit

log = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 4 << 30
Result = TypeVar("Result")


class NoTape:
    """Records nothing."""

    def clock(self, clock_ns: Callable[[], int]) -> Callable[[], int]:
        """The clock for the session."""
        return clock_ns

    def emit(self, emit: Emit) -> Emit:
        """The way out for the session's events."""
        return emit

    def make_slot(self, **arguments: Any) -> FrameQueue:
        return FrameQueue(**arguments)

    def refuse(self, slot: FrameQueue, frame: EncodedFrame, error: EdgeVlmError) -> list[Dropped]:
        """Refuses a frame whose message was broken."""
        return slot.refuse(frame, DropReason.DECODE_ERROR)

    def work(
        self,
        name: str,
        call: Callable[[], Result],
        *,
        message: protocol.ClientMessage | None = None,
        received_ns: int | None = None,
    ) -> Result:
        """Does one unit of work of the session, on the engine thread."""
        return call()

    def close(self) -> None:
        """Nothing more will come."""


class Tape(NoTape):
    """Records one session into a file. What does not fit any more, or cannot be written, ends the
    recording with a warning; the session goes on."""

    def __init__(self, path: Path, header: dict[str, Any], max_bytes: int) -> None:
        """Raises RecordingError when the file cannot be made, or is there already."""
        self.path = path
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        self._op: Op | None = None
        self._num_bytes = 0
        self._file: BinaryIO | None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                raise RecordingError(
                    "there is a file of this name already", where=path, remedy="choose another one"
                )
            self._file = path.open("xb")
        except OSError as error:
            raise RecordingError(f"cannot be written: {error.strerror}", where=path) from error
        self._write(header_bytes(header))

    def clock(self, clock_ns: Callable[[], int]) -> Callable[[], int]:
        def read() -> int:
            now_ns = clock_ns()
            if self._op is not None:  # only the engine thread reads it, always at work
                self._op.readings_ns.append(now_ns)
            return now_ns

        return read

    def emit(self, emit: Emit) -> Emit:
        def note(event: protocol.ServerEvent) -> None:
            text = protocol.encode(event)
            with self._lock:
                self._note(Event(text))
                emit(event)

        return note

    def make_slot(self, **arguments: Any) -> FrameQueue:
        return _RecordedSlot(self, **arguments)

    def refuse(self, slot: FrameQueue, frame: EncodedFrame, error: EdgeVlmError) -> list[Dropped]:
        with self._lock:
            self._note(Refused(frame, str(error)))
            return slot.refuse(frame, DropReason.DECODE_ERROR)

    def work(
        self,
        name: str,
        call: Callable[[], Result],
        *,
        message: protocol.ClientMessage | None = None,
        received_ns: int | None = None,
    ) -> Result:
        op = Op(
            name=name,
            readings_ns=[],
            message=None if message is None else protocol.encode(message),
            received_ns=received_ns,
        )
        with self._lock:
            self._op = op
        result: Result | None = None
        try:
            result = call()
            return result
        finally:
            with self._lock:
                self._op = None
                if name in ("answer", "watch") and result is False:  # there was nothing to do
                    for entry in op.during:
                        if not isinstance(entry, SlotTouch):
                            self._write(entry_bytes(entry))
                else:
                    self._write(entry_bytes(op))

    def touched(self, what: str) -> None:
        """The session looked at its slot. The lock must be held until it has."""
        if self._op is not None:
            self._op.during.append(SlotTouch(what))

    def came(self, frame: EncodedFrame) -> None:
        """A frame is about to be put into the slot. The lock must be held until it is there."""
        self._note(frame)

    @property
    def lock(self) -> threading.RLock:
        """Keeps the order of what two threads do to the slot."""
        return self._lock

    def _note(self, entry: EncodedFrame | Refused | Event) -> None:
        if self._op is not None:
            self._op.during.append(entry)
        else:
            self._write(entry_bytes(entry))

    def _write(self, data: bytes) -> None:
        """Handed to the system at once, so that a killed process loses half an entry at most."""
        if self._file is None:
            return
        self._num_bytes += len(data)
        if self._num_bytes > self._max_bytes:
            self._stop(f"it has reached {self._max_bytes} bytes")
            return
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            self._stop(str(error.strerror))

    def _stop(self, why: str) -> None:
        log.warning("recording %s ends: %s", self.path, why)
        self.close()

    def close(self) -> None:
        with self._lock:
            file, self._file = self._file, None
            if file is not None:
                with suppress(OSError):  # a full disk was reported when it was written to
                    file.close()


class _RecordedSlot(FrameQueue):
    """A slot whose every use is on the tape in its true order."""

    def __init__(self, tape: Tape, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._tape = tape

    def put(self, frame: EncodedFrame) -> list[Dropped]:
        with self._tape.lock:
            self._tape.came(frame)
            return super().put(frame)

    def take(self) -> EncodedFrame | None:
        with self._tape.lock:
            self._tape.touched("take")
            return super().take()

    def __len__(self) -> int:
        with self._tape.lock:
            self._tape.touched("len")
            return super().__len__()

    def counts(self) -> tuple[int, dict[str, int]]:
        with self._tape.lock:
            self._tape.touched("counts")
            return super().counts()

    def empty(self) -> list[Dropped]:
        with self._tape.lock:
            self._tape.touched("empty")
            return super().empty()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorder:
    """Makes a tape for each session of a server."""

    path: Path
    """A folder, or the file of the only session if it ends in `.evlm`."""
    bundle: EngineBundle
    threads: int
    max_bytes: int = DEFAULT_MAX_BYTES

    def tape(self, session_id: str, settings: SessionSettings, limits: ServerLimits) -> Tape:
        """Raises RecordingError."""
        now = datetime.now(timezone.utc)
        path = self.path
        if path.suffix != SUFFIX:
            path = path / f"{now:%Y-%m-%dT%H-%M-%S}Z-{session_id}{SUFFIX}"
        header = {
            "edge_vlm": edge_vlm.__version__,
            "protocol_version": protocol.PROTOCOL_VERSION,
            "bundle": self.bundle.name,
            "bundle_sha256": sha256_of_file(self.bundle.path / MANIFEST),
            "threads": self.threads,
            "started": now.isoformat(timespec="milliseconds"),
            "monotonic_ns": time.monotonic_ns(),
            "settings": dataclasses.asdict(settings),
            "limits": dataclasses.asdict(limits),
        }
        return Tape(path, header, self.max_bytes)
