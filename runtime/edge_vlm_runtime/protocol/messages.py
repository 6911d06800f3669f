"""The wire protocol: what stands in a message, and its bytes. No I/O here.

Text messages are JSON objects with a `type`; names follow the OpenAI Realtime API where it has one.
Binary messages are in `frame_messages`. docs/protocol.md is generated from this module.
"""

from __future__ import annotations

from typing import Any, Literal

from edge_vlm.errors import (
    ConfigError,
    EdgeVlmError,
    ProtocolError,
    SessionError,
)
from edge_vlm.errors.requests import RequestError
from edge_vlm.formats.usage import ModelCard
from edge_vlm_runtime.protocol import alerts as alert_messages
from edge_vlm_runtime.protocol import questions as question_messages
from edge_vlm_runtime.protocol import realtime as realtime_events
from edge_vlm_runtime.protocol import streams as stream_messages
from edge_vlm_runtime.protocol.answer_events import (
    NewestFrame,
    PointedAt,
    ResponseCreated,
    ResponseDone,
    ResponseOutputTextDelta,
    Snapshot,
    Usage,
)
from edge_vlm_runtime.protocol.base import MAX_CAPTURE_TIME_US as MAX_CAPTURE_TIME_US
from edge_vlm_runtime.protocol.base import (
    UNSET,
    CaptureTimeUs,
    ClientMessage,
    FrameNumber,
    Part,
    ServerEvent,
    Subtitles,
    Text,
    UnsetType,
    decode,
    require_few_parts,
)
from edge_vlm_runtime.protocol.base import encode as encode
from edge_vlm_runtime.protocol.base import event_id_of as event_id_of
from edge_vlm_runtime.protocol.base import json_object as json_object
from edge_vlm_runtime.protocol.base import json_schema as json_schema
from edge_vlm_runtime.protocol.base import tag_of as tag_of
from edge_vlm_runtime.protocol.frames import HEADER as HEADER
from edge_vlm_runtime.protocol.frames import HEADER_VERSION as HEADER_VERSION
from edge_vlm_runtime.protocol.frames import TYPE_JPEG as TYPE_JPEG
from edge_vlm_runtime.protocol.frames import TYPE_RAW as TYPE_RAW
from edge_vlm_runtime.protocol.frames import FrameMessage as FrameMessage
from edge_vlm_runtime.protocol.frames import decode_frame_message as decode_frame_message
from edge_vlm_runtime.protocol.frames import frame_message as frame_message
from edge_vlm_runtime.protocol.frames import raw_frame_message as raw_frame_message
from edge_vlm_runtime.protocol.memory_events import (
    ChosenFrame,
    ClipChosen,
    FrameAccepted,
    FrameDropped,
    MemoryEvicted,
    MemoryRebased,
)
from edge_vlm_runtime.protocol.questions import ConversationItemCreate as ConversationItemCreate
from edge_vlm_runtime.protocol.questions import ConversationItemCreated as ConversationItemCreated
from edge_vlm_runtime.protocol.questions import InputImageBufferAppend as InputImageBufferAppend
from edge_vlm_runtime.protocol.questions import ResponseCancel as ResponseCancel
from edge_vlm_runtime.protocol.questions import ResponseCreate as ResponseCreate
from edge_vlm_runtime.protocol.responses import (
    ConversationItem,
    Ignored,
    OutputPart,
    RealtimeResponse,
    RealtimeSession,
    RealtimeUsage,
    TokenDetails,
)
from edge_vlm_runtime.protocol.settings import ModelLimits, ServerLimits, SessionSettings
from edge_vlm_runtime.protocol.streams import Stream

PATH = "/v1/realtime"
MAX_ERROR_TEXT = 1000
"""Characters of an error's message; it may repeat what a client sent."""
RESUME_PARAMETER = "resume"
"""In the query of a connection that goes on with a session."""
PROTOCOL_VERSION = 1


# ---- what a client sends ---------------------------------------------------------------------


