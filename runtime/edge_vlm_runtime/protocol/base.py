"""What all messages of the wire protocol share: their base classes, and JSON in and out.

Texts are JSON objects with a `type`. No I/O here. msgspec is imported only here.
"""

from __future__ import annotations

import inspect
import numbers
from typing import Annotated, Any, TypeVar, cast

from edge_vlm.errors import ConfigError, MissingExtraError, ProtocolError, UnknownMessageType

try:
    import msgspec
except ImportError as error:
    raise MissingExtraError.for_library("msgspec", "client") from error

UNSET = msgspec.UNSET
UnsetType = msgspec.UnsetType

MAX_EVENT_ID = 256
MAX_SHOWN = 60
"""Characters of something unknown that are repeated."""
MAX_PARTS = 50_000
"""Of a message: list items, fields and the commas in its texts."""
MAX_TEXT = 20_000
"""Characters of a question: far above any limit in tokens, and quickly counted."""
MAX_SUBTITLES = 200_000
"""Characters of a film's subtitles: more than the longest prompt has tokens."""
MAX_CAPTURE_TIME_US = 1 << 53
"""285 years; the largest whole number that JavaScript counts exactly."""

EventId = Annotated[str, msgspec.Meta(max_length=MAX_EVENT_ID)]
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Subtitles = Annotated[str, msgspec.Meta(max_length=MAX_SUBTITLES)]
FrameNumber = Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
CaptureTimeUs = Annotated[int, msgspec.Meta(ge=0, le=MAX_CAPTURE_TIME_US)]


class Part(msgspec.Struct, kw_only=True):
    """Something that stands inside messages."""


class ClientMessage(msgspec.Struct, tag_field="type", forbid_unknown_fields=True, kw_only=True):
    """`event_id` is any short string; an `error` that this message causes repeats it."""

    event_id: EventId | None = None


class ServerEvent(msgspec.Struct, tag_field="type", kw_only=True):
    """`sequence` rises by one with each event of a connection."""

    sequence: int = 0


class UnknownEvent(ServerEvent, kw_only=True):
    """An event of a type that this version does not know, from a newer server. Never sent."""

    name: str
    """Its `type`."""
    event_id: str | None = None
    fields: dict[str, Any]
    """All of it, as it came."""


class _Envelope(msgspec.Struct):
    type: str
    event_id: str | None = None
    sequence: int = 0


Kind = TypeVar("Kind", ClientMessage, ServerEvent)


def tag_of(kind: type[msgspec.Struct]) -> str:
    """What stands as `type` in a message."""
    return str(kind.__struct_config__.tag)


def decode(text: str | bytes, types: dict[str, type[Kind]]) -> Kind:
    """The message of one of `types`, given by tag.

    Raises UnknownMessageType, or ProtocolError on bad JSON, a missing or an ill-typed field.
    """
    try:
        name = msgspec.json.decode(text, type=_Envelope).type
        kind = types.get(name)
        if kind is not None:
            return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a message of this protocol: {error}") from error
    except RecursionError as error:
        raise ProtocolError("not a message of this protocol: nested too deeply") from error
    raise UnknownMessageType(
        f"unknown message type {name[:MAX_SHOWN]!r}",
        remedy=f"known are {', '.join(types)}",
    )


def require_few_parts(text: str | bytes) -> None:
    """Raises ProtocolError for JSON in more parts than any message needs: each costs as much to
    read as a kilobyte of a picture."""
    if isinstance(text, str):
        parts = sum(map(text.count, ",[{"))
    else:
        parts = sum(map(text.count, (b",", b"[", b"{")))
    if parts > MAX_PARTS:
        raise ProtocolError(
            f"a message of more than {MAX_PARTS} parts", remedy="send it in several, or less text"
        )


def unknown_event(text: str | bytes) -> UnknownEvent:
    """An event for which `decode` raised UnknownMessageType. Raises ProtocolError when what all
    events have is ill-typed in it."""
    try:
        envelope = msgspec.json.decode(text, type=_Envelope)
        fields = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a message of this protocol: {error}") from error
    return UnknownEvent(
        name=envelope.type, event_id=envelope.event_id, sequence=envelope.sequence, fields=fields
    )


def event_id_of(text: str | bytes) -> str | None:
    """The `event_id` of a message that may be unusable otherwise."""
    try:
        found = msgspec.json.decode(text, type=_Envelope).event_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return None if found is None or len(found) > MAX_EVENT_ID else found


def encode(message: ClientMessage | ServerEvent) -> str:
    return msgspec.json.encode(message).decode()


def encode_named(event: ServerEvent, name: str) -> str:
    """JSON text of an event whose `event_id` is `name`, unless it repeats that of a message."""
    if "event_id" in event.__struct_fields__:
        event.event_id = event.event_id or name  # type: ignore[attr-defined]
        return encode(event)
    return f"{encode(event)[:-1]},{msgspec.json.encode({'event_id': name}).decode()[1:]}"


def json_value(text: bytes) -> Any:
    """Plain values of any JSON. Raises ProtocolError."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ProtocolError("not JSON: nested too deeply") from error


def json_object(fields: dict[str, Any]) -> str:
    """JSON text of plain values; None is left out. Raises ProtocolError for text that is none."""
    told = {name: value for name, value in fields.items() if value is not None}
    try:
        return msgspec.json.encode(told, enc_hook=_plain).decode()
    except UnicodeEncodeError as error:  # bytes of a terminal that are no UTF-8
        raise ProtocolError(
            f"not text: {error.object!r}", remedy="give it in UTF-8 (`locale` says what is set)"
        ) from error


def _plain(value: Any) -> Any:
    """Numbers of numpy and the like as Python's."""
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise ConfigError(f"{type(value).__name__} cannot be sent: {value!r:.60}")


def json_bytes(value: Any) -> bytes:
    """JSON of plain values and of parts of messages."""
    return msgspec.json.encode(value)


def json_schema(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """JSON schema of one message, definitions included."""
    return cast(dict[str, Any], _flush_left(msgspec.json.schema(kind)))


def _flush_left(schema: Any) -> Any:
    """Descriptions without their docstrings' indentation, which msgspec before 0.23 leaves in."""
    if isinstance(schema, list):
        return [_flush_left(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: inspect.cleandoc(part)
        if key == "description" and isinstance(part, str)
        else _flush_left(part)
        for key, part in schema.items()
    }
