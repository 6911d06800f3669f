"""A running server, measured from outside by its own websocket.

What a frame costs there is what the server says of it (`stage_ms`); how long it took to be in the
memory, and an answer to begin, is measured here, the way back and forth included.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import median
from typing import Any

from edge_vlm.pixels.frames import Rgb, encode_jpeg
from edge_vlm_runtime.bench.compare import require_alike
from edge_vlm_runtime.bench.links import Served
from edge_vlm_runtime.bench.machine import System, Watch
from edge_vlm_runtime.bench.record import BenchRecord
from edge_vlm_runtime.bench.run import KeepingRun
from edge_vlm_runtime.bench.samples import LEAST_SAMPLES
from edge_vlm_runtime.bench.stages import FramePoint, Step
from edge_vlm_runtime.bench.stream import Outcomes, StreamBench
from edge_vlm_runtime.bench.workload import Workload, a_b_a, cells_at, pictures_of
from edge_vlm_runtime.protocol.settings import DropPolicy

FIRST_FRAMES = 2
"""Of a session that are not counted: the first is kept whole, the next pays for it."""


@dataclass(frozen=True, kw_only=True)
class ServedOptions:
    """Which server, and what is asked of it."""

    served: Served
    workload: Workload
    command: str
    before: Mapping[str, Any] | None = None
    """As of `BenchOptions`."""


def total_steps(workload: Workload) -> int:
    """How often a run tells what it does."""
    return 1 + workload.repeat * (2 * len(workload.keep_ratios) - 1) + len(workload.rates) + 1


class ServedRun(KeepingRun):
    """As `BenchRun`, of a server."""

    def __init__(self, options: ServedOptions, say: Step, system: System | None = None) -> None:
        self._served, self._workload, self._say = options.served, options.workload, say
        self._before = options.before
        system = system or System()
        self._watch = Watch(system)
        self.record = BenchRecord(
            command=options.command,
            device=system.record(),
            model={},
            workload=options.workload.to_dict(),
            notes=[
                "the device above is the one that measured; the server may run on another",
                "memory, energy, start and the machine's bounds are the server's own: run "
                "`edge-vlm bench BUNDLE` there",
            ],
        )

    def run(self) -> None:
        """Raises ServerUnreachable and its leaves, ConfigError, RequestTimeout."""
        self._watch.begin()
        self._say("calling the server")
        created = self._served.created()
        model = created.model
        self.record.model = {
            "name": model.bundle,
            "sha256": None,
            "precision": None,
            "variant": None,
            "kv_layout": None,
            "attention": model.limits.trained_attention,
            "backend": f"server {created.server}",
            "threads": None,
            "shape": {"cells": model.limits.num_cells, "image_size": model.limits.image_size},
        }
        if self._before is not None:
            require_alike(self._before, self.record.to_dict())
        pictures = pictures_of(self._workload)
        frames = _ServedFrames(self._served, self._workload, pictures, model.limits.num_cells)
        with self._section("frames", frames.to_list):
            frames.run(self._say)
        stream = StreamBench(self._served, self._workload, pictures)
        with self._section("stream", stream.to_dict):
            stream.run(self._say)


class _ServedFrames:
    def __init__(
        self, served: Served, workload: Workload, pictures: Sequence[Rgb], num_cells: int
    ) -> None:
        self._served, self._workload = served, workload
        self._jpegs = cycle([encode_jpeg(picture) for picture in pictures])
        self.points = [
            FramePoint(keep_ratio=ratio, cells=cells_at(ratio, num_cells), tokens=0)
            for ratio in workload.keep_ratios
        ]

    def run(self, step: Step) -> None:
        for turn in range(self._workload.repeat):
            for point in a_b_a(self.points):
                step(f"turn {turn + 1}: keep {point.keep_ratio:g}")
                self._measure(point)

    def _measure(self, point: FramePoint) -> None:
        outcomes = Outcomes()
        settings = {"keep_ratio": point.keep_ratio, "drop_duplicates": False}
        link = self._served.open({**settings, "delivery": DropPolicy.WAIT}, outcomes.told)  # type: ignore[typeddict-item]
        for series in point.series.values():
            series.begin_turn()
        try:
            begin = time.monotonic()
            for sent in range(FIRST_FRAMES + self._workload.samples):
                is_late = time.monotonic() - begin > self._workload.point_s
                if sent >= FIRST_FRAMES + LEAST_SAMPLES and is_late:
                    break
                # Each by itself: those that wait are prefilled together, as no one's own cost.
                outcomes.expect(link, next(self._jpegs), time.monotonic_ns())
                outcomes.until(link, lambda: not outcomes.due_ns)
        finally:
            self._count(point, outcomes)
            link.close()

    @staticmethod
    def _count(point: FramePoint, outcomes: Outcomes) -> None:
        kept = outcomes.stages_ms[FIRST_FRAMES:]
        for _, stages in kept:
            for name, value in stages.items():
                if name in point.series:
                    point.series[name].add(value)
            point.series["frame"].add(sum(stages.values()))
        if kept:
            point.cells = round(median(cells for cells, _ in kept))

    def to_list(self) -> list[dict[str, Any]]:
        return [point.to_dict(self.points[0]) for point in self.points]
