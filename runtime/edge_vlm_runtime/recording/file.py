"""The file of one recorded session, and how far it can be read.

    8 bytes    b"EVLMREC" and the format's version
    records    kind u8, length u32, crc32 u32 (little-endian), then `length` bytes

The first record is the header. Behind it stand, in the order in which they happened: frames that
came in, events that went out, and units of work (`Op`) of the session with every reading of the
clock during them. What happened while a unit of work was under way stands behind its record, which
says how many such records there are. So replaying is: do the same work, read the same times, let
the same frames come at the same moments. A session and its frames are written as they happen; a
file that was cut off is good up to its last whole unit.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from edge_vlm.errors import RecordingError
from edge_vlm_runtime.session.frame_queue import EncodedFrame

MAGIC = b"EVLMREC\x01"
SUFFIX = ".evlm"
RECORD = struct.Struct("<BII")
FRAME = struct.Struct("<IQq")
"""sequence u32, capture time in microseconds u64, received on the server's clock in ns i64."""
HEADER_KIND, FRAME_KIND, EVENT_KIND, OP_KIND, SLOT_KIND, REFUSED_KIND = range(1, 7)
MAX_RECORD_BYTES = 1 << 28
"""A larger length is damage, not a record."""


@dataclass(frozen=True)
class SlotTouch:
    """The session looked at its frame slot: `take`, `len`, `counts` or `empty`."""

    what: str


@dataclass(frozen=True)
class Refused:
    """A frame whose message was broken; it never came into the slot."""

    frame: EncodedFrame
    message: str


@dataclass(frozen=True)
class Event:
    """What the session said: JSON text without number."""

    text: str


@dataclass
class Op:
    """One unit of work: `open`, `message`, `step`, `stats` or `close`."""

    name: str
    readings_ns: list[int]
    """What the clock said during it, in order."""
    message: str | None = None
    """Of `message`: the client's message as JSON text."""
    received_ns: int | None = None
    """Of `message`: when it came."""
    during: list[Inner] = field(default_factory=list)


Inner = SlotTouch | EncodedFrame | Refused | Event
Entry = Op | EncodedFrame | Refused | Event


# ---- to bytes --------------------------------------------------------------------------------


def _record(kind: int, payload: bytes) -> bytes:
    return RECORD.pack(kind, len(payload), zlib.crc32(payload)) + payload


def header_bytes(header: Mapping[str, Any]) -> bytes:
    return MAGIC + _record(HEADER_KIND, json.dumps(header).encode())


def entry_bytes(entry: Entry | SlotTouch) -> bytes:
    """One entry with everything that belongs to it."""
    if isinstance(entry, EncodedFrame):
        return _record(FRAME_KIND, _frame_payload(entry))
    if isinstance(entry, Refused):
        text = entry.message.encode()
        head = len(text).to_bytes(4, "little") + text
        return _record(REFUSED_KIND, head + _frame_payload(entry.frame))
    if isinstance(entry, Event):
        return _record(EVENT_KIND, entry.text.encode())
    if isinstance(entry, SlotTouch):
        return _record(SLOT_KIND, entry.what.encode())
    fields = {
        "op": entry.name,
        "t": entry.readings_ns,
        "message": entry.message,
        "received_ns": entry.received_ns,
        "during": len(entry.during),
    }
    line = json.dumps({name: value for name, value in fields.items() if value is not None})
    return b"".join([_record(OP_KIND, line.encode()), *map(entry_bytes, entry.during)])


def _frame_payload(frame: EncodedFrame) -> bytes:
    return FRAME.pack(frame.sequence, frame.capture_time_us, frame.received_ns) + frame.jpeg


# ---- from bytes ------------------------------------------------------------------------------


