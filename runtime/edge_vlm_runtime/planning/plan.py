"""What a model would need and do on a device: memory by part, and time by stage.

A forecast from shapes (`costs`) and rates: those that a maker publishes, times the shares of them
that are reached elsewhere, or those measured on this machine (`probe`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edge_vlm.config import ModelConfig
from edge_vlm.errors import ConfigError
from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm.formats.precision import WEIGHT_BYTES, Precision
from edge_vlm.memory import PROGRAM_BYTES, run_bytes
from edge_vlm.text.prompt import MARKER_TOKENS, STAMP_TOKENS
from edge_vlm_runtime.planning.costs import KERNELS, Work, language_work, stem_work, trunk_work
from edge_vlm_runtime.planning.devices import KERNEL_US, MATRIX_SHARE, READ_SHARE, Device
from edge_vlm_runtime.planning.probe import Rates

QUESTION_TOKENS, ANSWER_TOKENS = 24, 48
Seconds = Callable[[Work], float]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to run. Raises ValueError naming field and value."""

    cfg: ModelConfig
    precision: Precision
    fps: float = 2.0
    keep: float = 0.5
    window: int = 64
    """Frames that are remembered."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep {self.keep}: must lie in 0..1, 0 excluded")
        if not 0 < self.fps <= 1000:
            raise ValueError(f"fps {self.fps}: must lie in 0..1000, 0 excluded")
        if self.window < 1:
            raise ValueError(f"window {self.window}: must be 1 frame or more")
        if self.window > self.most_frames:
            raise ValueError(
                f"window {self.window}: {self.window_tokens} tokens of video, {QUESTION_TOKENS} of "
                f"a question and {ANSWER_TOKENS} of an answer are more than the model's "
                f"{self.cfg.language.max_positions} positions: {self.most_frames} frames or less"
            )

    @property
    def cells(self) -> int:
        return max(1, round(self.keep * self.cfg.vision.num_cells))

    @property
    def frame_tokens(self) -> int:
        return self.cells + MARKER_TOKENS + STAMP_TOKENS

    @property
    def most_frames(self) -> int:
        """That the model's positions take, beside a question and an answer."""
        free = self.cfg.language.max_positions - QUESTION_TOKENS - ANSWER_TOKENS
        return free // self.frame_tokens

    @property
    def window_tokens(self) -> int:
        return self.window * self.frame_tokens


def device_seconds(device: Device, precision: Precision) -> Seconds:
    """By what its maker publishes: the slower of computing and reading, and the kernels' starts."""
    compute = device.fp16_tflop_s * 1e12 * MATRIX_SHARE
    if precision.base == "float32":
        compute /= 2  # tf32: half of fp16's rate on all of these
    read = device.bandwidth_gb_s * 1e9 * READ_SHARE

    def seconds(work: Work) -> float:
        is_int8 = work.name.startswith("vit") and precision.vit == "int8"
        rate = device.int8_tflop_s * 1e12 * MATRIX_SHARE if is_int8 else compute
        # A compiler joins most of what stands between products: about half of it is left. Caches
        # are read where they are, as the split form of the decode graph does.
        size = 2 if precision.base == "float16" else 4
        between = size * work.moved / 2
        computing = work.flops / rate
        reading = (work.bytes + between) / read
        return max(computing, reading) + work.blocks * KERNELS * KERNEL_US * 1e-6

    return seconds


def works_of(wanted: Wanted) -> dict[str, Work]:
    """Every stage at its place in a stream whose window is full."""
    cfg, precision = wanted.cfg, wanted.precision
    language = cfg.language
    past = wanted.window_tokens

    def part(name: str, new: int) -> Work:
        return language_work(language, precision, new, past, name=name)

    return {
        "vit_stem": stem_work(cfg, precision),
        "vit_trunk": trunk_work(cfg, precision, wanted.cells),
        "prefill": part("prefill", wanted.frame_tokens),
        "question": part("question", QUESTION_TOKENS),
        "decode": part("decode", 1),
    }


