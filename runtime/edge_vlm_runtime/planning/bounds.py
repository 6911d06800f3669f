"""The roofline beside a measurement: how near each stage is to what the machine allows, what binds
it, and what dropping cells can gain at most.

A stage cannot take less time than its products at the machine's best rate, nor than what it has to
move once at its best bandwidth: the larger of the two is its bound. End to end, a saving in one
stage gains at most 1 / (1 - share x saving), whatever is printed beside that stage.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from edge_vlm.formats.bundle import EngineBundle
from edge_vlm_runtime.engines.ort import ModelInMemory
from edge_vlm_runtime.planning.costs import Work, language_work, stem_work, trunk_work
from edge_vlm_runtime.planning.devices import Device
from edge_vlm_runtime.planning.onnx_bytes import chain
from edge_vlm_runtime.planning.probe import cache_bytes, copy_gb_s, samples_s

SIDE = 2048
ROWS = 256
MOST_READ = 16
"""Weights of SIDE x SIDE that are read: more than caches hold, but at most 268 MB."""
SAMPLES = 5
"""The best of these: a bound is what the machine does when it is let."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Best rates of a machine."""

    copy_gb_s: float
    read_gb_s: float
    matrix_gflop_s: float
    source: str

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return max(self.copy_gb_s, self.read_gb_s) * 1e9

    def of(self, work: Work) -> tuple[float, str]:
        """Seconds that it takes at least, and what binds it."""
        computing = work.flops / (self.matrix_gflop_s * 1e9)
        moving = work.bytes / self.bandwidth
        return (computing, "products") if computing > moving else (moving, "bandwidth")


def measured_bounds(threads: int) -> Bounds:
    """Of this machine's processor, by ONNX Runtime and numpy; some seconds. Raises
    MissingExtraError."""
    in_cache = math.ceil(1.25 * cache_bytes() / (4 * SIDE**2))
    values_s = {
        rows: _values_s(rows, count, threads)
        for rows, count in ((1, min(MOST_READ, max(4, in_cache))), (ROWS, 4))
    }
    return Bounds(
        copy_gb_s=copy_gb_s(time.perf_counter),
        read_gb_s=4 * values_s[1] / 1e9,
        matrix_gflop_s=2 * ROWS * values_s[ROWS] / 1e9,
        source=f"measured here, {threads} threads",
    )


def _values_s(rows: int, count: int, threads: int) -> float:
    """Weights a second of `count` products of SIDE x SIDE behind each other. ONNX Runtime keeps
    equal weights once, so that every product has its own."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((SIDE, SIDE), np.float32) / SIDE**0.5 for _ in range(count)]
    graph = ModelInMemory(chain([("MatMul", each) for each in weights], ["m", SIDE]), threads)
    x = np.full((rows, SIDE), 0.01, np.float32)
    taken = min(samples_s(partial(graph.run, {"x": x}), time.perf_counter, SAMPLES))
    graph.close()
    return count * SIDE**2 / taken


def published_bounds(device: Device) -> Bounds:
    return Bounds(
        copy_gb_s=device.bandwidth_gb_s,
        read_gb_s=device.bandwidth_gb_s,
        matrix_gflop_s=device.fp16_tflop_s * 1e3,
        source=f"published for {device.label}: {device.source}",
    )


def roofline(
    bundle: EngineBundle,
    bounds: Bounds,
    frames: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
    frame_context: int,
) -> dict[str, Any]:
    """`frames` and `answers` as a bench's record has them."""
    cfg, precision = bundle.config, bundle.precision
    language = cfg.language
    stages = []
    base = next(iter(frames), None)
    for point in frames:
        at = f"keep {point['keep_ratio']:g}"
        works = {
            "vit_stem": stem_work(cfg, precision),
            "vit_trunk": trunk_work(cfg, precision, point["cells"]),
            "prefill": language_work(language, precision, point["tokens"], frame_context),
        }
        for name, work in works.items():
            if name == "vit_stem" and point is not base:
                continue  # it is the same at every ratio
            stages.append(_row(f"{name}, {at}", work, bounds, name, point, base))
    for point in answers:
        work = language_work(language, precision, 1, point["context"], name="decode")
        itl = point["itl_ms"]
        measured = None if itl is None else itl["p50"]
        stages.append(_stage(f"decode, context {point['context']}", work, bounds, measured))
    return {
        "source": bounds.source,
        "copy_gb_s": round(bounds.copy_gb_s, 2),
        "read_gb_s": round(bounds.read_gb_s, 2),
        "matrix_gflop_s": round(bounds.matrix_gflop_s, 1),
        "stages": stages,
        "sentence": _sentence(frames, stages),
    }


def _p50(point: Mapping[str, Any] | None, name: str) -> float | None:
    summary = None if point is None else point["stages_ms"].get(name)
    return None if summary is None else float(summary["p50"])


def _row(
    label: str,
    work: Work,
    bounds: Bounds,
    name: str,
    point: Mapping[str, Any],
    base: Mapping[str, Any] | None,
) -> dict[str, Any]:
    measured = _p50(point, name)
    row = _stage(label, work, bounds, measured)
    whole, before = _p50(base, "frame"), _p50(base, name)
    if measured is None or not whole or not before:
        return row
    row["share"] = round(min(1.0, before / whole), 4)
    if point is not base:
        row["saving"] = round(1 - measured / before, 4)
        row["gain_at_most"] = round(1 / (1 - row["share"] * row["saving"]), 3)
    return row


def _stage(label: str, work: Work, bounds: Bounds, measured_ms: float | None) -> dict[str, Any]:
    seconds, by = bounds.of(work)
    return {
        "stage": label,
        "flops": work.flops,
        "bytes": round(work.bytes),
        "bound_ms": round(seconds * 1e3, 4),
        "by": by,
        "measured_ms": measured_ms,
        "reached": round(seconds * 1e3 / measured_ms, 4) if measured_ms else None,
        "share": None,
        "saving": None,
        "gain_at_most": None,
    }


def _sentence(frames: Sequence[Mapping[str, Any]], stages: Sequence[Mapping[str, Any]]) -> str:
    """What binds, and the share rule."""
    with_share = [stage for stage in stages if stage["share"] is not None]
    if not frames or not with_share:
        return "No frame was measured, so nothing can be said of what binds it."
    first = f"keep {frames[0]['keep_ratio']:g}"
    largest = max(
        (stage for stage in with_share if stage["stage"].endswith(f", {first}")),
        key=lambda stage: float(stage["share"]),
    )
    name = largest["stage"].partition(",")[0]
    text = (
        f"A frame at {first} spends {largest['share']:.0%} of its time in {name}, which "
        f"{largest['by']} bind, and reaches {largest['reached']:.0%} of that bound"
    )
    last = frames[-1]
    at = f"keep {last['keep_ratio']:g}"
    saved = sum(
        stage["share"] * stage["saving"]
        for stage in with_share
        if stage["saving"] is not None and stage["stage"].endswith(f", {at}")
    )
    speed_up = (last.get("speed_up") or {}).get("frame")
    if len(frames) > 1 and 0 < saved < 1 and speed_up is not None:
        text += (
            f"; at {at} the stages behind the drop save {saved:.0%} of a frame, so that it can be "
            f"at most {1 / (1 - saved):.2f} times faster; in turns it was "
            f"{speed_up['median']:.2f} times"
        )
    return text + "."