class Recording:
    """An opened recording. Its entries are read from the file as they are asked for."""

    def __init__(self, path: Path, file: BinaryIO, header: dict[str, Any]) -> None:
        self.path = path
        self._file = file
        self.header = header
        self.cut_off: str | None = None
        """Set once the entries have been read, if the file ends in the middle of one: where."""

    @classmethod
    def open(cls, path: Path) -> Recording:
        """Raises RecordingError when this is no recording, or one of another version."""
        try:
            file = path.open("rb")
        except OSError as error:
            raise RecordingError(f"cannot be read: {error.strerror}", where=path) from error
        try:
            magic = file.read(len(MAGIC))
            if magic[:-1] != MAGIC[:-1]:
                raise RecordingError("this is not a recording", where=path)
            if magic != MAGIC:
                raise RecordingError(
                    f"a recording of format {magic[-1]}, this version reads {MAGIC[-1]}", where=path
                )
            first = _read_record(file)
            if first is None:
                raise _CutOff
            if first[0] != HEADER_KIND:
                raise _Damaged("another record stands first")
            return cls(path, file, json.loads(first[1]))
        except _CutOff as error:
            file.close()
            raise RecordingError("the recording is cut off in its header", where=path) from error
        except (_Damaged, ValueError) as error:
            file.close()
            raise RecordingError(f"the header is damaged: {error}", where=path) from error
        except BaseException:
            file.close()
            raise

    def entries(self) -> Iterator[Entry]:
        """Everything behind the header. Raises RecordingError on damage; a file that just ends is
        read up to its last whole entry and then `cut_off` is set."""
        while True:
            start = self._file.tell()
            try:
                entry = self._entry()
            except _CutOff:
                size = self._file.seek(0, 2)
                self.cut_off = (
                    f"the recording is cut off: its last {size - start} bytes are no whole entry"
                )
                return
            except (_Damaged, ValueError, KeyError, TypeError, struct.error) as error:
                raise RecordingError(
                    f"the recording is damaged at byte {start}: {error}", where=self.path
                ) from error
            if entry is None:
                return
            if isinstance(entry, SlotTouch):
                raise RecordingError(
                    f"the recording is damaged at byte {start}: a touch outside of any work",
                    where=self.path,
                )
            yield entry

    def _entry(self) -> Entry | SlotTouch | None:
        record = _read_record(self._file)
        if record is None:
            return None
        kind, payload = record
        if kind == FRAME_KIND:
            return _frame(payload)
        if kind == REFUSED_KIND:
            length = int.from_bytes(payload[:4], "little")
            return Refused(_frame(payload[4 + length :]), payload[4 : 4 + length].decode())
        if kind == EVENT_KIND:
            return Event(payload.decode())
        if kind == SLOT_KIND:
            return SlotTouch(payload.decode())
        if kind != OP_KIND:
            raise _Damaged(f"unknown record of kind {kind}")
        return self._op(json.loads(payload))

    def _op(self, fields: dict[str, Any]) -> Op:
        op = Op(
            name=str(fields["op"]),
            readings_ns=[int(value) for value in fields["t"]],
            message=fields.get("message"),
            received_ns=fields.get("received_ns"),
        )
        for _ in range(int(fields["during"])):
            inner = self._entry()
            if inner is None:
                raise _CutOff
            if isinstance(inner, Op):
                raise _Damaged("work inside of work")
            op.during.append(inner)
        return op

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _CutOff(Exception):
    """The file ends inside a record."""


class _Damaged(Exception):
    """A record's bytes are not those that were written."""


def _read_record(file: BinaryIO) -> tuple[int, bytes] | None:
    """The next record, or None at the end of the file."""
    head = file.read(RECORD.size)
    if not head:
        return None
    if len(head) < RECORD.size:
        raise _CutOff
    kind, length, crc = RECORD.unpack(head)
    if length > MAX_RECORD_BYTES:
        raise _Damaged(f"a record of {length} bytes")
    payload = file.read(length)
    if len(payload) < length:
        raise _CutOff
    if zlib.crc32(payload) != crc:
        raise _Damaged("a checksum does not fit")
    return kind, payload


def _frame(payload: bytes) -> EncodedFrame:
    sequence, capture_time_us, received_ns = FRAME.unpack_from(payload)
    return EncodedFrame(
        sequence=sequence,
        capture_time_us=capture_time_us,
        jpeg=payload[FRAME.size :],
        received_ns=received_ns,
    )