class OwnSettings(Part, forbid_unknown_fields=True, kw_only=True):
    """The settings to change; absent fields stay as they are."""

    keep_ratio: float | UnsetType = UNSET
    vision_tokens_per_s: float | UnsetType = UNSET
    change_threshold: float | UnsetType = UNSET
    policy: str | UnsetType = UNSET
    policy_seed: int | UnsetType = UNSET
    min_cells: int | UnsetType = UNSET
    max_cells: int | UnsetType = UNSET
    payback_frames: int | UnsetType = UNSET
    bank_frames: float | UnsetType = UNSET
    reuse: float | UnsetType = UNSET
    reuse_refresh: int | UnsetType = UNSET
    attention: str | UnsetType = UNSET
    last_n: int | UnsetType = UNSET
    window_tokens: int | UnsetType = UNSET
    delivery: str | UnsetType = UNSET
    fps_cap: float | UnsetType = UNSET
    raw_frames: bool | UnsetType = UNSET
    drop_duplicates: bool | UnsetType = UNSET
    duplicate_threshold: float | UnsetType = UNSET
    heartbeat_s: float | UnsetType = UNSET
    max_frame_age_s: float | UnsetType = UNSET
    max_answer_tokens: int | UnsetType = UNSET
    history_turns: int | UnsetType = UNSET
    instructions: Text | UnsetType = UNSET
    subtitles: Subtitles | UnsetType = UNSET
    temperature: float | UnsetType = UNSET
    top_p: float | UnsetType = UNSET
    seed: int | UnsetType = UNSET

    def fields(self) -> dict[str, Any]:
        names = OwnSettings.__struct_fields__
        return {n: getattr(self, n) for n in names if getattr(self, n) is not UNSET}


class SettingsPatch(OwnSettings, kw_only=True):
    """The settings to change, and what OpenAI's clients say of a session. Of OpenAI's fields
    `instructions`, `max_output_tokens` and `temperature` have their effect; the others are taken
    and left aside, and `session.updated` says what is in force."""

    max_output_tokens: int | Literal["inf"] | UnsetType | None = UNSET
    """`max_answer_tokens`, or as many as there is room for."""
    max_response_output_tokens: int | Literal["inf"] | UnsetType | None = UNSET
    """As it was called before."""
    edge_vlm: OwnSettings | UnsetType = UNSET
    """Our own settings, where a client keeps them apart."""
    type: Ignored = UNSET
    id: Ignored = UNSET
    object: Ignored = UNSET
    model: Ignored = UNSET
    output_modalities: Ignored = UNSET
    modalities: Ignored = UNSET
    audio: Ignored = UNSET
    voice: Ignored = UNSET
    speed: Ignored = UNSET
    input_audio_format: Ignored = UNSET
    output_audio_format: Ignored = UNSET
    input_audio_transcription: Ignored = UNSET
    input_audio_noise_reduction: Ignored = UNSET
    turn_detection: Ignored = UNSET
    tools: Ignored = UNSET
    tool_choice: Ignored = UNSET
    parallel_tool_calls: Ignored = UNSET
    tracing: Ignored = UNSET
    prompt: Ignored = UNSET
    include: Ignored = UNSET
    truncation: Ignored = UNSET
    reasoning: Ignored = UNSET
    expires_at: Ignored = UNSET
    client_secret: Ignored = UNSET

    def fields(self) -> dict[str, Any]:
        """Raises ConfigError for a setting that is given twice, with two values."""
        found = super().fields()
        nested = self.edge_vlm.fields() if isinstance(self.edge_vlm, OwnSettings) else {}
        for name, value in nested.items():
            if found.setdefault(name, value) != value:
                raise ConfigError(f"{name} is given twice", where="session settings")
        return found

    @property
    def max_output(self) -> int | None:
        """Tokens of an answer, as OpenAI's clients say it."""
        for value in (self.max_output_tokens, self.max_response_output_tokens):
            if isinstance(value, int):
                return value
        return None


