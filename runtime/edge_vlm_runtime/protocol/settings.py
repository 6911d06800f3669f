"""What one viewer may choose for a session, and what the server allows at all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any

import numpy as np

from edge_vlm.config import MOST_FPS, require_numbers
from edge_vlm.console.options import About
from edge_vlm.errors import BundleSchemaError, ConfigError
from edge_vlm.formats.bundle import VIT_STEM_REUSE, EngineBundle
from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm.pruning.clip_budget import variant_of
from edge_vlm.pruning.policies import PAYBACK_FRAMES, POLICY_NAMES
from edge_vlm.pruning.reuse import REFRESH_FRAMES
from edge_vlm.text.prompt import longest_frame, longest_image

CAN_BE_NONE = ("resume_grace_s", "max_answer_slowdown", "max_waiting_requests")
VIDEO_SIDE, SNAPSHOT_SIDE = 1280, 4096
"""Pixels of a picture's longer side that are sent at most, to models that see less anyway."""
CLIP, KEEP_ALL = "clip", "keep_all"
POLICIES = (*POLICY_NAMES, CLIP)
MAX_WHOLE = 1 << 53
"""The largest whole number that every reader of JSON counts exactly."""
LEAST_RATIO = 1e-6
LEAST, MOST = 1e-6, 1e9
"""Of other numbers that may be broken: beyond these their products are no numbers any more."""
"""Less than a cell in a day of video."""


class DropPolicy(str, Enum):
    """What happens to frames that come faster than they can be processed."""

    LIVE = "live"
    """The newest wins: one slot, older frames are dropped and counted."""
    WAIT = "wait"
    """None is dropped: the sender keeps a few frames unacknowledged at most (files)."""


