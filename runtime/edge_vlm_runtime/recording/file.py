"""The file of one recorded session, and how far it can be read.

    8 bytes    b"EVLMREC" and the format's version
    records    length u32, crc32 u32 (little-endian), then `length` bytes:
               one line of JSON, and after it a picture if the record has one

The first record is the header: how the session began. After it come the session's calls (see
`session.calls`) in the order in which they were made, each with the times it was given and the
events that came of it, and the frames that were dropped before the session got them. So replaying
is: make the same calls and compare the events. A file that was cut off is good up to its last whole
record.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from edge_vlm.errors import EdgeVlmError, RecordingError
from edge_vlm.json_text import MALFORMED, parse_json
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.base import MAX_CAPTURE_TIME_US
from edge_vlm_runtime.protocol.frames import DropReason
from edge_vlm_runtime.session.calls import (
    Call,
    Called,
    CloseCall,
    FrameCall,
    MessageCall,
    StatsCall,
    StepCall,
)
from edge_vlm_runtime.session.frames import DroppedFrame, EncodedFrame, Encoding
from edge_vlm_runtime.session.session import Turn

MAGIC = b"EVLMREC\x02"
SUFFIX = ".evlm"
RECORD = struct.Struct("<II")
NOT_WRITTEN = ("data", "ahead")
"""Of a frame: what follows the line, and what can be made of that again."""
MAX_RECORD_BYTES = 1 << 28
"""A larger length is damage, not a record."""
LIMITS = {
    "seq": (0, 0xFFFFFFFF),
    "capture_us": (0, MAX_CAPTURE_TIME_US),
    **dict.fromkeys(("frames_waiting", "frames_received"), (0, 1 << 62)),
    **dict.fromkeys(("now_ns", "done_ns", "received_ns"), (-(1 << 62), 1 << 62)),
}
"""Of the numbers of a record, whichever has them."""
MOST_THREADS = 1024
DROPPED = "dropped"
CALLS: dict[str, type[Call]] = {
    "frame": FrameCall,
    "message": MessageCall,
    "step": StepCall,
    "stats": StatsCall,
    "close": CloseCall,
}
NAMES = {kind: name for name, kind in CALLS.items()}

Entry = Called | DroppedFrame


# ---- to bytes --------------------------------------------------------------------------------


def header_bytes(header: Mapping[str, Any]) -> bytes:
    return MAGIC + _record(header)


def entry_bytes(entry: Entry) -> bytes:
    if isinstance(entry, DroppedFrame):
        fields = {"kind": DROPPED, "arguments": vars(entry)}
        return _record(fields, entry.frame.data)
    call = entry.call
    fields = {**vars(entry), "kind": NAMES[type(call)], "arguments": vars(call)}
    del fields["call"]
    return _record(fields, call.frame.data if isinstance(call, FrameCall) else b"")


def _record(fields: Mapping[str, Any], picture: bytes = b"") -> bytes:
    payload = json.dumps(fields, default=_plain).encode() + b"\n" + picture
    return RECORD.pack(len(payload), zlib.crc32(payload)) + payload


def _plain(value: object) -> object:
    if isinstance(value, EncodedFrame):
        return {name: field for name, field in vars(value).items() if name not in NOT_WRITTEN}
    if isinstance(value, protocol.ClientMessage):
        return protocol.encode(value)
    raise TypeError(f"{type(value).__name__} has no place in a recording")


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
    @contextmanager
    def open(cls, path: Path) -> Iterator[Recording]:
        """Raises RecordingError when this is no recording, or one of another version."""
        try:
            file = path.open("rb")
        except OSError as error:
            raise RecordingError(f"cannot be read: {error.strerror}", where=path) from error
        with file:
            yield cls(path, file, _header(path, file))

    @property
    def threads(self) -> int:
        """Of the engines that it was recorded with. Raises RecordingError."""
        threads = self.header.get("threads", 2)
        if type(threads) is not int or not 1 <= threads <= MOST_THREADS:
            raise RecordingError(
                f"the recording's threads are {threads!r:.60}",
                where=self.path,
                remedy="say how many with --threads",
            )
        return threads

    def entries(self) -> Iterator[Entry]:
        """Everything after the header. Raises RecordingError on damage; a file that just ends is
        read up to its last whole entry and then `cut_off` is set."""
        while True:
            start = self._file.tell()
            try:
                record = _read_record(self._file)
                if record is None:
                    return
                entry = _entry(*record)
            except _CutOff:
                size = self._file.seek(0, 2)
                self.cut_off = (
                    f"the recording is cut off: its last {size - start} bytes are no whole entry"
                )
                return
            except (_Damaged, EdgeVlmError, *MALFORMED) as error:
                raise RecordingError(
                    f"the recording is damaged at byte {start}: {error}", where=self.path
                ) from error
            yield entry


class _CutOff(Exception):
    """The file ends inside a record."""


class _Damaged(Exception):
    """A record's bytes are not those that were written."""


