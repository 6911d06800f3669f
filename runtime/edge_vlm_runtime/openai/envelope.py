"""Errors as OpenAI's clients read them: a status and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

from typing import Any

from edge_vlm.errors import (
    ConfigError,
    EdgeVlmError,
    FrameDecodeError,
    HostNotAllowed,
    InternalError,
    KvFull,
    MessageTooLarge,
    PositionsUsedUp,
    ProtocolError,
    QuestionCancelled,
    QuestionTooLong,
    RequestTimeout,
    ServerBusy,
    SessionError,
    SessionGone,
    SnapshotTooLarge,
    TooManyQuestions,
    TooManyRequests,
    Unauthorized,
    VideoError,
)
from edge_vlm.errors.requests import (
    MethodNotAllowed,
    ModelNotFound,
    NoSuchPath,
    RequestError,
)

STATUS: tuple[tuple[type[EdgeVlmError], int], ...] = (
    (Unauthorized, 401),
    (HostNotAllowed, 403),
    (ModelNotFound, 404),
    (NoSuchPath, 404),
    (SessionGone, 404),
    (MethodNotAllowed, 405),
    (RequestTimeout, 408),
    (MessageTooLarge, 413),
    (TooManyRequests, 429),
    (TooManyQuestions, 429),
    (ServerBusy, 503),
    (QuestionCancelled, 503),
    (ProtocolError, 400),
    (SessionError, 400),
    (ConfigError, 400),
    (FrameDecodeError, 400),
    (VideoError, 400),
)
"""The first that fits; all else is 500."""
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
TOO_LONG = (QuestionTooLong, SnapshotTooLarge, KvFull, PositionsUsedUp)
CONTEXT_TYPE = "context_length_exceeded"
"""OpenAI's word, in `type` beside our own code: clients look for it to shorten what they send."""
MAX_TEXT = 1000


def status_of(error: BaseException) -> int:
    return next((status for kind, status in STATUS if isinstance(error, kind)), 500)


def envelope(error: BaseException) -> dict[str, Any]:
    """What is not ours is told as an internal error, without its words."""
    status = status_of(error)
    kind = "server_error" if status >= 500 else TYPES.get(status, "invalid_request_error")
    if isinstance(error, TOO_LONG):
        kind = CONTEXT_TYPE
    told = error if isinstance(error, EdgeVlmError) else InternalError("see the server's log")
    return {
        "error": {
            "message": str(told)[:MAX_TEXT],
            "type": kind,
            "param": error.param if isinstance(error, RequestError) else None,
            "code": told.code,
        }
    }


def headers_of(error: BaseException) -> dict[str, str]:
    """That belong to its status."""
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, TooManyRequests):
        return {"Retry-After": str(error.retry_after_s)}
    return {"Retry-After": "1"} if status_of(error) in (429, 503) else {}
