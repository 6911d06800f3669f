"""What `/metrics` tells about a server: counted from the events of its sessions.

Events are counted on the event loop; the machine's gauges are sampled beside it, once a second for
all sessions. No metric has a label for a session or a viewer; cameras have names in a file.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import edge_vlm
from edge_vlm.errors import MissingExtraError
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.alerts import AlertCleared, AlertTriggered
from edge_vlm_runtime.server.access.doors import Doors
from edge_vlm_runtime.server.gauges import MachineGauges, MachineSample

try:
    from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise MissingExtraError.for_library(error.name or "prometheus_client", "serve") from error

log = logging.getLogger(__name__)

NAMESPACE = "edge_vlm"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LATENCY_BUCKETS_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 30.0),
)
SAMPLE_PERIOD_S = 1.0


@dataclass(frozen=True, kw_only=True)
class LabelledFamily:
    """One metric that others have counted; a counter if its name ends in `_total`, else a gauge."""

    name: str
    help: str
    labels: tuple[str, ...]
    samples: Mapping[tuple[str, ...], float]


class Machine(Protocol):
    def sample(self) -> MachineSample:
        """As `MachineGauges.sample`."""


class _Registry(CollectorRegistry):
    """Without the times at which each series began: the library can leave them out for the whole
    process only."""

    def collect(self) -> Iterator[Metric]:
        for metric in super().collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric


class ServerMetrics(Collector):
    """One server's figures since it started."""

    def __init__(
        self,
        *,
        bundle_name: str,
        num_sessions: Callable[[], int],
        clock_s: Callable[[], float] = time.monotonic,
        machine: Machine | None = None,
    ) -> None:
        """Reads `machine` (None: this one) once; see `follow_machine`."""
        self._bundle_name = bundle_name
        self._num_sessions = num_sessions
        self._clock_s = clock_s
        self._machine = machine or MachineGauges()
        self._sample = self._machine.sample()
        self._kv_tokens: dict[str, int] = {}
        self._answering: dict[str, dict[str, float]] = {}
        self.others: Callable[[], Iterable[LabelledFamily]] = tuple
        """What else there is to tell."""
        self._registry = _Registry()
        counter = partial(Counter, namespace=NAMESPACE, registry=self._registry)
        seconds = partial(
            Histogram, namespace=NAMESPACE, registry=self._registry, buckets=LATENCY_BUCKETS_S
        )
        self.frames_received = counter("frames_received_total", "Frames that arrived.")
        self._processed = counter("frames_processed_total", "Frames that were encoded.")
        self._dropped = counter("frames_dropped_total", "Frames that were not encoded.", ["reason"])
        self._stages = seconds(
            "frame_stage_seconds",
            "Time of each step of a frame; vit_stem includes the scorer, vit_trunk the connector.",
            ["stage"],
        )
        self._age = seconds("frame_age_seconds", "From a frame's arrival to the end of its work.")
        self._seen = counter("vision_cells_seen_total", "Cells of the encoded frames.")
        self._kept = counter("vision_cells_kept_total", "Cells that became tokens.")
        self._evictions = counter(
            "kv_evictions_total", "Frames forgotten to make room for newer ones."
        )
        self._ttft = seconds(
            "time_to_first_token_seconds", "From a question's arrival to its first text."
        )
        self._itl = seconds(
            "inter_token_latency_seconds", "Mean time between the tokens of an answer."
        )
        self._duration = seconds(
            "response_duration_seconds", "From taking up a question to the end of its answer."
        )
        self._responses = counter("responses_total", "Answers that ended.", ["status"])
        self._alerts = counter("alerts_total", "Alerts that began and ended.", ["state"])
        self._errors = counter("errors_total", "Errors told to viewers.", ["code"])
        self._requests = counter("http_requests_total", "Replies under /v1.", ["status"])
        self._keys_refused = counter(
            "keys_refused_total", "API keys that were wrong, and attempts too many.", ["outcome"]
        )
        self._connections_refused = counter(
            "connections_refused_total", "Connections refused or cut off.", ["reason"]
        )
        self._num_connections: Callable[[], int] | None = None
        self.resumes = counter("session_resumes_total", "Connections that went on with a session.")
        self._registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The gauges; none where there is nothing to read."""
        now = self._sample
        kv_tokens, sessions = sum(self._kv_tokens.values()), self._num_sessions()
        server = f"edge-vlm {edge_vlm.__version__}, {self._bundle_name}"
        yield from _gauge("kv_tokens", "Tokens in the caches.", kv_tokens)
        yield from _gauge("sessions_active", "Sessions, absent viewers' included.", sessions)
        if self._num_connections is not None:
            yield from _gauge("connections", "Connections of all kinds.", self._num_connections())
        yield from _gauge("gpu_power_watts", "Power a GPU draws.", now.gpu_watts, "gpu")
        yield from _gauge(
            "gpu_memory_used_bytes", "Memory of a GPU in use.", now.gpu_used_bytes, "gpu"
        )
        yield from _gauge("rail_power_watts", "Power of a supply rail.", now.rail_watts, "rail")
        yield from _gauge(
            "process_resident_memory_bytes", "Memory of this process.", now.resident_bytes
        )
        for family in self.others():
            yield from _labelled(family)
        yield from _gauge("info", "Version and bundle.", {server: 1.0}, "server")

    def render(self) -> bytes:
        """The whole page, in Prometheus' text format."""
        return generate_latest(self._registry)

    async def follow_machine(self, period_s: float = SAMPLE_PERIOD_S) -> None:
        """Samples the machine's gauges on a thread, again and again, until it is cancelled."""
        while True:
            try:
                self._sample = await asyncio.to_thread(self._machine.sample)
            except Exception as error:  # noqa: BLE001 - no gauge is worth a server
                if self._sample != MachineSample():
                    log.warning("the machine's gauges cannot be read: %s", error)
                self._sample = MachineSample()  # unknown rather than old
            await asyncio.sleep(period_s)

    def complete(self, event: protocol.SessionStats) -> None:
        """Adds what the machine told last, which no session knows."""
        event.memory_bytes = self._sample.resident_bytes
        event.power_watts = self._sample.total_watts

    def event(self, session_id: str, event: protocol.ServerEvent) -> None:
        """Counts what a session said."""
        if isinstance(event, protocol.FrameAccepted):
            self._frame(session_id, event)
        elif isinstance(event, protocol.ClipChosen):
            self._kept.inc(event.cells_kept)
        elif isinstance(event, protocol.FrameDropped):
            self._dropped.labels(event.reason).inc()
        elif isinstance(event, protocol.ResponseCreated):
            begun = self._answering.setdefault(session_id, {})
            begun[event.response_id] = self._clock_s()
        elif isinstance(event, protocol.ResponseDone):
            self._answer(session_id, event)
        elif isinstance(event, protocol.MemoryEvicted):
            self._evictions.inc(event.frames)
        elif isinstance(event, AlertTriggered):
            self._alerts.labels("triggered").inc()
        elif isinstance(event, AlertCleared):
            self._alerts.labels("cleared").inc()
        elif isinstance(event, protocol.Error):
            self._errors.labels(event.error.code).inc()
        elif isinstance(event, protocol.SessionStats):
            self._kv_tokens[session_id] = event.kv_tokens

    def one_shot_event(self, event: protocol.ServerEvent) -> None:
        """Counts what came of an HTTP request; its cache is gone with it."""
        self.event("http", event)
        self._kv_tokens.pop("http", None)

    def replied(self, status: int) -> None:
        """Counts an HTTP request."""
        self._requests.labels(str(status)).inc()

    def key_refused(self, outcome: str) -> None:
        """Counts a key that was wrong, or not looked at."""
        self._keys_refused.labels(outcome).inc()

    def watch_connections(self, doors: Doors) -> None:
        self._num_connections = lambda: doors.num_visitors
        doors.on_refused = lambda reason: self._connections_refused.labels(reason).inc()

    def _frame(self, session_id: str, event: protocol.FrameAccepted) -> None:
        self._processed.inc()
        self._seen.inc(event.cells_seen)
        self._kept.inc(event.cells_kept)
        self._age.observe(event.age_ms * 1e-3)
        for stage, milliseconds in event.stage_ms.items():
            self._stages.labels(stage).observe(milliseconds * 1e-3)
        self._kv_tokens[session_id] = event.kv_tokens

    def _answer(self, session_id: str, event: protocol.ResponseDone) -> None:
        self._responses.labels(event.status).inc()
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


def _gauge(
    name: str, help: str, read: float | Mapping[str, float] | None, label: str | None = None
) -> Iterator[Metric]:
    """One metric, with `label` a sample for each of its values; nothing for nothing."""
    values = read if isinstance(read, Mapping) else {} if read is None else {"": read}
    if values:
        family = GaugeMetricFamily(f"{NAMESPACE}_{name}", help, labels=[label] if label else [])
        for value, number in values.items():
            family.add_metric([value] if label else [], number)
        yield family


def _labelled(family: LabelledFamily) -> Iterator[Metric]:
    """Nothing for nothing."""
    if family.samples:
        kind = CounterMetricFamily if family.name.endswith("_total") else GaugeMetricFamily
        metric = kind(f"{NAMESPACE}_{family.name}", family.help, labels=family.labels)
        for labels, value in family.samples.items():
            metric.add_metric(labels, value)
        yield metric