def _header(path: Path, file: BinaryIO) -> dict[str, Any]:
    magic = file.read(len(MAGIC))
    if magic[:-1] != MAGIC[:-1]:
        raise RecordingError("this is not a recording", where=path)
    if magic != MAGIC:
        raise RecordingError(
            f"a recording of format {magic[-1]}, this version reads {MAGIC[-1]}",
            where=path,
            remedy="replay it with the version that recorded it",
        )
    try:
        record = _read_record(file)
    except (_Damaged, ValueError) as error:
        raise RecordingError(f"the header is damaged: {error}", where=path) from error
    except _CutOff:
        record = None
    if record is None:
        raise RecordingError("the recording is cut off in its header", where=path)
    return record[0]


def _read_record(file: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """Fields and picture of the next record, or None at the end of the file."""
    head = file.read(RECORD.size)
    if not head:
        return None
    if len(head) < RECORD.size:
        raise _CutOff
    length, crc = RECORD.unpack(head)
    if length > MAX_RECORD_BYTES:
        raise _Damaged(f"a record of {length} bytes")
    if length > os.fstat(file.fileno()).st_size - file.tell():
        raise _CutOff  # before so much memory is taken
    payload = file.read(length)
    if zlib.crc32(payload) != crc:
        raise _Damaged("a checksum does not fit")
    line, _, picture = payload.partition(b"\n")
    fields = parse_json(line)
    if not isinstance(fields, dict):
        raise _Damaged("a record without fields")
    return fields, picture


def _entry(fields: dict[str, Any], picture: bytes) -> Entry:
    kind, arguments = fields["kind"], fields["arguments"]
    _check_numbers(fields)
    _check_numbers(arguments)
    if "frame" in arguments:
        frame = arguments["frame"]
        _check_numbers(frame)
        frame["encoding"] = Encoding(frame["encoding"])
        arguments["frame"] = EncodedFrame(**frame, data=picture)
    if kind == DROPPED:
        return DroppedFrame(**{**arguments, "reason": DropReason(arguments["reason"])})
    if kind == "message":
        arguments["message"] = protocol.decode_client_message(arguments["message"])
    elif kind == "step":
        arguments["turn"] = Turn(arguments["turn"])
    return Called(
        call=CALLS[kind](**arguments),
        now_ns=fields["now_ns"],
        done_ns=fields["done_ns"],
        events=tuple(map(_text, fields["events"])),
    )


def _check_numbers(fields: dict[str, Any]) -> None:
    """Raises ValueError for counts and times that are none."""
    for name, (least, most) in LIMITS.items():
        if name in fields and not (type(fields[name]) is int and least <= fields[name] <= most):
            raise ValueError(f"{name} is {fields[name]!r:.60}")
    video_s = fields.get("video_s", 0.0)
    if type(video_s) not in (int, float) or not math.isfinite(video_s):
        raise ValueError(f"video_s is {video_s!r:.60}")
    dropped = fields.get("frames_dropped", {})
    if not all(type(count) is int for count in dropped.values()):
        raise ValueError(f"frames_dropped is {dropped!r:.60}")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"an event is {value!r:.60}")
    return value
