"""The forecast for this machine's processor against what bundles take on it.

Rates and graphs are measured in turn, all in processor time, so that programs that run beside do
not count; a forecast is compared with the run between the two probes around it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.precision import KVLayout
from edge_vlm_runtime.engines import huge_pages
from edge_vlm_runtime.engines.base import Engine
from edge_vlm_runtime.engines.open import reads_many_bytes
from edge_vlm_runtime.engines.ort import OrtEngine
from edge_vlm_runtime.planning.costs import Work, language_work, stem_work, trunk_work
from edge_vlm_runtime.planning.probe import Rates, measure_rates, median_s

ALLOWED = 0.25


@dataclass
class Check:
    """One stage of one bundle; milliseconds of processor time."""

    bundle: str
    stage: str
    measured: list[float] = field(default_factory=list)
    forecast: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [f / m for f, m in zip(self.forecast, self.measured, strict=True)]

    @property
    def measured_ms(self) -> float:
        return statistics.median(self.measured)

    @property
    def forecast_ms(self) -> float:
        return statistics.median(self.forecast)

    @property
    def ratio(self) -> float:
        """Forecast over measured: median over the turns."""
        return statistics.median(self.ratios)

    @property
    def least(self) -> float:
        return min(self.ratios)

    @property
    def most(self) -> float:
        return max(self.ratios)

    @property
    def holds(self) -> bool:
        return abs(self.ratio - 1) <= ALLOWED

    def to_dict(self) -> dict[str, Any]:
        return {
            "bundle": self.bundle,
            "stage": self.stage,
            "measured_ms": round(self.measured_ms, 4),
            "forecast_ms": round(self.forecast_ms, 4),
            "ratio": round(self.ratio, 3),
            "least": round(self.least, 3),
            "most": round(self.most, 3),
            "holds": self.holds,
        }


@dataclass(frozen=True)
class Case:
    """One graph at one set of sizes."""

    stage: str
    graph: str
    dims: Mapping[str, int]
    work: Work


def cases_of(bundle: EngineBundle) -> list[Case]:
    """What a stream at half of the cells does: every stage, in an empty and in a filled memory."""
    cfg, precision = bundle.config, bundle.precision
    language, cells = cfg.language, max(1, cfg.vision.num_cells // 2)
    most = min(bundle.specs["llm"].dims["p"].max, language.max_positions) - cells - 8
    past = min(512, most)
    decode = "llm_decode" if "llm_decode" in bundle.specs else "llm"
    is_joined = bundle.kv_layout is KVLayout.TOKEN_MAJOR

    def language_case(stage: str, graph: str, new: int) -> Case:
        dims = {"s": new, "p": past, "n": 1}
        if not is_joined:  # one buffer with room for both
            dims["C"] = past + new
        work = language_work(language, precision, new, past, name=stage, is_joined=is_joined)
        return Case(stage, graph, dims, work)

    return [
        Case("vit_stem", "vit_stem", {"F": 1}, stem_work(cfg, precision)),
        Case(
            "vit_trunk",
            "vit_trunk",
            {"F": 1, "G": cells},
            trunk_work(cfg, precision, cells),
        ),
        language_case("prefill", "llm", cells + 6),
        language_case("decode", decode, 1),
    ]


def check_bundles(
    paths: Sequence[Path],
    *,
    threads: int,
    turns: int,
    say: Callable[[str], None] = lambda what: None,
) -> list[Check]:
    """Some twenty seconds of a processor a turn, and as long as the graphs take.

    Raises what a bundle raises that cannot be opened, and EngineError.
    """
    found: list[Check] = []
    running: list[tuple[Check, Case, Engine]] = []
    left: list[huge_pages.Area] = []  # weights that are served from small pages
    for path in paths:
        bundle = EngineBundle.open(path)
        engines: dict[str, Engine] = {}
        for case in cases_of(bundle):
            engine = engines.get(case.graph)
            if engine is None:
                engine = engines[case.graph] = OrtEngine(bundle, case.graph, threads=threads)
            check = Check(bundle.name, case.stage)
            found.append(check)
            running.append((check, case, engine))
        if reads_many_bytes(bundle):
            huge_pages.gather(leave=left)
        left += huge_pages.areas()
    say("measuring rates ...")
    before = measure_rates(threads, time.process_time)
    for turn in range(turns):
        say(f"turn {turn + 1} of {turns} ...")
        times = []
        for _, case, engine in running:
            bind_noise(engine, case.dims)
            times.append(median_s(engine.run, time.process_time, times=5))
        after = measure_rates(threads, time.process_time)
        for (check, case, _), taken in zip(running, times, strict=True):
            check.measured.append(taken * 1e3)
            check.forecast.append(_middle(before, after, case.work) * 1e3)
        before = after
    for _, _, engine in running:
        engine.close()
    return found


def _middle(before: Rates, after: Rates, work: Work) -> float:
    return (before.seconds(work) + after.seconds(work)) / 2


def bind_noise(engine: Engine, dims: Mapping[str, int]) -> None:
    """Small noise, and cells in their order."""
    rng = np.random.default_rng(0)
    caches: dict[str, np.ndarray] = {}
    for tensor in engine.spec.tensors:
        if tensor.name.startswith("present_"):  # where its past is
            engine.bind_array(tensor.name, caches[tensor.name.replace("present_", "past_")])
            continue
        shape = tensor.resolve(dims)
        if tensor.name == "cell_idx":
            value = np.arange(shape[0], dtype=tensor.dtype)
        elif tensor.dtype in ("float32", "float16") and tensor in engine.spec.inputs:
            value = (rng.standard_normal(shape, np.float32) * 0.1).astype(tensor.dtype)
        else:
            value = np.zeros(shape, tensor.dtype)
        caches[tensor.name] = value
        engine.bind_array(tensor.name, value)
