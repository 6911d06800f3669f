"""One measurement from begin to end. What was reached is kept, whatever ends it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_vlm.errors import EdgeVlmError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.pixels.frames import Rgb
from edge_vlm_runtime.bench.machine import System, Watch
from edge_vlm_runtime.bench.record import BenchRecord, model_record
from edge_vlm_runtime.bench.stages import AnswerBench, FrameBench
from edge_vlm_runtime.bench.workload import Workload, pictures_of
from edge_vlm_runtime.engines.names import Backend
from edge_vlm_runtime.inference.bundle_model import LoadedBundle

Say = Callable[[str], None]


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
    """How often `say` is called at least: for a bar with an end."""
    ratios, contexts = len(workload.keep_ratios), len(workload.contexts)
    frames = ratios + workload.repeat * (2 * ratios - 1)
    answers = 2 * contexts + workload.repeat * (2 * contexts - 1)
    return 1 + frames + answers


class BenchRun:
    """`run`, then `record`."""

    def __init__(self, options: BenchOptions, say: Say, system: System | None = None) -> None:
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
        not fit, and whatever ends the measurement; what was reached stands in `record`."""
        options, workload = self._options, self._options.workload
        pictures = pictures_of(workload)
        self._watch.begin()
        begin = time.perf_counter()
        self._say("loading the engines")
        with LoadedBundle.open(
            options.bundle,
            options.threads,
            options.backend,
            options.engines,
            check=self._check,
        ) as engines:
            load_s = time.perf_counter() - begin
            self._sections(engines, pictures, load_s)

    def _check(self, bundle: EngineBundle) -> None:
        options = self._options
        self.record.model = model_record(bundle, options.backend.value, options.threads)
        options.workload.require_fits(bundle)

    def _sections(self, engines: LoadedBundle, pictures: list[Rgb], load_s: float) -> None:
        sections: dict[str, Any] = self.record.sections
        sections["start"] = {"load_s": round(load_s, 3), "cold_s": None}
        workload = self._options.workload
        frame_bench = FrameBench(engines, workload, pictures)
        try:
            frame_bench.run(self._say)
        finally:
            sections["frames"] = frame_bench.to_list()
            frame_bench.close()
        answer_bench = AnswerBench(engines, workload)
        try:
            answer_bench.run(self._say)
        finally:
            sections["answers"] = answer_bench.to_list()
            answer_bench.close()

    def end(self, error: BaseException | None) -> None:
        """Closes the record; `error` is what ended the run early."""
        self.record.run = self._watch.end()
        if error is not None:
            told = str(error) if isinstance(error, EdgeVlmError) else "interrupted"
            self.record.ended_by = told


def default_threads() -> int:
    return min(4, os.cpu_count() or 1)
