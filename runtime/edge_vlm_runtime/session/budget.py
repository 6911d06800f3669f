"""How a session divides its cache among video, questions and answers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from edge_vlm.config import VisionAttention
from edge_vlm.errors import BundleSchemaError, ConfigError
from edge_vlm.formats.bundle import MANIFEST, EngineBundle
from edge_vlm.text.prompt import longest_frame
from edge_vlm_runtime.protocol.messages import VideoRoom
from edge_vlm_runtime.protocol.settings import (
    CLIP,
    KEEP_ALL,
    Attention,
    DropPolicy,
    ModelLimits,
    ServerLimits,
    SessionSettings,
)

SCORED_POLICIES = ("stream", "frame_topk", CLIP)
"""Policies that look at scores."""


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
    bundle would let it take more. Raises BundleSchemaError on a value out of range.
    """
    names = {field.name for field in dataclasses.fields(SessionSettings)}
    fields = {name: value for name, value in bundle.defaults.items() if name in names}
    if "fps" in bundle.defaults:
        fields.setdefault("fps_cap", bundle.defaults["fps"])
    trained_by_frame = bundle.config.attention is VisionAttention.FRAME
    fields.setdefault("attention", Attention.FRAME if trained_by_frame else Attention.EXACT)
    try:
        settings = SessionSettings().changed(fields)
    except ConfigError as error:
        raise BundleSchemaError(f"{MANIFEST}, defaults: {error}", where=bundle.path) from error
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


def dialogue_reserve(
    settings: SessionSettings, model: ModelLimits, limits: ServerLimits, subtitle_tokens: int = 0
) -> int:
    """Cache rows kept free after the video: a picture at full detail, subtitles, earlier turns, the
    question, the answer. The picture gets a quarter of the cache at most, with fewer crops then."""
    turn = question_capacity(model, limits) + settings.max_answer_tokens
    snapshot = min(
        model.snapshot_tokens, model.max_prefill_tokens, cache_capacity(model, limits) // 4
    )
    return snapshot + subtitle_tokens + turn * (1 + settings.history_turns)


