"""A short life of two sessions, for what `/metrics` counts of it."""

from __future__ import annotations

from collections.abc import Iterator

from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.alerts import AlertCleared, AlertTriggered
from edge_vlm_runtime.server.metrics import ServerMetrics

NEWEST = protocol.NewestFrame(frame_sequence=3, time_s=1.0, age_s=0.5)


def accepted(age_ms: float, **stage_ms: float) -> protocol.FrameAccepted:
    return protocol.FrameAccepted(
        frame_sequence=1,
        time_s=0.5,
        cells_seen=81,
        cells_kept=40,
        kept_cells=[0, 4],
        stage_ms=stage_ms,
        queue_ms=1.0,
        age_ms=age_ms,
        kv_tokens=133,
        in_memory=True,
    )


def done(response_id: str, status: str, ttft_s: float | None) -> protocol.ResponseDone:
    return protocol.ResponseDone(
        response_id=response_id,
        status=status,
        finish_reason=None,
        text="",
        usage=protocol.Usage(vision_tokens=1, text_tokens=1, output_tokens=1),
        ttft_s=ttft_s,
        tokens_per_s=None if ttft_s is None else 16.0,
        newest_frame=NEWEST,
        kv_tokens=140,
        time_offset_s=0.0,
    )


def events() -> Iterator[protocol.ServerEvent]:
    yield accepted(12.0, decode=1.0, preprocess=0.75, vit_stem=200.0)
    yield accepted(40_000.0, decode=1.0, vit_trunk=50.0)
    yield protocol.FrameDropped(frame_sequence=2, reason="rate")
    yield protocol.FrameDropped(frame_sequence=3, reason="decode_error")
    yield protocol.FrameDropped(frame_sequence=4, reason="rate")
    yield protocol.ResponseCreated(response_id="r1", text="", newest_frame=NEWEST)
    yield done("r1", "completed", 0.25)
    yield protocol.ResponseCreated(response_id="r2", text="", newest_frame=NEWEST)
    yield done("r2", "cancelled", None)
    yield protocol.MemoryEvicted(frames=3, tokens=120, oldest_s=4.0)
    yield AlertTriggered(
        alert_id="a",
        episode=1,
        question="?",
        probability=0.75,
        frame_sequence=3,
        time_s=1.0,
        age_s=0.5,
        evidence=None,
    )
    yield AlertCleared(
        alert_id="a",
        episode=1,
        question="?",
        reason="probability",
        probability=0.25,
        frame_sequence=4,
        time_s=2.0,
        lasted_s=1.0,
    )
    detail = protocol.ErrorDetail(type="error", code="E-CONFIG", message="no")
    yield protocol.Error(error=detail)


def live(metrics: ServerMetrics) -> None:
    """All of it, in two sessions of which one ends; every answer takes a second of its clock."""
    metrics.frames_received.inc()
    metrics.resumes.inc()
    for session_id in ("one", "two"):
        for event in events():
            metrics.event(session_id, event)
    metrics.ended("two")


class SecondsClock:
    """Each reading is a second after the one before."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def __call__(self) -> float:
        self._now_s += 1.0
        return self._now_s
