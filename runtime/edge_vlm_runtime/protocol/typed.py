"""Settings and alert rules as Python's callers write them: a misspelt name fails a type checker,
and at run time a typed error that names the closest one. No I/O here."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any, Literal, TypedDict

from edge_vlm.errors import ConfigError, ProtocolError
from edge_vlm_runtime.protocol.base import ClientMessage, json_object, tag_of
from edge_vlm_runtime.protocol.messages import decode_client_message
from edge_vlm_runtime.protocol.settings import Attention, DropPolicy


class Settings(TypedDict, total=False):
    """What a client may say of its session: any fields of `SessionSettings`, which documents
    them."""

    keep_ratio: float
    vision_tokens_per_s: float
    change_threshold: float
    policy: Literal["stream", "random", "frame_topk", "difference", "keep_all", "clip"]
    policy_seed: int
    min_cells: int
    max_cells: int
    payback_frames: int
    bank_frames: float
    reuse: float
    reuse_refresh: int
    attention: Attention | Literal["frame", "exact", "last_n"]
    last_n: int
    window_tokens: int
    delivery: DropPolicy | Literal["live", "wait"]
    fps_cap: float
    raw_frames: bool
    drop_duplicates: bool
    duplicate_threshold: float
    heartbeat_s: float
    max_frame_age_s: float
    max_answer_tokens: int
    history_turns: int
    instructions: str
    subtitles: str
    temperature: float
    top_p: float
    seed: int


class RuleFields(TypedDict, total=False):
    """What may be said of an alert besides its question: fields of `AlertRule`, which documents
    them, and the `name` of `alert.create`."""

    on_threshold: float
    off_threshold: float
    hold_s: float
    clear_hold_s: float
    cooldown_s: float
    interval_s: float
    evidence: bool
    report_checks: bool
    name: str


def require_known(given: Iterable[str], kind: type, where: str) -> None:
    """Raises ConfigError for a name that is no field of `kind`, naming the closest one."""
    known = kind.__annotations__
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"unknown name {name!r}", where=where, remedy=f"{hint}known are {', '.join(known)}"
            )


def require_plain_function(on_event: object) -> None:
    """Raises ConfigError for a callback that is none, or whose work nobody would wait for."""
    if on_event is None:
        return
    if not callable(on_event) or inspect.iscoroutinefunction(on_event):
        raise ConfigError(
            f"on_event must be a plain function, got {on_event!r:.80}",
            remedy="in a coroutine iterate over client.events() instead",
        )


def checked(kind: type[ClientMessage], where: str, **fields: Any) -> ClientMessage:
    """The message with these fields, read as a server reads it. Raises ConfigError for values that
    it would not take."""
    try:
        return decode_client_message(json_object({"type": tag_of(kind), **fields}))
    except (ProtocolError, UnicodeError) as error:
        raise ConfigError(str(error), where=where) from error