class Attention(str, Enum):
    """How the remembered frames are shown to the language model."""

    FRAME = "frame"
    """Each frame is appended once; two-way inside a frame, causal between frames."""
    EXACT = "exact"
    """All remembered frames are prefilled together when a question comes, all of them two-way; that
    stays until the next frame."""
    LAST_N = "last_n"
    """As `exact`, with the last `last_n` frames only: the control arm of any memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """The effective settings of one session; every field can be changed by `session.update`.

    Raises ValueError naming field and value.
    """

    keep_ratio: float = 0.5
    """Share of cells kept, (0, 1]."""
    vision_tokens_per_s: Annotated[float, About(option="tokens_per_second", metavar="N")] = 0.0
    """Cells kept per second of video, instead of `keep_ratio`, at whatever rate frames come; 0:
    `keep_ratio` holds."""
    change_threshold: Annotated[float, About(metavar="N")] = 0.0
    """Cells that changed by more than this since they were last kept are kept, however many these
    are, instead of `keep_ratio`; for models whose scorer is change, see pruning.md; 0: `keep_ratio`
    holds."""
    policy: str = "stream"
    """How cells are chosen: stream, random, frame_topk, difference, keep_all, or for a file clip,
    which chooses when it is asked; see pruning.md."""
    policy_seed: int = 0
    """For the policy `random`."""
    min_cells: int = 2
    """Cells that every frame keeps, as far as keep_ratio allows."""
    max_cells: int = 0
    """Cells that a frame after the first keeps at most; 0: all of them."""
    payback_frames: int = PAYBACK_FRAMES
    """Over so many frames a stream pays back its whole first one."""
    bank_frames: float = 2.0
    """Cells that quiet frames leave to later ones at most, in whole frames."""
    reuse: Annotated[float, About(metavar="LEVELS")] = 0.0
    """In front of the scorer, compute only cells of which a patch changed by so many grey levels
    (0..255, mean of its pixels) since they were last computed, and what touches it; after a cut, or
    where the picture's size changes, all of them. For bundles exported with it, see pruning.md; 0:
    every cell of every frame is computed."""
    reuse_refresh: Annotated[int, About(metavar="FRAMES")] = REFRESH_FRAMES
    """With `reuse`: each cell is computed at least once in so many frames, not all in one."""
    attention: Attention = Attention.FRAME
    """`frame`: each frame is appended once; `exact`: all remembered frames are prefilled together
    when a question comes, seeing each other both ways; `last_n`: so, with the last few only."""
    last_n: int = 4
    """Frames that `last_n` shows."""
    window_tokens: int = 0
    """Tokens of video the session remembers, older frames are evicted whole; 0: as many as fit."""
    delivery: DropPolicy = DropPolicy.LIVE
    """`live`: the newest frame wins; `wait`: none is dropped, the sender waits."""
    fps_cap: Annotated[float, About(option="fps")] = 2.0
    """Frames per second of capture time that a live session takes; the rest is dropped."""
    raw_frames: bool = False
    """Binary messages may be raw pictures (type 2); send none before the `session.updated` that
    says so, or it is dropped as `decode_error`."""
    drop_duplicates: bool = True
    """Live sessions drop frames that look like the last one encoded."""
    duplicate_threshold: float = 6.0
    """Largest change (0..255) of any point of a 32x32 thumbnail that still is the same picture."""
    heartbeat_s: float = 10.0
    """A duplicate is encoded all the same if nothing was for this long."""
    max_frame_age_s: float = 2.0
    """A live frame that waited longer is dropped as stale."""
    max_answer_tokens: int = 48
    """An answer is cut after so many tokens; its `finish_reason` is `length` then."""
    history_turns: Annotated[int, About(option="history", metavar="TURNS")] = 0
    """Earlier questions and answers shown with each question."""
    instructions: str = ""
    """What holds for every answer, such as "Answer in one word.": it stands before each question,
    at the begin of the user's turn, as the chat format has no other place for it. With a question
    it has to fit into `max_question_tokens`, alone into half of that. Alerts are asked without."""
    subtitles: str = ""
    """Of the film that is shown: they stand between the video and the first question, as Molmo2's
    prompt has them (`subtitle`, then a line `START - END TEXT` for each, in seconds). They take
    room from the video. Alerts and questions about the newest picture alone are asked without."""
    temperature: float = 0.0
    """0: an answer takes the likeliest word each time; above, up to 10, words are drawn."""
    top_p: float = 1.0
    """Draws are from the smallest set of likeliest words with this much probability, (0, 1]."""
    seed: int = 0
    """Of the draws. Every answer begins with it anew, so the same question about the same frames
    gets the same answer, whatever other sessions do."""

    def __post_init__(self) -> None:
        require_numbers(self, MAX_WHOLE)
        object.__setattr__(self, "attention", _member(Attention, "attention", self.attention))
        object.__setattr__(self, "delivery", _member(DropPolicy, "delivery", self.delivery))
        self._require("keep_ratio", 0.0 < self.keep_ratio <= 1.0, "must be in (0, 1]")
        least = f"must be at least {LEAST_RATIO:g}"
        self._require("keep_ratio", self.keep_ratio >= LEAST_RATIO, least)
        rate = self.vision_tokens_per_s
        self._require("vision_tokens_per_s", rate >= 0.0, "must be 0 or positive")
        threshold = self.change_threshold
        self._require("change_threshold", 0.0 <= threshold < 2.0, "must be in 0..2, 2 excluded")
        self._require("policy", self.policy in POLICIES, f"must be one of {POLICIES}")
        for field in (
            *("policy_seed", "min_cells", "max_cells", "window_tokens"),
            *("duplicate_threshold", "history_turns", "seed"),
        ):
            self._require(field, 0 <= getattr(self, field) <= MAX_WHOLE, f"must be 0..{MAX_WHOLE}")
        self._require("reuse", 0.0 <= self.reuse <= 255.0, "must be in 0..255")
        for field in ("last_n", "max_answer_tokens", "reuse_refresh"):
            self._require(field, 1 <= getattr(self, field) <= MAX_WHOLE, f"must be 1..{MAX_WHOLE}")
        is_ceiling = not self.max_cells or self.max_cells >= self.min_cells
        self._require("max_cells", is_ceiling, "must be 0 or at least min_cells")
        frames = self.payback_frames
        self._require("payback_frames", 2 <= frames <= MAX_WHOLE, f"must be 2..{MAX_WHOLE}")
        self._require("fps_cap", self.fps_cap <= MOST_FPS, f"must be at most {MOST_FPS:g}")
        for field in ("fps_cap", "heartbeat_s", "max_frame_age_s"):
            self._require(field, getattr(self, field) > 0.0, "must be positive")
        for field in (
            *("fps_cap", "heartbeat_s", "max_frame_age_s", "vision_tokens_per_s"),
            *("change_threshold", "duplicate_threshold", "bank_frames", "temperature", "top_p"),
            "reuse",
        ):
            holds = getattr(self, field) == 0 or LEAST <= getattr(self, field) <= MOST
            self._require(field, holds, f"must be 0 or in {LEAST:g}..{MOST:g}")
        self._require("instructions", isinstance(self.instructions, str), "must be text")
        self._require("subtitles", isinstance(self.subtitles, str), "must be text")
        self._require("temperature", 0.0 <= self.temperature <= 10.0, "must be in 0..10")
        self._require("top_p", 0.0 < self.top_p <= 1.0, "must be in (0, 1]")
        self._require("seed", isinstance(self.seed, int), "must be a whole number")

    def _require(self, field: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ValueError(f"{field} {rule}, got {getattr(self, field)!r}")

    def changed(self, fields: Mapping[str, Any]) -> SessionSettings:
        """A copy with some fields replaced. Raises ConfigError naming the field that is wrong."""
        try:
            return dataclasses.replace(self, **fields)
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error), where="session settings") from error


def _member(kind: type[Enum], field: str, value: object) -> Enum:
    try:
        return kind(value)
    except ValueError:
        allowed = ", ".join(str(member.value) for member in kind)
        raise ValueError(f"{field} must be one of {allowed}, got {value!r}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """What the model of a bundle was made and trained for; a session stays inside.

    A bundle's `defaults` may hold `max_time_s`, and a `max_positions` below the config's if the
    model has not been trained that far.
    """

    num_cells: int
    cell_grid: int
    image_size: int
    max_positions: int
    max_prefill_tokens: int
    """Tokens of one run of the language graph."""
    max_cache_tokens: int
    """Tokens the language graph can look back at."""
    max_time_s: float | None
    """Largest time stamp of a frame; None when the checkpoint does not say."""
    trained_attention: str
    has_scorer: bool = True
    scorer: str = "learned"
    """learned, change (since a cell was last kept) or none."""
    offline_policy: str = "stream"
    """The policy for finished files: `clip` where the weights were published with it."""
    token_bytes: int = 1
    """Memory of one token of video: its keys and values, and its feature on the host."""
    frame_bytes: int = 1
    """Memory of a frame that waits for the choice of its cells (policy `clip`)."""
    reuse_bytes: int = 0
    """Memory of what a session with `reuse` keeps of its last frame; 0: the bundle has no graph for
    that."""
    snapshot_tokens: int = 0
    """Most tokens of a picture at full detail; 0: the model reads video only."""
    clip_frames: int = 0
    """Most frames of a whole clip that the model was trained on; 0: not known. `ask` shows a file
    by `clip_fps` with its last frame, or, past so many, evenly from begin to end."""
    clip_fps: float = 0.0
    """Frames per second of a whole clip that is short enough."""

    def __post_init__(self) -> None:
        require_numbers(self, MAX_WHOLE)

    @property
    def useful_side(self) -> int:
        """Pixels of a picture's longer side that are worth sending."""
        return max(SNAPSHOT_SIDE if self.snapshot_tokens else VIDEO_SIDE, 2 * self.image_size)

    @property
    def frame_tokens(self) -> int:
        """Most tokens of a frame that keeps every cell."""
        return longest_frame(self.num_cells)

    @classmethod
    def from_bundle(cls, bundle: EngineBundle) -> ModelLimits:
        """Raises BundleSchemaError."""
        vision, language = bundle.config.vision, bundle.config.language
        llm = _language_graph(bundle)
        max_time_s = bundle.defaults.get("max_time_s")
        return cls(
            num_cells=vision.num_cells,
            cell_grid=vision.cell_grid,
            image_size=vision.image_size,
            max_positions=min(
                language.max_positions,
                int(bundle.defaults.get("max_positions", language.max_positions)),
            ),
            max_prefill_tokens=llm.dims["s"].max,
            max_cache_tokens=llm.dims["p"].max,
            max_time_s=None if max_time_s is None else float(max_time_s),
            trained_attention=bundle.config.attention.value,
            has_scorer=bundle.config.has_scores,
            scorer=bundle.config.scorer_kind,
            offline_policy=CLIP if variant_of(bundle.config) == "published" else "stream",
            frame_bytes=vision.num_patches * vision.width * np.dtype(np.float32).itemsize,
            reuse_bytes=_reuse_bytes(bundle),
            token_bytes=_token_bytes(bundle),
            snapshot_tokens=_snapshot_tokens(bundle),
            clip_frames=0 if bundle.frames is None else bundle.frames.num_frames,
            clip_fps=0.0 if bundle.frames is None else bundle.frames.max_fps,
        )


