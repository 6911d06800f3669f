"""One measurement from begin to end. What was reached is kept, whatever ends it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_vlm.errors import EdgeVlmError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.pixels.frames import Rgb
from edge_vlm_runtime.bench.footprint import cold_start_s, energy_of, memory_of
from edge_vlm_runtime.bench.links import Engines
from edge_vlm_runtime.bench.machine import System, Watch
from edge_vlm_runtime.bench.meters import open_meters
from edge_vlm_runtime.bench.record import BenchRecord, model_record
from edge_vlm_runtime.bench.stages import AnswerBench, FrameBench, Step
from edge_vlm_runtime.bench.stream import StreamBench
from edge_vlm_runtime.bench.workload import Workload, pictures_of
from edge_vlm_runtime.engines.names import Backend
from edge_vlm_runtime.inference.bundle_model import LoadedBundle


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What is measured, and on what."""

    bundle: Path
    workload: Workload
    command: str
    backend: Backend = Backend.ORT
    engines: Path | None = None
    threads: int = 2


def total_steps(workload: Workload) -> int:
    """How often a run tells what it does: for a bar with an end."""
    ratios, contexts = len(workload.keep_ratios), len(workload.contexts)
    frames = ratios + workload.repeat * (2 * ratios - 1)
    answers = 2 * contexts + workload.repeat * (2 * contexts - 1)
    return frames + answers + len(workload.rates) + 4


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
            told = str(error) if isinstance(error, EdgeVlmError) else "interrupted"
            self.record.ended_by = told


class BenchRun(KeepingRun):
    """A bundle on this machine."""

    def __init__(self, options: BenchOptions, say: Step, system: System | None = None) -> None:
        self._options, self._say = options, say
        self._system = system or System()
        self._watch = Watch(self._system)
        self.record = BenchRecord(
            command=options.command,
            device=self._system.record(),
            model={},
            workload=options.workload.to_dict(),
        )

    def run(self) -> None:
        """Raises what a bundle raises that cannot be opened, ConfigError for a workload that does
        not fit, and whatever ends the measurement."""
        options, workload = self._options, self._options.workload
        pictures = pictures_of(workload)
        self._watch.begin()
        begin = time.perf_counter()
        self._say("loading the engines")
        with LoadedBundle.open(
            options.bundle, options.threads, options.backend, options.engines, check=self._check
        ) as engines:
            start = {"load_s": round(time.perf_counter() - begin, 3), "cold_s": None}
            self.record.sections["start"] = start
            self._frames_and_answers(engines, pictures)
            self._stream(engines, pictures)
            self.record.sections["memory"] = memory_of(engines, workload)
        self._say("a new process")
        folder = None if options.engines is None else str(options.engines)
        start["cold_s"] = cold_start_s(
            str(options.bundle), options.threads, options.backend, folder
        )

    def _check(self, bundle: EngineBundle) -> None:
        options = self._options
        self.record.model = model_record(bundle, options.backend.value, options.threads)
        options.workload.require_fits(bundle)

    def _frames_and_answers(self, engines: LoadedBundle, pictures: list[Rgb]) -> None:
        workload = self._options.workload
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

    def _stream(self, engines: LoadedBundle, pictures: list[Rgb]) -> None:
        with closing(Engines(engines)) as sessions:
            stream = StreamBench(sessions, self._options.workload, pictures)
            with self._section("stream", stream.to_dict):
                stream.run(self._say)