class SessionUpdate(ClientMessage, tag="session.update"):
    """Change settings; answered by `session.updated`. Applies to questions behind it, and to every
    frame that is not yet encoded: those sent before it that still wait, too."""

    session: SettingsPatch
    """Any of the settings below; those that are absent stay as they are."""


class InputVideoFrameAppend(ClientMessage, tag="input_video_frame.append"):
    """A frame as JSON, for clients without binary messages."""

    sequence: FrameNumber
    """As in the binary header."""
    capture_time_us: CaptureTimeUs
    """As in the binary header."""
    frame: bytes
    """A JPEG."""


class SessionClose(ClientMessage, tag="session.close"):
    """End the session; answered by `session.closed` and close code 1000."""


class SessionResume(ClientMessage, tag="session.resume"):
    """Go on with a session whose connection broke: the first message of a connection that was
    opened with `?resume=1`; answered by `session.resumed`."""

    session_id: str
    """Of `session.created`."""
    resume_token: str
    """Of `session.created`."""
    last_sequence: int
    """Number of the last event that arrived."""


class Ping(ClientMessage, tag="ping"):
    """Answered by `pong` with the same `event_id`."""


# ---- what the server sends -------------------------------------------------------------------


class Model(Part, kw_only=True):
    """What answers."""

    bundle: str
    """Name of the bundle."""
    limits: ModelLimits
    """See below."""
    card: ModelCard | None = None
    """What it knows, in words, with examples of questions; null where nobody wrote one."""


class VideoRoom(Part, kw_only=True):
    """How much video one question can be shown under the settings in force."""

    frames_that_fit: int
    """Whole frames, with time stamps up to 9999.9 s; where cells are dropped, as many as their mean
    number leaves room for."""
    tokens: int
    limited_by: str
    """What keeps it from being more: bundle, positions, kv_tokens, session_memory, window_tokens
    or last_n."""
    remedy: str
    """How to show more."""


class SessionCreated(ServerEvent, tag="session.created"):
    """The first event of a session."""

    session_id: str
    resume_token: str
    """Secret; whoever has it can go on with the session."""
    protocol_version: int
    server: str
    model: Model
    settings: SessionSettings
    limits: ServerLimits
    session: RealtimeSession | UnsetType = UNSET
    """`settings` for clients of OpenAI's API."""
    video: VideoRoom | None = None
    """Null from an older server."""
    notes: list[str] | None = None
    """What a viewer should know about these settings with this model, in words."""
    stream: Stream | UnsetType = UNSET
    """The camera of the server that this connection subscribes to."""


class SessionResumed(ServerEvent, tag="session.resumed"):
    """The first event of a connection that goes on with a session, outside its numbers
    (`sequence` is 0). Behind it comes every event after `last_sequence`, none twice."""

    session_id: str
    messages_received: int
    """Text and binary messages of the client that have arrived over all connections of the session,
    each `session.resume` apart: what was sent after them is to be sent again."""
    newest_frame_sequence: int | None
    """Largest number of a frame that arrived; new frames go on from there."""
    events_to_come: int
    """Events that are sent again now."""
    protocol_version: int
    server: str
    model: Model
    settings: SessionSettings
    limits: ServerLimits
    video: VideoRoom | None = None
    event_id: str | None = None


class SessionUpdated(ServerEvent, tag="session.updated"):
    """The settings in force from now on."""

    settings: SessionSettings
    session: RealtimeSession | UnsetType = UNSET
    """`settings` for clients of OpenAI's API."""
    video: VideoRoom | None = None
    event_id: str | None = None
    notes: list[str] | None = None
    """As in `session.created`."""


class SessionStats(ServerEvent, tag="session.stats"):
    """Once a second."""

    frames_received: int
    frames_processed: int
    frames_dropped: dict[str, int]
    fps_in: float
    fps_processed: float
    cells_seen: int
    cells_kept: int
    frames_in_memory: int
    kv_tokens: int
    kv_capacity_tokens: int
    questions_waiting: int
    ttft_s: float | None
    """Of the last answer."""
    tokens_per_s: float | None = None
    """Of the last answer."""
    memory_bytes: int | None = None
    """Resident memory of the server's process."""
    power_watts: float | None = None
    """What the machine draws, or its GPUs do, where it tells."""


