"""A session's video on its way into the memory.

The order is from cheap to dear: age, codec, near-duplicate check on a thumbnail, vision graphs.
What a step turns away costs nothing after it. What is encoded joins the memory together with what
comes right after it, several frames in one prefill: reading the weights costs more than a few more
tokens. While an answer is decoded, frames are encoded still and join when it ends.

No I/O, no threads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm.errors import (
    ClipTooLong,
    EdgeVlmError,
    EngineError,
    FrameDecodeError,
)
from edge_vlm.pixels.duplicates import DuplicateFilter
from edge_vlm.pixels.frames import Frame
from edge_vlm.pruning.policies import KeepAll, OverThreshold, RatedPolicy, make_policy
from edge_vlm.pruning.reuse import ReuseRule
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.frames import DropReason
from edge_vlm_runtime.protocol.settings import CLIP, Attention, DropPolicy, SessionSettings
from edge_vlm_runtime.session.alert_rules import AlertFrame
from edge_vlm_runtime.session.context import FRAMES_PER_PREFILL, Evicted, Rebased
from edge_vlm_runtime.session.frames import Decoded, DroppedFrame, EncodedFrame, Encoding

if TYPE_CHECKING:
    from edge_vlm_runtime.inference.vision import FrameTokens, VisionPipeline
    from edge_vlm_runtime.session.alerts import AlertMonitor
    from edge_vlm_runtime.session.clip import ClipGatherer
    from edge_vlm_runtime.session.context import StreamContext
    from edge_vlm_runtime.session.outbox import Outbox
    from edge_vlm_runtime.session.stats import SessionStatsCounter
    from edge_vlm_runtime.session.stream_clock import StreamClock

MAX_PENDING_FRAMES = 16
"""Frames encoded while an answer is decoded; more wait in the queue, under its drop rule."""
POLICY_FIELDS = (
    *("policy", "policy_seed", "min_cells", "max_cells", "payback_frames", "bank_frames"),
    "change_threshold",
)
BUDGET_FIELDS = ("keep_ratio", "vision_tokens_per_s")
EWMA_WEIGHT = 0.2
"""Weight of the last interval in what is expected of the next one."""


class FrameRejected(Exception):
    """The frame goes no further. `error` tells more where the reason is an error."""

    def __init__(self, reason: DropReason, error: EdgeVlmError | None = None) -> None:
        super().__init__(reason.value)
        self.reason = reason
        self.error = error


class FrameIngest:
    """The frames of one session. Owned by the engine thread."""

    def __init__(
        self,
        *,
        vision: VisionPipeline,
        clip: ClipGatherer,
        settings: SessionSettings,
        clock: StreamClock,
        context: StreamContext,
        alerts: AlertMonitor,
        stats: SessionStatsCounter,
        outbox: Outbox,
        stopwatch_ns: Callable[[], int],
    ) -> None:
        self._vision = vision
        self._settings = settings
        self._clock = clock
        self._context = context
        self._alerts = alerts
        self._stats = stats
        self._outbox = outbox
        self._stopwatch_ns = stopwatch_ns
        self._policy = _policy_of(settings, vision.num_cells)
        self._clip = clip
        self._state = vision.new_state()
        vision.set_reuse(self._state, _reuse_of(settings))
        self._interval_s = 1.0 / settings.fps_cap
        self._last_encoded_us: int | None = None
        self._duplicates = DuplicateFilter()
        self._pending: list[FrameTokens] = []
        self._choosing_ms = 0.0
        self.newest_picture: EncodedFrame | None = None
        """The last one that could be decoded, near-duplicates included, to be looked at again in
        full detail."""

    def configure(self, settings: SessionSettings) -> None:
        """Other rules for the frames to come. Another policy begins with a whole frame, another
        budget does not."""
        old, self._settings = self._settings, settings
        self._clip.configure(settings)
        self._vision.set_reuse(self._state, _reuse_of(settings))
        if isinstance(self._policy, OverThreshold) and settings.change_threshold:
            self._policy.threshold = settings.change_threshold
            self._policy.min_cells = settings.min_cells
        elif _differ(old, settings, POLICY_FIELDS):
            self._policy = _policy_of(settings, self._vision.num_cells)
        elif _differ(old, settings, BUDGET_FIELDS):
            share = settings.keep_ratio * self._vision.num_cells
            self._policy.set_rate(share, share)  # a budget by time sets it anew each frame

    @property
    def has_pending(self) -> bool:
        """Frames were encoded that are not in the memory yet."""
        return bool(self._pending) or self._clip.is_open

    @property
    def has_begun(self) -> bool:
        """A frame was encoded."""
        return self._last_encoded_us is not None

    @property
    def is_full(self) -> bool:
        """As many frames wait for the end of an answer as may."""
        return len(self._pending) >= MAX_PENDING_FRAMES

    def receive(
        self, frame: EncodedFrame, now_ns: int, *, answering: bool, frames_waiting: int
    ) -> None:
        """Works on the next frame. What the engines raise ends only the frames it belongs to.

        Unless `answering`, what is encoded joins the memory when no frame waits after it, or
        FRAMES_PER_PREFILL are together. Alerts look at every frame, so with them each joins by
        itself.
        """
        try:
            if self._gathers:
                self._gather(frame, now_ns)
                return
            tokens, stage_ms = self._encode(frame, now_ns)
        except FrameRejected as rejected:
            self._drop(frame, rejected.reason, rejected.error)
            if not answering and self._is_batch(frames_waiting):
                self.join()
            if rejected.reason is DropReason.DUPLICATE:
                self._alerts.on_duplicate(frame.capture_us)
            return
        self._pending.append(tokens)
        joins = not answering and self._is_batch(frames_waiting)
        if joins:
            others = len(self._pending) > 1
            try:
                stage_ms["prefill"] = self._prefill()
            except EdgeVlmError as error:
                if others:  # they were accepted before
                    self._outbox.add_error(error)
                self._drop(frame, DropReason.ENGINE_ERROR, error)
                self._alerts.caught_up()
                return
        self._accept(
            *(frame, tokens.pts_ns, tokens.scores.size, tokens.cells, now_ns, stage_ms),
            encoded=tokens.picture is None,
            share_recomputed=tokens.share_computed,
        )
        self._alerts.on_frame(
            AlertFrame(
                seq=frame.seq,
                time_s=tokens.pts_ns * 1e-9,
                capture_us=frame.capture_us,
                received_ns=frame.received_ns,
                data=frame.data,
                evidence=frame.ahead.evidence if isinstance(frame.ahead, Decoded) else None,
            )
        )
        if joins:
            self._alerts.caught_up()

    def choose(self) -> bool:
        """Works on the clip that was gathered, if any; False when it is in the memory. Raises
        ClipTooLong, and what the engines raise; then everything is as before."""
        if not self._clip.is_open:
            return False
        begin_ns = self._stopwatch_ns()
        is_last = self._clip.encode_next()
        self._choosing_ms += (self._stopwatch_ns() - begin_ns) * 1e-6
        if not is_last:
            return True
        begin_ns = self._stopwatch_ns()
        tokens = self._clip.take()
        try:
            self._context.replace(tokens)
        except BaseException:
            self._clip.reopen()
            raise
        finally:
            self.report_changes()
        prefill_ms = (self._stopwatch_ns() - begin_ns) * 1e-6
        choosing_ms, self._choosing_ms = self._choosing_ms, 0.0
        seen = sum(frame.scores.size for frame in tokens)
        kept = sum(frame.cells.size for frame in tokens)
        self._stats.chosen(kept)
        self._outbox.add(
            protocol.ClipChosen(
                cells_seen=seen,
                cells_kept=kept,
                frames=[
                    protocol.ChosenFrame(frame_sequence=each.seq, kept_cells=each.cells.tolist())
                    for each in tokens
                ],
                stage_ms={
                    "vit_trunk": round(choosing_ms, 3),
                    "prefill": round(prefill_ms, 3),
                },
            )
        )
        return False

    def stop_choosing(self) -> None:
        """The question is gone that a clip's cells were being chosen for: the next one's clip may
        be longer."""
        if self._clip.is_choosing:
            self._clip.reopen()

    def join(self) -> None:
        """Everything encoded joins the memory. Frames that the engines fail on are lost, with an
        `error` event."""
        try:
            self._prefill()
        except EdgeVlmError as error:
            self._outbox.add_error(error)
        self._alerts.caught_up()

    def report_changes(self) -> None:
        """Tells what the memory forgot and whether it counts anew."""
        changes = self._context.changes()
        if changes and self._context.newest is None:
            self._begin_anew()
        evictions = [change for change in changes if isinstance(change, Evicted)]
        if evictions:
            self._outbox.add(
                protocol.MemoryEvicted(
                    frames=sum(change.frames for change in evictions),
                    tokens=sum(change.tokens for change in evictions),
                    oldest_s=self._context.oldest_in_window_s,
                )
            )
        rebases = [change for change in changes if isinstance(change, Rebased)]
        if rebases:
            last = rebases[-1]
            self._outbox.add(
                protocol.MemoryRebased(frames=last.frames, time_offset_s=last.time_offset_s)
            )

    # ---- encoding ----------------------------------------------------------------------------

    @property
    def _gathers(self) -> bool:
        return self._settings.policy == CLIP

    def _gather(self, frame: EncodedFrame, now_ns: int) -> None:
        """Scores a frame and keeps it for `choose`. Raises FrameRejected."""
        begin_ns = self._stopwatch_ns()
        try:
            rgb = self._decode(frame)
        except FrameDecodeError as error:
            raise FrameRejected(DropReason.DECODE_ERROR, error) from error
        decode_ms = (self._stopwatch_ns() - begin_ns) * 1e-6
        pts_ns = self._clock.pts_ns(frame.capture_us)
        self.newest_picture = frame.as_it_came()
        try:
            self._clip.require_room(pts_ns)
        except ClipTooLong as error:
            raise FrameRejected(DropReason.CLIP_FULL, error) from error
        try:
            stem = self._vision.look(Frame(rgb=rgb, pts_ns=pts_ns, seq=frame.seq), self._state)
        except EngineError as error:
            raise FrameRejected(DropReason.ENGINE_ERROR, error) from error
        self._last_encoded_us = frame.capture_us
        self._clip.add(dataclasses.replace(stem, received_ns=frame.received_ns))
        stage_ms = {"decode": decode_ms, **stem.stage_ms}
        nothing = np.empty(0, np.int32)
        self._accept(
            *(frame, stem.pts_ns, stem.scores.size, nothing, now_ns, stage_ms),
            share_recomputed=stem.share_computed,
        )

    def _encode(self, frame: EncodedFrame, now_ns: int) -> tuple[FrameTokens, dict[str, float]]:
        """Features and milliseconds by stage. Raises FrameRejected."""
        settings = self._settings
        live = settings.delivery is DropPolicy.LIVE and frame.encoding is not Encoding.STILL
        if live and now_ns - frame.received_ns > settings.max_frame_age_s * 1e9:
            raise FrameRejected(DropReason.STALE)
        begin_ns = self._stopwatch_ns()
        try:
            rgb = self._decode(frame)
        except FrameDecodeError as error:
            raise FrameRejected(DropReason.DECODE_ERROR, error) from error
        decode_ms = (self._stopwatch_ns() - begin_ns) * 1e-6
        pts_ns = self._clock.pts_ns(frame.capture_us)
        self.newest_picture = frame.as_it_came()
        small: np.ndarray | None = None
        if live and settings.drop_duplicates:
            small = frame.small(rgb)
            if self._duplicates.is_duplicate(
                small, frame.capture_us, settings.duplicate_threshold, settings.heartbeat_s
            ):
                raise FrameRejected(DropReason.DUPLICATE)
        self._fund(frame.capture_us)
        shown = Frame(rgb=rgb, pts_ns=pts_ns, seq=frame.seq)
        try:
            if self._postpones:
                tokens = self._vision.postpone(shown)
            else:
                tokens = self._vision.encode(shown, self._state, self._policy)
        except EngineError as error:
            raise FrameRejected(DropReason.ENGINE_ERROR, error) from error
        self._last_encoded_us = frame.capture_us
        if small is not None:
            self._duplicates.on_encoded(small, frame.capture_us)
        tokens = dataclasses.replace(tokens, received_ns=frame.received_ns)
        return tokens, {"decode": decode_ms, **tokens.stage_ms}

    @property
    def _postpones(self) -> bool:
        """Files come faster than they are asked about, and a question about frames that all see
        each other looks at the last ones only: the others need never be encoded."""
        settings = self._settings
        return (
            settings.delivery is DropPolicy.WAIT
            and settings.attention is not Attention.FRAME
            and settings.policy == "keep_all"
            and self._vision.is_memoryless
            and not self._alerts.is_watching
        )

    def look(self, *, shown: bool = True) -> bool:
        """Encodes the next frame that was postponed and is needed now, see
        `StreamContext.postponed`; False when there is none. One that the engines fail on is lost,
        with an `error` event."""
        waiting = self._context.postponed(shown=shown)
        if not waiting:
            return False
        try:
            encoded = self._vision.encode_postponed(waiting[0])
        except EngineError as error:
            self._outbox.add_error(error)
            self._context.lose(waiting[0])
            self.report_changes()
        else:
            self._context.encoded(waiting[0], encoded)
        return True

    def _decode(self, frame: EncodedFrame) -> np.ndarray:
        if frame.encoding is Encoding.RAW and not self._settings.raw_frames:
            raise FrameDecodeError(
                "the picture is not a JPEG", remedy="set raw_frames before sending raw pictures"
            )
        return frame.decode()

    def _fund(self, capture_us: int) -> None:
        """A budget by time grows with the time since the last frame, whatever came between."""
        per_s = self._settings.vision_tokens_per_s
        if per_s == 0.0:
            return
        since_s = self._interval_s
        if self._last_encoded_us is not None:
            since_s = (capture_us - self._last_encoded_us) * 1e-6
            self._interval_s += EWMA_WEIGHT * (since_s - self._interval_s)
        self._policy.set_rate(per_s * since_s, per_s * self._interval_s)

    # ---- joining -----------------------------------------------------------------------------

    def _is_batch(self, frames_waiting: int) -> bool:
        if not self._pending:
            return False
        full = len(self._pending) >= FRAMES_PER_PREFILL
        return full or self._alerts.is_watching or frames_waiting == 0

    def _prefill(self) -> float:
        """Milliseconds it took. When it raises, the frames are lost."""
        pending, self._pending = self._pending, []
        if not pending:
            return 0.0
        begin_ns = self._stopwatch_ns()
        try:
            if self._context.attention is Attention.FRAME:  # since they were postponed
                pending = [
                    each if each.picture is None else self._vision.encode_postponed(each)
                    for each in pending
                ]
            self._context.add(pending)
        except BaseException:
            self._begin_anew()
            raise
        finally:
            self.report_changes()
        return (self._stopwatch_ns() - begin_ns) * 1e-6

    def _begin_anew(self) -> None:
        """Pictures that were encoded are not remembered: the next one is no duplicate of them, and
        its cells are new, too."""
        self._duplicates.reset()
        self._policy.reset()
        self._state.last_kept.forget()
        self._state.forget_kept()

    # ---- outcomes ----------------------------------------------------------------------------

    def _accept(
        self,
        frame: EncodedFrame,
        pts_ns: int,
        cells_seen: int,
        cells: np.ndarray,
        now_ns: int,
        stage_ms: dict[str, float],
        *,
        encoded: bool = True,
        share_recomputed: float,
    ) -> None:
        self._stats.accepted(cells_seen, cells.size)
        accepted = protocol.FrameAccepted(
            frame_sequence=frame.seq,
            time_s=pts_ns * 1e-9,
            cells_seen=cells_seen,
            cells_kept=cells.size,
            kept_cells=cells.tolist(),
            stage_ms={name: round(value, 3) for name, value in stage_ms.items()},
            queue_ms=(now_ns - frame.received_ns) * 1e-6,
            age_ms=0.0,
            kv_tokens=self._context.kv_tokens,
            in_memory="prefill" in stage_ms,
            gathered=self._gathers,
            encoded=encoded,
            share_recomputed=round(share_recomputed, 4),
        )
        self._outbox.add_aged(accepted, frame.received_ns)

    def _drop(
        self, frame: EncodedFrame, reason: DropReason, error: EdgeVlmError | None = None
    ) -> None:
        self._stats.dropped(reason)
        self._outbox.add(DroppedFrame.of(frame, reason, error).event())


def _differ(old: SessionSettings, new: SessionSettings, fields: tuple[str, ...]) -> bool:
    return any(getattr(old, field) != getattr(new, field) for field in fields)


def _reuse_of(settings: SessionSettings) -> ReuseRule | None:
    if settings.reuse == 0.0:
        return None
    return ReuseRule(threshold=settings.reuse, refresh_frames=settings.reuse_refresh)


def _policy_of(settings: SessionSettings, num_cells: int) -> RatedPolicy:
    keep_ratio = settings.keep_ratio
    if settings.change_threshold > 0.0:
        return OverThreshold(settings.change_threshold, settings.min_cells)
    if settings.policy == CLIP:
        return KeepAll()  # not asked: the clip's cells are chosen together
    if settings.vision_tokens_per_s > 0.0:  # how long the first frame's excess is paid back
        keep_ratio = min(1.0, settings.vision_tokens_per_s / (settings.fps_cap * num_cells))
    return make_policy(
        settings.policy,
        keep_ratio,
        min_cells=settings.min_cells,
        max_cells=settings.max_cells,
        payback_frames=settings.payback_frames,
        bank_frames=settings.bank_frames,
        seed=settings.policy_seed,
    )
