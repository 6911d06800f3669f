"""A session's video on its way into the memory.

Frames are taken from the slot and encoded one at a time. What is encoded joins the memory together
with what comes right behind it, several frames in one prefill: reading the weights costs more than
a few more tokens. While an answer is decoded everything waits for its end.

No I/O, no threads; the clock and the way out for events are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edge_vlm.errors import EdgeVlmError
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.frames import DropReason
from edge_vlm_runtime.session.alert_rules import AlertFrame
from edge_vlm_runtime.session.context import FRAMES_PER_PREFILL, Change, Evicted, Rebased
from edge_vlm_runtime.session.frame_queue import EncodedFrame
from edge_vlm_runtime.session.ingest import FrameRejected

if TYPE_CHECKING:
    from edge_vlm_runtime.inference.kv_arena import KVArena
    from edge_vlm_runtime.inference.vision import FrameTokens
    from edge_vlm_runtime.session.alerts import AlertMonitor
    from edge_vlm_runtime.session.context import StreamContext
    from edge_vlm_runtime.session.frame_queue import FrameQueue
    from edge_vlm_runtime.session.ingest import FrameIngest
    from edge_vlm_runtime.session.stats import SessionStatsCounter

MAX_PENDING_FRAMES = 16
"""Frames encoded while an answer is decoded; more wait in the slot, under its drop rule."""

Emit = Callable[[protocol.ServerEvent], None]


class VideoFeed:
    """The frames of one session. Owned by the engine thread."""

    def __init__(
        self,
        *,
        slot: FrameQueue,
        intake: FrameIngest,
        context: StreamContext,
        arena: KVArena,
        alerts: AlertMonitor,
        tally: SessionStatsCounter,
        emit: Emit,
        clock_ns: Callable[[], int],
    ) -> None:
        self._slot = slot
        self._intake = intake
        self._context = context
        self._arena = arena
        self._alerts = alerts
        self._tally = tally
        self._emit = emit
        self._clock_ns = clock_ns
        self._pending: list[FrameTokens] = []
        self._arrived_ns: dict[int, int] = {}

    def step(self, *, answering: bool) -> bool:
        """Works on the next frame; False when there is none, or no room for it while `answering`.

        Unless `answering`, nothing may lie behind the mark, and what is encoded joins the memory
        when no frame waits behind it, or FRAMES_PER_PREFILL are together. Alerts look at every
        frame, so with them each joins by itself. What the engines raise ends only the frames it
        belongs to.
        """
        if answering and len(self._pending) >= MAX_PENDING_FRAMES:
            return False
        waiting = self._slot.take()
        if waiting is None:
            return False
        begin_ns = self._clock_ns()
        try:
            tokens, stage_ms = self._intake.encode(waiting)
        except FrameRejected as turned:
            self._drop(waiting, turned.reason, turned.error)
            if not answering and self._is_batch():
                self.join()
            if turned.reason is DropReason.DUPLICATE:
                self._alerts.stood_still(waiting.capture_time_us)
            return True
        self._pending.append(tokens)
        self._arrived_ns[tokens.seq] = waiting.received_ns
        joins = not answering and self._is_batch()
        if joins:
            others = len(self._pending) > 1
            try:
                stage_ms["prefill"] = self._prefill()
            except EdgeVlmError as error:
                if others:  # they were accepted before
                    self._emit(protocol.error_event(error))
                self._drop(waiting, DropReason.ENGINE_ERROR, error)
                self._alerts.caught_up()
                return True
        self._accept(waiting, tokens, begin_ns, stage_ms)
        self._alerts.saw(
            AlertFrame(
                sequence=waiting.sequence,
                time_s=tokens.pts_ns * 1e-9,
                capture_time_us=waiting.capture_time_us,
                received_ns=waiting.received_ns,
                jpeg=waiting.jpeg,
            )
        )
        if joins:
            self._alerts.caught_up()
        return True

    def join(self) -> None:
        """Everything encoded joins the memory. Nothing may lie behind the mark. Frames that the
        engines fail on are lost, with an `error` event."""
        try:
            self._prefill()
        except EdgeVlmError as error:
            self._emit(protocol.error_event(error))
        self._alerts.caught_up()

    @property
    def has_pending(self) -> bool:
        """Frames were encoded that are not in the memory yet."""
        return bool(self._pending)

    def newest_frame(self) -> protocol.NewestFrame:
        """The newest frame of the memory, which must hold one."""
        newest = self._context.newest
        assert newest is not None
        arrived_ns = self._arrived_ns.get(newest.seq, self._clock_ns())
        return protocol.NewestFrame(
            frame_sequence=newest.seq,
            time_s=newest.pts_ns * 1e-9,
            age_s=(self._clock_ns() - arrived_ns) * 1e-9,
        )

    def close(self) -> None:
        """Gives every frame that waits its outcome."""
        for frame, reason in self._slot.empty():
            self._emit(dropped_event(frame, reason))

    def _is_batch(self) -> bool:
        if not self._pending:
            return False
        full = len(self._pending) >= FRAMES_PER_PREFILL
        return full or self._alerts.is_watching or len(self._slot) == 0

    def _prefill(self) -> float:
        """Milliseconds it took. When it raises, the frames are lost."""
        pending, self._pending = self._pending, []
        if not pending:
            return 0.0
        newest = pending[-1].seq
        self._arrived_ns = {newest: self._arrived_ns[newest]}
        begin_ns = self._clock_ns()
        report(self._context.add(pending), self._context, self._emit)
        return (self._clock_ns() - begin_ns) * 1e-6

    def _accept(
        self, waiting: EncodedFrame, tokens: FrameTokens, begin_ns: int, stage_ms: dict[str, float]
    ) -> None:
        self._tally.frame(tokens.scores.size, tokens.cells.size)
        self._emit(
            protocol.FrameAccepted(
                frame_sequence=waiting.sequence,
                time_s=tokens.pts_ns * 1e-9,
                cells_seen=tokens.scores.size,
                cells_kept=tokens.cells.size,
                kept_cells=tokens.cells.tolist(),
                stage_ms={name: round(value, 3) for name, value in stage_ms.items()},
                queue_ms=(begin_ns - waiting.received_ns) * 1e-6,
                age_ms=(self._clock_ns() - waiting.received_ns) * 1e-6,
                kv_tokens=self._arena.length,
                in_memory="prefill" in stage_ms,
            )
        )

    def _drop(
        self, frame: EncodedFrame, reason: DropReason, error: EdgeVlmError | None = None
    ) -> None:
        self._slot.count_dropped(reason)
        self._emit(dropped_event(frame, reason, error))


def report(changes: Sequence[Change], context: StreamContext, emit: Emit) -> None:
    """Tells what the memory forgot and whether it counts anew."""
    evictions = [change for change in changes if isinstance(change, Evicted)]
    if evictions:
        emit(
            protocol.MemoryEvicted(
                frames=sum(change.frames for change in evictions),
                tokens=sum(change.tokens for change in evictions),
                oldest_s=context.oldest_in_window_s,
            )
        )
    rebases = [change for change in changes if isinstance(change, Rebased)]
    if rebases:
        last = rebases[-1]
        emit(protocol.MemoryRebased(frames=last.frames, time_offset_s=last.time_offset_s))


def dropped_event(
    frame: EncodedFrame, reason: DropReason, error: EdgeVlmError | None = None
) -> protocol.FrameDropped:
    return protocol.FrameDropped(
        frame_sequence=frame.sequence,
        reason=reason.value,
        code=None if error is None else error.code,
        message=None if error is None else str(error),
    )
