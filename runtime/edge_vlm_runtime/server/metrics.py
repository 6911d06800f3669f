"""What `/metrics` tells about a server: counted from the events of its sessions.

Everything happens on the event loop. No metric has a label for a session or a viewer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import edge_vlm
from edge_vlm.metrics import Counter, Gauge, Histogram, Metric, render
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.alerts import AlertCleared, AlertTriggered
from edge_vlm_runtime.server.gauges import open_gpus, rail_watts, resident_bytes, total_watts

PREFIX = "edge_vlm_"
Read = Callable[[], float | Mapping[str, float] | None]


class ServerMetrics:
    """One server's figures since it started."""

    def __init__(
        self,
        *,
        bundle_name: str,
        num_sessions: Callable[[], int],
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock_s = clock_s
        self._metrics: list[Metric] = []
        self._kv_tokens: dict[str, int] = {}
        self._answering: dict[str, dict[str, float]] = {}
        self.frames_received = self._counter("frames_received_total", "Frames that arrived.")
        self._processed = self._counter("frames_processed_total", "Frames that were encoded.")
        self._dropped = self._counter(
            "frames_dropped_total", "Frames that were not encoded.", "reason"
        )
        self._stages = self._histogram(
            "frame_stage_seconds",
            "Time of each step of a frame; vit_stem includes the scorer, vit_trunk the connector.",
            "stage",
        )
        self._age = self._histogram(
            "frame_age_seconds", "From a frame's arrival to the end of its work."
        )
        self._seen = self._counter("vision_cells_seen_total", "Cells of the encoded frames.")
        self._kept = self._counter("vision_cells_kept_total", "Cells that became tokens.")
        self._gauge("kv_tokens", "Tokens in the caches.", lambda: sum(self._kv_tokens.values()))
        self._evictions = self._counter(
            "kv_evictions_total", "Frames forgotten to make room for newer ones."
        )
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "From a question's arrival to its first text."
        )
        self._itl = self._histogram(
            "inter_token_latency_seconds", "Mean time between the tokens of an answer."
        )
        self._duration = self._histogram(
            "response_duration_seconds", "From taking up a question to the end of its answer."
        )
        self._responses = self._counter("responses_total", "Answers that ended.", "status")
        self._alerts = self._counter("alerts_total", "Alerts that began and ended.", "state")
        self._errors = self._counter("errors_total", "Errors told to viewers.", "code")
        self.resumes = self._counter(
            "session_resumes_total", "Connections that went on with a session."
        )
        self._gauge("sessions_active", "Sessions, absent viewers' included.", num_sessions)
        self._gpus = gpus = open_gpus()
        if gpus is not None:
            self._gauge("gpu_power_watts", "Power a GPU draws.", gpus.watts, "gpu")
            self._gauge("gpu_memory_used_bytes", "Memory of a GPU in use.", gpus.used_bytes, "gpu")
        self._gauge("rail_power_watts", "Power of a supply rail.", rail_watts, "rail")
        self._gauge("process_resident_memory_bytes", "Memory of this process.", resident_bytes)
        versions = {f"edge-vlm {edge_vlm.__version__}, {bundle_name}": 1.0}
        self._gauge("info", "Version and bundle.", lambda: versions, "server")

    def _counter(self, name: str, help: str, label: str | None = None) -> Counter:
        metric = Counter(PREFIX + name, help, label)
        self._metrics.append(metric)
        return metric

    def _histogram(self, name: str, help: str, label: str | None = None) -> Histogram:
        metric = Histogram(PREFIX + name, help, label)
        self._metrics.append(metric)
        return metric

    def _gauge(self, name: str, help: str, read: Read, label: str | None = None) -> None:
        self._metrics.append(Gauge(PREFIX + name, help, read, label))

    def render(self) -> str:
        return render(self._metrics)

    def complete(self, event: protocol.SessionStats) -> None:
        """Adds what the machine tells, which no session knows."""
        event.memory_bytes = resident_bytes()
        gpu_watts = {} if self._gpus is None else self._gpus.watts()
        event.power_watts = total_watts(rail_watts(), gpu_watts)

    def event(self, session_id: str, event: protocol.ServerEvent) -> None:
        """Counts what a session said."""
        if isinstance(event, protocol.FrameAccepted):
            self._frame(session_id, event)
        elif isinstance(event, protocol.FrameDropped):
            self._dropped.inc(label=event.reason)
        elif isinstance(event, protocol.ResponseCreated):
            begun = self._answering.setdefault(session_id, {})
            begun[event.response_id] = self._clock_s()
        elif isinstance(event, protocol.ResponseDone):
            self._answer(session_id, event)
        elif isinstance(event, protocol.MemoryEvicted):
            self._evictions.inc(event.frames)
        elif isinstance(event, AlertTriggered):
            self._alerts.inc(label="triggered")
        elif isinstance(event, AlertCleared):
            self._alerts.inc(label="cleared")
        elif isinstance(event, protocol.Error):
            self._errors.inc(label=event.error.code)
        elif isinstance(event, protocol.SessionStats):
            self._kv_tokens[session_id] = event.kv_tokens

    def _frame(self, session_id: str, event: protocol.FrameAccepted) -> None:
        self._processed.inc()
        self._seen.inc(event.cells_seen)
        self._kept.inc(event.cells_kept)
        self._age.observe(event.age_ms * 1e-3)
        for stage, milliseconds in event.stage_ms.items():
            self._stages.observe(milliseconds * 1e-3, stage)
        self._kv_tokens[session_id] = event.kv_tokens

    def _answer(self, session_id: str, event: protocol.ResponseDone) -> None:
        self._responses.inc(label=event.status)
        if event.ttft_s is not None:
            self._ttft.observe(event.ttft_s)
        if event.tokens_per_s:
            self._itl.observe(1.0 / event.tokens_per_s)
        begun_s = self._answering.get(session_id, {}).pop(event.response_id, None)
        if begun_s is not None:
            self._duration.observe(self._clock_s() - begun_s)

    def ended(self, session_id: str) -> None:
        """A session is over: its cache is free."""
        self._kv_tokens.pop(session_id, None)
        self._answering.pop(session_id, None)
