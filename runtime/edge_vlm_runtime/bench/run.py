"""One measurement from begin to end. What was reached is kept, whatever ends it."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edge_vlm.errors import EdgeVlmError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.pixels.frames import Rgb
from edge_vlm_runtime.bench.compare import require_alike
from edge_vlm_runtime.bench.footprint import cold_start_s, energy_of, memory_of
from edge_vlm_runtime.bench.layers import layers_of, require_profile
from edge_vlm_runtime.bench.links import Engines
from edge_vlm_runtime.bench.machine import System, Watch
from edge_vlm_runtime.bench.meters import open_meters
from edge_vlm_runtime.bench.record import BenchRecord, model_record
from edge_vlm_runtime.bench.stages import AnswerBench, FrameBench, Step
from edge_vlm_runtime.bench.stream import StreamBench
from edge_vlm_runtime.bench.trace import Trace
from edge_vlm_runtime.bench.workload import (
    Workload,
    longest_context,
    notes_on_cells,
    pictures_of,
)
from edge_vlm_runtime.engines.names import Backend
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.planning.bounds import Bounds, measured_bounds, published_bounds, roofline
from edge_vlm_runtime.planning.devices import device_called
from edge_vlm_runtime.protocol.settings import ServerLimits
from edge_vlm_runtime.server.memory_need import require_memory
from edge_vlm_runtime.session.budget import default_settings


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured, and on what."""

    bundle: Path
    workload: Workload
    command: str
    backend: Backend = Backend.ORT
    engines: Path | None = None
    threads: int = 2
    calibration: Path | None = None
    """Of this bundle: sessions have its settings, as far as the workload does not say otherwise."""
    trace: Trace | None = None
    by_layer: bool = False
    is_any_context: bool = False
    """Contexts that do not fit are left out, and told: nobody has asked for them."""
    before: Mapping[str, Any] | None = None
    """A record that this one is to be comparable with."""


def total_steps(workload: Workload) -> int:
    """How often a run tells what it does: for a bar with an end."""
    ratios, contexts = len(workload.keep_ratios), len(workload.contexts)
    frames = ratios + workload.repeat * (2 * ratios - 1)
    answers = 2 * contexts + workload.repeat * (2 * contexts - 1)
    return frames + answers + len(workload.rates) + 5


class KeepingRun(ABC):
    """`run`, then `end`; what was reached stands in `record` at any time."""

    record: BenchRecord
    _watch: Watch

    @abstractmethod
    def run(self) -> None: ...

    @contextmanager
    def _section(self, name: str, read: Callable[[], Any]) -> Iterator[None]:
        try:
            yield
        finally:
            self.record.sections[name] = read()

    def end(self, error: BaseException | None) -> None:
        """Closes the record; `error` is what ended the run early."""
        self.record.run = self._watch.end()
        if error is not None:
            self.record.ended_by = _told(error)