def longest_answer(
    settings: SessionSettings, model: ModelLimits, limits: ServerLimits, subtitle_tokens: int = 0
) -> int:
    """Tokens, 1 or more: a quarter of the cache at most, and what the window of these settings
    leaves. Who asks for the longest answer did not ask for a smaller window."""
    room, turns = cache_capacity(model, limits), 1 + settings.history_turns
    reserve = dialogue_reserve(settings, model, limits, subtitle_tokens)
    window = settings.window_tokens or _least_window(model)
    left = room - window - (reserve - turns * settings.max_answer_tokens)
    return max(1, min(room // 4, left // turns))


def clip_capacity(settings: SessionSettings, model: ModelLimits, limits: ServerLimits) -> int:
    """Frames of a clip that can be held until their cells are chosen, in what the cache and the
    last frame's states (`reuse`) leave of a session's memory."""
    left = limits.max_session_bytes - cache_capacity(model, limits) * model.token_bytes
    left -= model.reuse_bytes if settings.reuse else 0
    return left // model.frame_bytes


WITHOUT_SCORER = "take policy difference (by pixels), or export the weights with --scorer change"


def require_reuse(model: ModelLimits, threshold: float) -> None:
    """Raises ConfigError where there is no graph for it."""
    if threshold and not model.reuse_bytes:
        raise ConfigError(
            f"reuse {threshold:g} needs a graph that computes changed cells only, and the bundle "
            "has none",
            where="session settings",
            remedy="set reuse to 0, or export the weights again with --reuse",
        )


def require_honoured(settings: SessionSettings, model: ModelLimits) -> None:
    """Raises ConfigError for settings of which one would have no effect with this model."""

    def refuse(what: str, remedy: str) -> None:
        raise ConfigError(what, where="session settings", remedy=remedy)

    policy, per_s = settings.policy, settings.vision_tokens_per_s
    if not model.has_scorer:
        if policy in SCORED_POLICIES:
            refuse(
                f"policy {policy!r} chooses by scores, and the model has no token scorer",
                WITHOUT_SCORER,
            )
        budget = (
            f"vision_tokens_per_s {per_s:g}" if per_s else f"keep_ratio {settings.keep_ratio:g}"
        )
        if policy == KEEP_ALL and (per_s or settings.keep_ratio < 1):
            refuse(
                f"{budget} would be ignored: the model has no token scorer, and policy 'keep_all' "
                "keeps every cell",
                WITHOUT_SCORER,
            )
    if settings.change_threshold:
        if model.scorer != "change":
            refuse(
                "change_threshold is about changes, and what the model has for a scorer is "
                f"{model.scorer!r}",
                "take keep_ratio, or export the weights with --scorer change",
            )
        if policy != SessionSettings.policy:
            refuse(f"change_threshold would be ignored by policy {policy!r}", "take policy stream")
        if per_s:
            refuse("change_threshold and vision_tokens_per_s are two budgets", "take one of them")
    require_reuse(model, settings.reuse)
    if policy == CLIP:
        if settings.delivery is not DropPolicy.WAIT:
            refuse(
                "policy 'clip' chooses over a finished clip, and a live stream has no end",
                "take policy stream, or delivery wait for a file",
            )
        if per_s:
            refuse(
                "policy 'clip' keeps a share of a clip, vision_tokens_per_s would be ignored",
                "take keep_ratio, or policy stream",
            )


def notes_on(settings: SessionSettings, model: ModelLimits) -> list[str]:
    """What a viewer should know about these settings with this model."""
    notes = []
    by_frame = settings.attention is Attention.FRAME
    if by_frame and model.trained_attention != VisionAttention.FRAME.value:
        notes.append(
            "attention frame is faster, but the weights were trained with every frame seeing every "
            "other one: attention exact is what they know, edge-vlm eval measures the difference"
        )
    elif not by_frame and model.trained_attention == VisionAttention.FRAME.value:
        notes.append(
            f"attention {settings.attention.value} shows the frames otherwise than the weights "
            "were trained: attention frame is what they know"
        )
    keeps_all = settings.keep_ratio == 1 and not settings.vision_tokens_per_s
    if keeps_all and not model.has_scorer and settings.policy != KEEP_ALL:
        notes.append(f"keep_ratio 1: every cell is kept, also with policy {settings.policy}")
    if model.offline_policy == CLIP and settings.policy != CLIP:
        notes.append(
            "the weights were published with a budget over the finished clip (policy clip, for "
            f"files); policy {settings.policy} chooses as the frames come, so cells and answers "
            "differ"
        )
    if settings.change_threshold:
        notes.append(
            f"cells that changed by more than {settings.change_threshold:g} are kept, however many "
            "these are: keep_ratio has no say"
        )
    return notes


def video_window(
    settings: SessionSettings, model: ModelLimits, limits: ServerLimits, subtitle_tokens: int = 0
) -> int:
    """Tokens of video to remember under these settings.

    Raises ConfigError when the dialogue leaves too little room, or `window_tokens` asks for more
    than there is or for less than two whole frames.
    """
    require_honoured(settings, model)
    if settings.policy == CLIP and clip_capacity(settings, model, limits) < 2:
        raise ConfigError(
            "policy 'clip' holds a clip until it is asked about, and there is no memory for it",
            where="session settings",
            remedy="give sessions more memory (--session-memory), or fewer tokens of cache",
        )
    cache_bytes = cache_capacity(model, limits) * model.token_bytes
    if settings.reuse and cache_bytes + model.reuse_bytes > limits.max_session_bytes:
        raise ConfigError(
            f"reuse keeps {model.reuse_bytes:,} bytes of a session's last frame, and its memory is "
            "taken by the cache",
            where="session settings",
            remedy="give sessions more memory (--session-memory), or fewer tokens of cache "
            "(--kv-tokens)",
        )
    reserve = dialogue_reserve(settings, model, limits, subtitle_tokens)
    room = cache_capacity(model, limits) - reserve
    least = _least_window(model)
    if room < least:
        raise ConfigError(
            f"no room for video: {room} tokens are left and two frames need {least}"
            + (f"; the subtitles have {subtitle_tokens}" if subtitle_tokens else ""),
            where="session settings",
            remedy="lower max_answer_tokens or history_turns, "
            + ("take fewer subtitles, " if subtitle_tokens else "")
            + "or give the session a larger cache (--kv-tokens, --session-memory)",
        )
    if settings.window_tokens == 0:
        return room
    if not least <= settings.window_tokens <= room:
        raise ConfigError(
            f"window_tokens must be 0 or in {least}..{room}, got {settings.window_tokens}",
            where="session settings",
        )
    return settings.window_tokens


def _least_window(model: ModelLimits) -> int:
    return 2 * (model.num_cells + 16)  # two frames with their stamps and markers


def shown_tokens(plan: MemoryPlan, model: ModelLimits) -> int:
    """Tokens of video that a question is shown at most."""
    if plan.attention is Attention.FRAME:
        return plan.window_tokens
    return min(plan.window_tokens, model.max_prefill_tokens)  # all go through one run of the graph


def video_room(
    settings: SessionSettings, model: ModelLimits, limits: ServerLimits, subtitle_tokens: int = 0
) -> VideoRoom:
    """How many frames a question is shown at most, and what bounds it. Raises ConfigError as
    `video_window`."""
    tokens = shown_tokens(plan_memory(settings, model, limits, subtitle_tokens), model)
    frames = int((tokens - 1) // _frame_tokens(settings, model))  # the first token is the prompt's
    reserve = dialogue_reserve(settings, model, limits, subtitle_tokens)
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


def plan_memory(
    settings: SessionSettings, model: ModelLimits, limits: ServerLimits, subtitle_tokens: int = 0
) -> MemoryPlan:
    """Raises ConfigError as `video_window` does."""
    return MemoryPlan(
        attention=settings.attention,
        window_tokens=video_window(settings, model, limits, subtitle_tokens),
        last_n=settings.last_n,
        reserve_tokens=dialogue_reserve(settings, model, limits, subtitle_tokens),
    )