def memory_parts(wanted: Wanted) -> dict[str, int]:
    """Bytes by part."""
    cfg, precision = wanted.cfg, wanted.precision
    language, works = cfg.language, works_of(wanted)
    vision = works["vit_stem"].weight_bytes + works["vit_trunk"].weight_bytes
    row = 2 * int(WEIGHT_BYTES[precision.cache_format]) * language.num_layers
    row *= language.num_kv_heads * language.head_dim
    rows = wanted.window_tokens + QUESTION_TOKENS + ANSWER_TOKENS
    spec = GraphSpec(name="llm", inputs=(), outputs=(), dims={})
    return {
        "vision weights": round(vision),
        "language weights": round(works["decode"].weight_bytes),
        "embeddings": round(language.vocab * language.width * WEIGHT_BYTES[precision.embed]),
        "cache": rows * row,
        "activations": run_bytes(language, spec, wanted.frame_tokens, wanted.window_tokens),
        "program": PROGRAM_BYTES,
    }


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is to be expected."""

    device: str
    memory: dict[str, int]
    usable_bytes: float
    stage_s: dict[str, float]
    fps: float
    cells: int
    frame_tokens: int
    window_tokens: int
    watts: float | None
    decode_bound_per_s: float | None
    """Tokens a second if all of the bandwidth were reached."""

    @property
    def needed_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.usable_bytes

    @property
    def frame_s(self) -> float:
        return sum(self.stage_s[name] for name in ("vit_stem", "vit_trunk", "prefill"))

    @property
    def load(self) -> float:
        """Share of the time that frames at the wanted rate take."""
        return self.frame_s * self.fps

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.stage_s["decode"]

    def to_dict(self) -> dict[str, Any]:
        joules = None if self.watts is None else round(self.watts * self.frame_s, 3)
        answer_s = self.stage_s["question"] + (ANSWER_TOKENS - 1) * self.stage_s["decode"]
        return {
            "device": self.device,
            "fits": self.fits,
            "needed_bytes": self.needed_bytes,
            "usable_bytes": round(self.usable_bytes),
            "memory_bytes": self.memory,
            "cells": self.cells,
            "frame_tokens": self.frame_tokens,
            "window_tokens": self.window_tokens,
            "stages_ms": {name: round(s * 1e3, 3) for name, s in self.stage_s.items()},
            "frame_ms": round(self.frame_s * 1e3, 3),
            "frames_per_s": round(1 / self.frame_s, 2),
            "load": round(self.load, 3),
            "ttft_ms": round(self.stage_s["question"] * 1e3, 3),
            "tokens_per_s": round(self.tokens_per_s, 2),
            "decode_bound_per_s": self.decode_bound_per_s,
            "j_per_frame_at_most": joules,
            "j_per_answer_at_most": None if self.watts is None else round(self.watts * answer_s, 2),
        }


def forecast_device(device: Device, wanted: Wanted) -> Forecast:
    works = works_of(wanted)
    bound = device.bandwidth_gb_s * 1e9 / works["decode"].bytes
    return _forecast(
        device.label,
        device.usable_gb * 1e9,
        wanted,
        device_seconds(device, wanted.precision),
        device.watts,
        bound,
    )


def forecast_this(name: str, rates: Rates, free_bytes: int | None, wanted: Wanted) -> Forecast:
    """Raises ConfigError where the system does not say how much memory is free."""
    if free_bytes is None:
        raise ConfigError("this system does not say how much memory is free")
    bound = max(rates.read_gb_s, rates.copy_gb_s) * 1e9 / works_of(wanted)["decode"].bytes
    return _forecast(name, free_bytes, wanted, rates.seconds, None, bound)


def _forecast(
    name: str, usable: float, wanted: Wanted, seconds: Seconds, watts: float | None, bound: float
) -> Forecast:
    return Forecast(
        device=name,
        memory=memory_parts(wanted),
        usable_bytes=usable,
        stage_s={stage: seconds(work) for stage, work in works_of(wanted).items()},
        fps=wanted.fps,
        cells=wanted.cells,
        frame_tokens=wanted.frame_tokens,
        window_tokens=wanted.window_tokens,
        watts=watts,
        decode_bound_per_s=round(bound, 1),
    )
