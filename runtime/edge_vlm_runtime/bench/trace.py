"""What ran when: a file for a trace viewer, and ranges for NVIDIA's profilers.

The file is in the trace event format that https://ui.perfetto.dev and chrome://tracing open.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from edge_vlm.errors import MissingExtraError
from edge_vlm.formats.graph_spec import TensorSpec
from edge_vlm_runtime.engines.base import Engine, Shape

MOST_EVENTS = 200_000
"""A trace keeps no more, and says so."""
Range = Callable[[str], "AbstractContextManager[Any]"]


def nvtx_range() -> Range:
    """Ranges of the NVIDIA Tools Extension, for Nsight Systems. Raises MissingExtraError."""
    try:
        import nvtx
    except ImportError as error:
        raise MissingExtraError.for_library("nvtx", "trace") from error
    annotate: Range = nvtx.annotate
    return annotate


class Trace:
    """Every run of every graph, and the steps of the measurement."""

    def __init__(self, mark: Range | None = None) -> None:
        """`mark`: opens a range of that name around each run of a graph."""
        self._mark = mark
        self._events: list[tuple[str, int, int]] = []
        self._steps: list[tuple[str, int]] = []
        self.left_out = 0

    def step(self, name: str) -> None:
        self._steps.append((name, time.perf_counter_ns()))

    def wrap(self, name: str, engine: Engine) -> Engine:
        """The same engine, whose runs are noted."""
        return _TracedEngine(engine, name, self)

    def run(self, name: str, work: Callable[[], None]) -> None:
        begin = time.perf_counter_ns()
        with nullcontext() if self._mark is None else self._mark(name):
            work()
        if len(self._events) < MOST_EVENTS:
            self._events.append((name, begin, time.perf_counter_ns()))
        else:
            self.left_out += 1

    def write(self, path: Path) -> None:
        """Raises OSError."""
        process = os.getpid()
        events: list[dict[str, Any]] = [
            {"name": "process_name", "ph": "M", "pid": process, "args": {"name": "edge-vlm bench"}}
        ]
        for name, begin, end in self._events:
            shared = {"pid": process, "tid": 1, "cat": "graph"}
            span = {"ts": begin / 1e3, "dur": (end - begin) / 1e3}
            events.append({"name": name, "ph": "X", **span, **shared})
        for name, at in self._steps:
            shared = {"pid": process, "tid": 0, "cat": "step", "s": "p"}
            events.append({"name": name, "ph": "i", "ts": at / 1e3, **shared})
        path.write_text(json.dumps({"traceEvents": events}), encoding="utf-8")


class _TracedEngine(Engine):
    """Hands everything on."""

    def __init__(self, engine: Engine, name: str, trace: Trace) -> None:
        super().__init__(engine.spec)
        self._engine, self._name, self._trace = engine, name, trace

    def bind(self, name: str, pointer: int, shape: Shape) -> None:
        self._engine.bind(name, pointer, shape)

    def bind_array(self, name: str, array: np.ndarray) -> None:
        self._engine.bind_array(name, array)

    def run(self) -> None:
        self._trace.run(self._name, self._engine.run)

    def _bind(self, tensor: TensorSpec, pointer: int, shape: Shape) -> None:
        self._engine.bind(tensor.name, pointer, shape)

    def _run(self) -> None:
        self._engine.run()

    def close(self) -> None:
        self._engine.close()