def _snapshot_tokens(bundle: EngineBundle) -> int:
    images = bundle.images
    return 0 if images is None else longest_image(images, bundle.config.vision, bundle.style)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerLimits:
    """Bounds the server sets; announced in `session.created` and enforced."""

    max_message_bytes: int = 8 << 20
    """Size of one message of a client."""
    max_messages_per_s: int = 500
    """Messages of one connection, pings among them; a quarter of that may come at once. Further
    ones are left in the socket."""
    max_unacknowledged_frames: int = 4
    """Frames of a `wait` session that may be under way at once."""
    max_sessions: int = 4
    """Viewers at the same time."""
    max_queued_questions: int = 8
    """Questions of one session that wait for their answer."""
    max_question_tokens: int = 256
    """Length of one question."""
    kv_capacity_tokens: Annotated[int, About(option="kv_tokens")] = 8192
    """Largest cache of one session; the model's last position bounds it too."""
    max_session_bytes: Annotated[
        int, About(option="session_memory", metavar="MIB", unit=1 << 20)
    ] = 4 << 30
    """Memory for what one session remembers; bounds the cache too."""
    idle_session_s: float = 60.0
    """A viewer who has shown and asked nothing for so long gives its place up to one who comes when
    all are taken."""
    max_connections: int = 512
    """Connections at the same time, with a session or without; fewer where the limit of open files
    is low."""
    max_connections_per_address: int = 64
    """Of these, from one address (IPv6: network of 64 bits) that is not this machine's own."""
    resume_grace_s: float = 30.0
    """A session whose connection broke is kept this long; 0: not at all."""
    max_replay_events: int = 2000
    """Newest events kept for a client that comes back, or reads slowly."""
    max_replay_bytes: int = 8 << 20
    """Size of these events."""
    max_alerts: int = 16
    """Alerts of one session."""
    max_evidence_bytes: int = 256 << 10
    """Size of the picture in `alert.triggered`; a larger one is sent smaller."""
    max_answer_slowdown: float = 0.15
    """Time that video may take while answers are decoded, as a share of the answers' own."""
    max_request_bytes: int = 128 << 20
    """Size of one HTTP request, and of what it has fetched."""
    max_running_requests: int = 1
    """HTTP requests that are answered at once; each has a memory of its own meanwhile."""
    max_waiting_requests: int = 32
    """HTTP requests that wait for their turn; further ones get 429."""
    max_waiting_bytes: int = 256 << 20
    """Size of all HTTP requests that are being received, wait or run; beyond it 503."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in CAN_BE_NONE else 1
            if not least <= value < math.inf:
                raise ValueError(f"{field.name} must be at least {least}, got {value}")


def _language_graph(bundle: EngineBundle) -> GraphSpec:
    """Raises BundleSchemaError if it is not that of so many layers."""
    spec, num_layers = bundle.specs.get("llm"), bundle.config.language.num_layers
    wanted = {f"past_{kind}_{layer}" for kind in "kv" for layer in range(num_layers)}
    if (
        spec is None
        or wanted - {tensor.name for tensor in spec.inputs}
        or {"s", "p"} - set(spec.dims)
    ):
        raise BundleSchemaError(
            f"there is no graph llm with the caches of {num_layers} layers", where=bundle.path
        )
    return spec


def _reuse_bytes(bundle: EngineBundle) -> int:
    spec = bundle.specs.get(VIT_STEM_REUSE)
    if spec is None:
        return 0
    return sum(
        math.prod(tensor.resolve({})) * np.dtype(tensor.dtype).itemsize
        for tensor in spec.inputs
        if tensor.name.startswith(("kept_", "prev_"))
    )


def _token_bytes(bundle: EngineBundle) -> int:
    language = bundle.config.language
    keys = next(spec for spec in bundle.specs["llm"].inputs if spec.name == "past_k_0")
    row = language.num_kv_heads * language.head_dim * np.dtype(keys.dtype).itemsize
    feature = language.width * np.dtype(np.float32).itemsize
    if bundle.config.scorer is None:  # a picture may wait to be encoded
        vision = bundle.config.vision
        feature = max(feature, -(-3 * vision.image_size**2 // vision.num_cells))
    return language.num_layers * 2 * row + feature