def _told(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return str(error) if isinstance(error, EdgeVlmError) else f"a bug, {error!r}"


class BenchRun(KeepingRun):
    """A bundle on this machine."""

    def __init__(self, options: BenchOptions, say: Step, system: System | None = None) -> None:
        self._options, self._tell, self._workload = options, say, options.workload
        self._system = system or System()
        self._watch = Watch(self._system)
        self._gpus = self._system.gpus()
        self._gpu_most: int | None = None
        """Bytes in use by all programs on all cards."""
        self.record = BenchRecord(
            command=options.command,
            device=self._system.record(),
            model={},
            workload=options.workload.to_dict(),
        )

    def _say(self, what: str) -> None:
        self._tell(what)
        self._note_gpu()
        if self._options.trace is not None:
            self._options.trace.step(what)

    def _note_gpu(self) -> None:
        """Between the points: what is in use then has mostly been allocated before."""
        if self._gpus is not None:
            used = round(sum(self._gpus.used_bytes().values()))
            self._gpu_most = max(self._gpu_most or 0, used)

    def run(self) -> None:
        """Raises what a bundle raises that cannot be opened, ConfigError for a workload that does
        not fit, and whatever ends the measurement."""
        options = self._options
        if options.by_layer:
            require_profile(options.backend)
        pictures = pictures_of(self._workload)
        self._watch.begin()
        begin = time.perf_counter()
        self._say("loading the engines")
        traced: dict[str, Any] = {} if options.trace is None else {"wrap": options.trace.wrap}
        with LoadedBundle.open(
            options.bundle,
            options.threads,
            options.backend,
            options.engines,
            check=self._check,
            calibration=options.calibration,
            **traced,
        ) as engines:
            self.record.model["runs_on"] = engines.runs_on
            cells = engines.bundle.config.vision.num_cells
            self.record.notes += notes_on_cells(self._workload.keep_ratios, cells)
            if options.threads > (cores := os.cpu_count() or 1):
                self.record.notes.append(
                    f"{options.threads} threads on {cores} cores wait for each other"
                )
            start = {"load_s": round(time.perf_counter() - begin, 3), "cold_s": None}
            self.record.sections["start"] = start
            self._frames_and_answers(engines, pictures)
            self._stream(engines, pictures)
            memory = memory_of(engines, self._workload)
            self.record.sections["memory"] = {**memory, "gpu_most_bytes": self._gpu_most}
            self._roofline(engines.bundle)  # takes memory of its own
        if options.by_layer:
            self.record.sections["layers"] = layers_of(
                EngineBundle.open(options.bundle),
                options.backend,
                options.engines,
                options.threads,
                self._say,
            )
        self._say("a new process")
        folder = None if options.engines is None else str(options.engines)
        start["cold_s"] = cold_start_s(
            str(options.bundle), options.threads, options.backend, folder
        )

    def _check(self, bundle: EngineBundle) -> None:
        options = self._options
        self.record.model = model_record(bundle, options.backend.value, options.threads)
        limits = ServerLimits(max_sessions=1)
        require_memory(bundle, default_settings(bundle, limits), limits)
        if options.is_any_context:
            self._leave_out(longest_context(bundle, self._workload))
        self._workload.require_fits(bundle)
        if options.before is not None:
            require_alike(options.before, self.record.to_dict())

    def _leave_out(self, most: int) -> None:
        """Contexts of more than `most` tokens."""
        contexts = self._workload.contexts
        kept = tuple(context for context in contexts if context <= most)
        if kept and kept != contexts:
            self._workload = replace(self._workload, contexts=kept)
            self.record.workload = self._workload.to_dict()
            left_out = ", ".join(str(context) for context in contexts if context > most)
            self.record.notes.append(
                f"context {left_out} left out: behind more than {most} tokens no frame, question "
                "and answer fit"
            )

    def _frames_and_answers(self, engines: LoadedBundle, pictures: list[Rgb]) -> None:
        workload = self._workload
        with (
            closing(FrameBench(engines, workload, pictures)) as frames,
            closing(AnswerBench(engines, workload)) as answers,
        ):
            with self._section("frames", frames.to_list):
                frames.run(self._say)
            with self._section("answers", answers.to_list):
                answers.run(self._say)
            self._say("energy")
            with closing(open_meters()) as meters:
                self.record.sections["energy"] = energy_of(
                    meters, frames.encoder(frames.default_point()), answers.answer
                )

    def _roofline(self, bundle: EngineBundle) -> None:
        self._say("the machine's bounds")
        bounds = self._bounds()
        if bounds is not None:
            self.record.sections["roofline"] = roofline(
                bundle,
                bounds,
                self.record.sections["frames"],
                self.record.sections["answers"],
                self._workload.frame_context,
            )

    def _bounds(self) -> Bounds | None:
        """What this machine can do at most; None, and a note, where that is not known."""
        backend = self._options.backend
        if backend not in (Backend.CUDA, Backend.TRT):  # any other is on the processor
            if "bfloat16" in self.record.model["runs_on"]:
                self.record.notes.append(
                    "the roofline's rate of products is float32's: graphs in bfloat16 may pass it"
                )
            return measured_bounds(self._options.threads)
        gpus = self.record.device["gpus"]
        device = device_called(gpus[0]) if gpus else None
        if device is None:
            self.record.notes.append(f"no roofline: no figures are known of {gpus or 'this GPU'}")
            return None
        return published_bounds(device)

    def _stream(self, engines: LoadedBundle, pictures: list[Rgb]) -> None:
        with closing(Engines(engines)) as sessions:
            stream = StreamBench(sessions, self._workload, pictures)
            with self._section("stream", stream.to_dict):
                stream.run(self._say)
