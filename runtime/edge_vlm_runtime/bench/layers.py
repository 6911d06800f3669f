"""Where a graph's time goes, by operator: the runtime's own profile, in a run of its own."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edge_vlm.errors import ConfigError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm_runtime.bench.stages import Step
from edge_vlm_runtime.engines.cuda import Cuda
from edge_vlm_runtime.engines.names import Backend
from edge_vlm_runtime.engines.open import open_engines
from edge_vlm_runtime.engines.ort import CPU, CUDA, ProfiledOrtEngine
from edge_vlm_runtime.engines.trt import TrtEngine
from edge_vlm_runtime.engines.trt_library import load_library
from edge_vlm_runtime.planning.check import Case, bind_noise, cases_of

RUNS = 20
WARMUPS = 2
KEPT = 12
"""Operators that are shown; the others are added up."""
Timed = Iterable[tuple[str, float]]
"""Name and microseconds of each node that ran."""


def require_profile(backend: Backend) -> None:
    """Raises ConfigError for a backend that has none."""
    if backend not in (Backend.ORT, Backend.CUDA, Backend.TRT):
        raise ConfigError(
            f"backend {backend.value} gives no profile by layer", remedy="leave --layers out"
        )


def layers_of(
    bundle: EngineBundle, backend: Backend, engines: Path | None, threads: int, step: Step
) -> list[dict[str, Any]]:
    """Raises as `require_profile`, and what opens its engines raises."""
    require_profile(backend)
    cases = cases_of(bundle)
    if backend is Backend.TRT:
        return _of_tensorrt(bundle, engines, cases, step)
    found = []
    for case in cases:
        step(f"layers of {case.stage}")
        with tempfile.TemporaryDirectory(prefix="edge-vlm-profile-") as folder:
            engine = ProfiledOrtEngine(
                bundle,
                case.graph,
                threads=threads,
                provider=CUDA if backend is Backend.CUDA else CPU,
                profile_to=f"{folder}/profile",
            )
            bind_noise(engine, case.dims)
            for _ in range(WARMUPS + RUNS):
                engine.run()
            profile = Path(engine.end_profile()).read_text(encoding="utf-8")
            engine.close()
            found.append(_table(case, ort_nodes(json.loads(profile))))
    return found


def ort_nodes(events: Iterable[dict[str, Any]]) -> list[tuple[str, float]]:
    """Of the trace that ONNX Runtime writes, the nodes of all runs but the warm-ups."""
    runs = 0
    nodes: list[tuple[str, float]] = []
    for event in events:
        if event.get("name") == "model_run":
            runs += 1
            if runs <= WARMUPS:
                nodes.clear()
        elif event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time"):
            nodes.append((str(event["args"]["op_name"]), float(event["dur"])))
    return nodes


def _table(case: Case, nodes: Timed) -> dict[str, Any]:
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for name, micros in nodes:
        spent[name] += micros / RUNS / 1e3  # type: ignore[assignment]
        calls[name] += 1
    total = sum(spent.values()) or 1.0
    ops = [
        {
            "op": name,
            "calls": round(calls[name] / RUNS),
            "ms": round(ms, 4),
            "share": round(ms / total, 4),
        }
        for name, ms in spent.most_common(KEPT)
    ]
    rest = [name for name, _ in spent.most_common()[KEPT:]]
    if rest:
        ms = sum(spent[name] for name in rest)
        calls_of_rest = round(sum(calls[name] for name in rest) / RUNS)
        ops.append(
            {
                "op": f"{len(rest)} others",
                "calls": calls_of_rest,
                "ms": round(ms, 4),
                "share": round(ms / total, 4),
            }
        )
    sizes = ", ".join(f"{name} {size}" for name, size in case.dims.items())
    return {"graph": f"{case.stage} ({sizes})", "ops": ops}


def _of_tensorrt(
    bundle: EngineBundle, folder: Path | None, cases: list[Case], step: Step
) -> list[dict[str, Any]]:
    opened = open_engines(bundle, folder or bundle.path / "engines", load_library(), Cuda())
    found = []
    try:
        for case in cases:
            step(f"layers of {case.stage}")
            engine = opened.graphs[case.graph]
            assert isinstance(engine, TrtEngine)
            bind_noise(engine, case.dims)
            for _ in range(WARMUPS):
                engine.run()
            with engine.profiled() as layers:
                for _ in range(RUNS):
                    engine.run()
            found.append(_table(case, [(name, ms * 1e3) for name, ms in layers]))
    finally:
        for engine in opened.graphs.values():
            engine.close()
    return found
