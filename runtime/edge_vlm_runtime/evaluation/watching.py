"""A bundle that looks at footage for `edge-vlm calibrate`: entry point of `edge_vlm.watchers`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from edge_vlm.errors import EngineError
from edge_vlm.formats.bundle import VIT_STEM_REUSE, EngineBundle
from edge_vlm.pixels.frames import Frame, Rgb
from edge_vlm.watching import Check, Look, Sent
from edge_vlm_runtime import protocol
from edge_vlm_runtime.engine_thread.in_process import InProcessSession
from edge_vlm_runtime.inference.bundle_model import LoadedBundle, identity_of
from edge_vlm_runtime.protocol import alerts as messages
from edge_vlm_runtime.protocol.frames import DropReason
from edge_vlm_runtime.protocol.settings import ServerLimits
from edge_vlm_runtime.protocol.typed import Settings


class BundleSession:
    """`edge_vlm.watching.WatchedSession`: a real session in this process."""

    def __init__(self, engines: LoadedBundle, settings: Mapping[str, Any]) -> None:
        self._checks: list[messages.AlertChecked] = []
        self._session = InProcessSession(
            engines,
            cast("Settings", {"delivery": "live", **settings}),
            limits=ServerLimits(max_alerts=1 << 10),
            on_event=self._note,
        )
        self._questions: dict[str, str] = {}

    def ask(self, questions: Sequence[str]) -> None:
        for question in questions:
            status = self._session.create_alert(question, report_checks=True, evidence=False)
            self._questions[status.alert_id] = question

    def _note(self, event: protocol.ServerEvent) -> None:
        if isinstance(event, messages.AlertChecked):
            self._checks.append(event)
        elif isinstance(event, protocol.Error):
            raise EngineError(event.error.message)

    def send(self, rgb: Rgb, time_s: float) -> Sent:
        self._checks.clear()
        outcome = self._session.send_frame(rgb, round(time_s * 1e6))
        if isinstance(outcome, protocol.FrameDropped):
            if outcome.reason == DropReason.DUPLICATE.value:
                return Sent()
            raise EngineError(f"a picture was dropped: {outcome.reason}", where=f"{time_s:.2f} s")
        checks = [
            Check(self._questions[check.alert_id], check.probability, check.answer_mass)
            for check in self._checks
        ]
        return Sent(outcome.cells_seen, outcome.cells_kept, outcome.kept_cells, checks)

    def close(self) -> None:
        self._session.close()


class BundleWatcher:
    """`edge_vlm.watching.Watcher` over a bundle's graphs on the CPU."""

    def __init__(self, engines: LoadedBundle) -> None:
        bundle: EngineBundle = engines.bundle
        self._engines = engines
        self.model = identity_of(bundle)
        self.config = bundle.config
        base = bundle.precision.base
        self.opened = f"bundle {bundle.name}, {base}, {engines.runs_on or 'onnxruntime'}"
        self.defaults = bundle.defaults
        self.can_reuse = VIT_STEM_REUSE in bundle.specs
        self.begin()

    def begin(self) -> None:
        self._state = self._engines.vision.new_state()

    def look(self, rgb: Rgb) -> Look:
        vision = self._engines.vision
        frame = Frame(rgb=rgb, pts_ns=0, seq=0)
        if self.config.change is None:
            return Look(vision.look(frame, self._state).scores)
        vision.look(frame, self._state)
        return Look(None, vision.scored.copy())

    @contextmanager
    def session(
        self, settings: Mapping[str, Any], questions: Sequence[str] = ()
    ) -> Iterator[BundleSession]:
        session = BundleSession(self._engines, settings)
        try:
            session.ask(questions)
            yield session
        finally:
            session.close()


@contextmanager
def open_bundle(target: str, *, threads: int, backend: str) -> Iterator[BundleWatcher]:
    """Raises BundleError and its leaves, MissingExtraError, EngineError, ConfigError."""
    from edge_vlm_runtime.evaluation.evaluators import host_backend

    with LoadedBundle.open(target, threads, host_backend(backend)) as engines:
        yield BundleWatcher(engines)
