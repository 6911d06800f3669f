"""How a session divides its cache among video, questions and answers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from edge_vlm.config import VisionAttention
from edge_vlm.errors import ConfigError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.text.prompt import longest_frame
from edge_vlm_runtime.protocol.messages import VideoRoom
from edge_vlm_runtime.protocol.settings import Attention, ModelLimits, ServerLimits, SessionSettings

SCORED_POLICIES = ("stream", "frame_topk")
"""Policies that look at the scores of the token scorer."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How a stream is remembered."""

    attention: Attention
    window_tokens: int
    """Bound of the video in the cache."""
    last_n: int
    """Frames shown in `last_n` mode."""
    reserve_tokens: int
    """Positions that stay free after the video for the dialogue."""


def default_settings(bundle: EngineBundle, limits: ServerLimits) -> SessionSettings:
    """Settings of a new session: ours, overridden by what the bundle says it was made for.

    A bundle's `defaults` may hold any field of SessionSettings, and `fps` for `fps_cap`; other keys
    are not about sessions. An answer may take a quarter of the cache, as a question may, where the
    bundle would let it take more. Raises ConfigError on a value out of range.
    """
    names = {field.name for field in dataclasses.fields(SessionSettings)}
    fields = {name: value for name, value in bundle.defaults.items() if name in names}
    if "fps" in bundle.defaults:
        fields.setdefault("fps_cap", float(bundle.defaults["fps"]))
    trained_by_frame = bundle.config.attention is VisionAttention.FRAME
    fields.setdefault("attention", Attention.FRAME if trained_by_frame else Attention.EXACT)
    settings = SessionSettings().changed(fields)
    if "max_answer_tokens" in fields:
        most = max(1, cache_capacity(ModelLimits.from_bundle(bundle), limits) // 4)
        settings = settings.changed({"max_answer_tokens": min(settings.max_answer_tokens, most)})
    return settings


def cache_capacity(model: ModelLimits, limits: ServerLimits) -> int:
    """Rows of one session's cache."""
    affordable = limits.max_session_bytes // model.token_bytes
    return min(limits.kv_capacity_tokens, model.max_positions, model.max_cache_tokens, affordable)


def question_capacity(model: ModelLimits, limits: ServerLimits) -> int:
    """Longest question in tokens: at most a quarter of the cache."""
    return min(limits.max_question_tokens, cache_capacity(model, limits) // 4)


def dialogue_reserve(settings: SessionSettings, model: ModelLimits, limits: ServerLimits) -> int:
    """Cache rows kept free after the video: a picture at full detail, earlier turns, the question,
    the answer. The picture gets a quarter of the cache at most and has fewer crops then."""
    turn = question_capacity(model, limits) + settings.max_answer_tokens
    snapshot = min(
        model.snapshot_tokens, model.max_prefill_tokens, cache_capacity(model, limits) // 4
    )
    return snapshot + turn * (1 + settings.history_turns)


def video_window(settings: SessionSettings, model: ModelLimits, limits: ServerLimits) -> int:
    """Tokens of video to remember under these settings.

    Raises ConfigError when the dialogue leaves too little room, or `window_tokens` asks for more
    than there is or for less than two whole frames.
    """
    if not model.has_scorer and settings.policy in SCORED_POLICIES:
        raise ConfigError(
            f"policy {settings.policy!r} chooses by scores, and the model has no token scorer",
            where="session settings",
            remedy="take keep_all",
        )
    room = cache_capacity(model, limits) - dialogue_reserve(settings, model, limits)
    least = 2 * (model.num_cells + 16)  # with their stamps and markers
    if room < least:
        raise ConfigError(
            f"no room for video: {room} tokens are left and two frames need {least}",
            where="session settings",
            remedy="lower max_answer_tokens or history_turns, or give the session more memory",
        )
    if settings.window_tokens == 0:
        return room
    if not least <= settings.window_tokens <= room:
        raise ConfigError(
            f"window_tokens must be 0 or in {least}..{room}, got {settings.window_tokens}",
            where="session settings",
        )
    return settings.window_tokens


def shown_window(settings: SessionSettings, model: ModelLimits, limits: ServerLimits) -> int:
    """Tokens of video that one question can be shown. Raises ConfigError as `video_window`."""
    window = video_window(settings, model, limits)
    if settings.attention is Attention.FRAME:
        return window
    return min(window, model.max_prefill_tokens)  # all of it goes through one run of the graph


def video_room(settings: SessionSettings, model: ModelLimits, limits: ServerLimits) -> VideoRoom:
    """How many frames `shown_window` holds, and what bounds it. Raises ConfigError as that."""
    tokens = shown_window(settings, model, limits)
    frames = int((tokens - 1) // _frame_tokens(settings, model))  # the first token is the prompt's
    reserve = dialogue_reserve(settings, model, limits)
    room = {
        "positions": model.max_positions - reserve,  # before what a larger export could not help
        "bundle": model.max_cache_tokens - reserve,
        "kv_tokens": limits.kv_capacity_tokens - reserve,
        "session_memory": limits.max_session_bytes // model.token_bytes - reserve,
    }
    if settings.attention is not Attention.FRAME:
        room["bundle"] = min(room["bundle"], model.max_prefill_tokens)
    if settings.window_tokens:
        room["window_tokens"] = settings.window_tokens
    limit = min(room, key=lambda name: room[name])
    if settings.attention is Attention.LAST_N and settings.last_n <= frames:
        frames, limit = settings.last_n, "last_n"
    return VideoRoom(
        frames_that_fit=frames, tokens=tokens, limited_by=limit, remedy=ROOM_REMEDIES[limit]
    )


ROOM_REMEDIES = {
    "bundle": "export it again with a larger --frames",
    "positions": "the model was made for no more positions",
    "kv_tokens": "serve with a larger --kv-tokens",
    "session_memory": "serve with a larger --session-memory",
    "window_tokens": "raise window_tokens, or set it to 0",
    "last_n": "raise last_n, or set attention to exact",
}


def _frame_tokens(settings: SessionSettings, model: ModelLimits) -> float:
    """Mean tokens of a frame."""
    if settings.policy == "keep_all":
        return model.frame_tokens
    kept = settings.keep_ratio * model.num_cells
    if settings.vision_tokens_per_s:
        kept = min(settings.vision_tokens_per_s / settings.fps_cap, model.num_cells)
    return kept + longest_frame(0)


def plan_memory(settings: SessionSettings, model: ModelLimits, limits: ServerLimits) -> MemoryPlan:
    """Raises ConfigError as `video_window` does."""
    return MemoryPlan(
        attention=settings.attention,
        window_tokens=video_window(settings, model, limits),
        last_n=settings.last_n,
        reserve_tokens=dialogue_reserve(settings, model, limits),
    )