class SessionGoAway(ServerEvent, tag="session.go_away"):
    """The server is stopping: no new questions; answers under way get `time_left_s`."""

    time_left_s: float


class SessionClosed(ServerEvent, tag="session.closed"):
    """The last event of an orderly end."""

    reason: str


class Pong(ServerEvent, tag="pong"):
    """Answer to `ping`."""

    event_id: str | None = None


class ErrorDetail(Part, kw_only=True):
    """What went wrong; decide by `code`, never by `message`."""

    type: str
    """invalid_request_error, session_error or server_error."""
    code: str
    """Code of the error tree, such as E-NO-FRAME."""
    message: str
    param: str | None = None
    event_id: str | None = None


class Error(ServerEvent, tag="error"):
    """Something went wrong; the session goes on unless the connection is closed behind it."""

    error: ErrorDetail


PARTS: tuple[type[Part], ...] = (
    *(Model, VideoRoom, ChosenFrame, NewestFrame, Snapshot, PointedAt, Usage, ErrorDetail),
    *question_messages.PARTS,
    *(RealtimeSession, RealtimeResponse, RealtimeUsage, TokenDetails, ConversationItem, OutputPart),
    *realtime_events.PARTS,
    *alert_messages.PARTS,
    *stream_messages.PARTS,
)
CLIENT_MESSAGES: tuple[type[ClientMessage], ...] = (
    SessionUpdate,
    InputVideoFrameAppend,
    *question_messages.CLIENT_MESSAGES,
    *alert_messages.CLIENT_MESSAGES,
    SessionResume,
    SessionClose,
    Ping,
)
SERVER_EVENTS: tuple[type[ServerEvent], ...] = (
    SessionCreated,
    SessionResumed,
    SessionUpdated,
    FrameAccepted,
    FrameDropped,
    ClipChosen,
    *question_messages.SERVER_EVENTS,
    *realtime_events.SERVER_EVENTS,
    ResponseCreated,
    ResponseOutputTextDelta,
    ResponseDone,
    MemoryEvicted,
    MemoryRebased,
    *alert_messages.SERVER_EVENTS,
    *stream_messages.SERVER_EVENTS,
    SessionStats,
    SessionGoAway,
    SessionClosed,
    Pong,
    Error,
)


_CLIENT_TYPES = {tag_of(kind): kind for kind in CLIENT_MESSAGES}
_SERVER_TYPES = {tag_of(kind): kind for kind in SERVER_EVENTS}


def decode_client_message(text: str | bytes) -> ClientMessage:
    """Raises UnknownMessageType, or ProtocolError on bad JSON, a missing or an ill-typed field, and
    as `require_few_parts` does."""
    require_few_parts(text)
    return decode(text, _CLIENT_TYPES)


def decode_server_event(text: str | bytes) -> ServerEvent:
    """Raises UnknownMessageType, or ProtocolError on bad JSON, a missing or an ill-typed field."""
    return decode(text, _SERVER_TYPES)


def error_from_detail(detail: ErrorDetail) -> EdgeVlmError:
    """The error of our tree with the code that the server sent."""
    classes = [EdgeVlmError]
    for kind in classes:
        classes.extend(kind.__subclasses__())
    for kind in classes:
        if kind.code == detail.code:
            return kind(detail.message)
    return EdgeVlmError(f"{detail.code}: {detail.message}")


def error_event(error: EdgeVlmError, *, event_id: str | None = None) -> Error:
    if isinstance(error, ProtocolError):
        kind = "invalid_request_error"
    else:
        kind = "session_error" if isinstance(error, SessionError) else "server_error"
    text = str(error)[:MAX_ERROR_TEXT]
    detail = ErrorDetail(type=kind, code=error.code, message=text, event_id=event_id)
    if isinstance(error, RequestError):
        detail.param = error.param
    return Error(error=detail)
