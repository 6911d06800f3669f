"""What became of frames, and what is remembered of them."""

from __future__ import annotations

from edge_vlm_runtime.protocol.base import Part, ServerEvent


class FrameAccepted(ServerEvent, tag="frame.accepted"):
    """The frame was taken in. Each frame gets exactly one `frame.accepted` or `frame.dropped`."""

    frame_sequence: int
    time_s: float
    """Capture time since the first frame of the session."""
    cells_seen: int
    cells_kept: int
    kept_cells: list[int]
    """Row-major numbers of the kept cells in the grid of `model.limits.cell_grid`."""
    stage_ms: dict[str, float]
    queue_ms: float
    """From the arrival of the message to the start of the work."""
    age_ms: float
    """From the arrival of the message to this event."""
    kv_tokens: int
    """Length of the cache."""
    in_memory: bool
    """False when it joins the memory later, together with others: when the answer under way ends,
    or with the frames that wait behind it; in any case before the next question."""
    gathered: bool = False
    """True with policy `clip`: its cells are chosen when a question is asked, see `clip.chosen`."""
    encoded: bool = True
    """False in a `wait` session whose frames all see each other: it is encoded when a question is
    to look at it, and not at all if it is forgotten before."""
    share_recomputed: float = 1.0
    """Share of the cells that were computed in front of the scorer; below 1 with `reuse` only."""


class ChosenFrame(Part, kw_only=True):
    """What is kept of one frame of a clip."""

    frame_sequence: int
    kept_cells: list[int]
    """As in `frame.accepted`."""


class ClipChosen(ServerEvent, tag="clip.chosen"):
    """With policy `clip`: the cells of all frames so far, chosen together for the question that
    comes next. A later question about a longer clip has them chosen anew."""

    cells_seen: int
    cells_kept: int
    frames: list[ChosenFrame]
    stage_ms: dict[str, float]
    """Of all frames together."""


class FrameDropped(ServerEvent, tag="frame.dropped"):
    """The frame was not encoded."""

    frame_sequence: int
    reason: str
    """busy, rate, stale, duplicate, decode_error, engine_error or clip_full."""
    code: str | None = None
    message: str | None = None


class MemoryEvicted(ServerEvent, tag="memory.evicted"):
    """The oldest frames were forgotten to make room; the first frame of the session never is."""

    frames: int
    tokens: int
    oldest_s: float
    """Capture time of the oldest frame still remembered besides the first."""


class MemoryRebased(ServerEvent, tag="memory.rebased"):
    """Time stamps or positions reached the model's limit and were counted anew.

    The model now sees capture time minus `time_offset_s`.
    """

    frames: int
    time_offset_s: float
