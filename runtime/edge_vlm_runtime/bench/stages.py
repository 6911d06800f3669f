"""A frame and an answer, stage by stage, on the engines themselves: no queue, no socket.

Every keep ratio and every context is measured as A B A, turn after turn: the first one stands
before and behind each of the others, so that a drift of the machine shows and cancels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, pairwise
from typing import Any

import numpy as np

from edge_vlm.pixels.frames import Frame, Rgb
from edge_vlm.text.masks import CAUSAL
from edge_vlm_runtime.bench.samples import Series, ratio_of_turns, repeat_for
from edge_vlm_runtime.bench.workload import QUESTION, FixedCells, Workload, a_b_a, cells_at
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.inference.kv_arena import KVArena
from edge_vlm_runtime.inference.sampling import Sampler, Sampling

Step = Callable[[str], None]
"""Told what is measured next, once for each point in each turn."""
FRAME_STAGES = ("preprocess", "vit_stem", "select", "vit_trunk", "prefill", "frame")


@dataclass
class FramePoint:
    """One keep ratio."""

    keep_ratio: float
    cells: int
    tokens: int
    series: dict[str, Series] = field(
        default_factory=lambda: {name: Series() for name in FRAME_STAGES}
    )
    """Milliseconds of each stage; `frame` is all of them."""
    processor: Series = field(default_factory=Series)
    """Milliseconds of computing of all threads, of a frame, one value a turn."""

    def to_dict(self, baseline: FramePoint) -> dict[str, Any]:
        frame = self.series["frame"].summary()
        point: dict[str, Any] = {
            "keep_ratio": self.keep_ratio,
            "cells": self.cells,
            "tokens": self.tokens,
            "stages_ms": {name: series.summary() for name, series in self.series.items()},
            "processor_ms": self.processor.summary(),
            "frames_per_s": None if frame is None else round(1e3 / frame["p50"], 2),
        }
        if self is not baseline:
            speed_up = {
                name: ratio_of_turns(around(baseline.series[name].medians), series.medians)
                for name, series in self.series.items()
                if name in ("vit_trunk", "prefill", "frame")
            }
            speed_up["processor"] = ratio_of_turns(
                around(baseline.processor.medians), self.processor.medians
            )
            point["speed_up"] = speed_up
        return point


def around(medians: Sequence[float]) -> list[float]:
    """Of A before and behind each B: their means."""
    return [(before + behind) / 2 for before, behind in pairwise(medians)]


class FrameBench:
    """Frames at each keep ratio, prefilled behind `workload.frame_context` tokens."""

    def __init__(self, engines: LoadedBundle, workload: Workload, pictures: Sequence[Rgb]) -> None:
        self._engines, self._workload = engines, workload
        vision = engines.bundle.config.vision
        self._pictures = cycle(pictures)
        self._arena = context_arena(engines, workload, workload.frame_context)
        self._mark = self._arena.mark()
        self.points = [
            self._point(ratio, cells_at(ratio, vision.num_cells)) for ratio in workload.keep_ratios
        ]

    def _point(self, ratio: float, cells: int) -> FramePoint:
        tokens = len(self._engines.prompt.frame_ids(8.0, cells, first=False))
        return FramePoint(keep_ratio=ratio, cells=cells, tokens=tokens)

    def run(self, step: Step) -> None:
        """Everything; what was reached stands in `points` whenever it is interrupted."""
        for point in self.points:
            step(f"warm-up at keep {point.keep_ratio:g}")
            scratch = FramePoint(point.keep_ratio, point.cells, point.tokens)
            encode = self.encoder(scratch)
            repeat_for(encode, self._workload.warmups, self._workload.point_s)
        for turn in range(self._workload.repeat):
            for point in a_b_a(self.points):
                step(f"turn {turn + 1}: keep {point.keep_ratio:g}")
                self._measure(point)

    def _measure(self, point: FramePoint) -> None:
        encode = self.encoder(point)
        for series in (*point.series.values(), point.processor):
            series.begin_turn()
        begin = time.process_time()
        repeat_for(encode, self._workload.samples, self._workload.point_s)
        done = len(point.series["frame"].turns[-1])
        point.processor.add((time.process_time() - begin) * 1e3 / done)

    def encoder(self, point: FramePoint) -> Callable[[], None]:
        """One frame a call, of a stream that has begun."""
        engines, arena = self._engines, self._arena
        state, policy = engines.vision.new_state(), FixedCells(point.cells)

        def encode(is_kept: bool = True) -> None:
            rgb = next(self._pictures)
            begin = time.perf_counter()
            tokens = engines.vision.encode(Frame(rgb=rgb, pts_ns=0, seq=0), state, policy)
            ready = time.perf_counter()
            prefill_frame(engines, arena, tokens.embeds)
            end = time.perf_counter()
            arena.truncate(self._mark)
            if is_kept:
                for name, value in tokens.stage_ms.items():
                    point.series[name].add(value)
                point.series["prefill"].add((end - ready) * 1e3)
                point.series["frame"].add((end - begin) * 1e3)

        encode(is_kept=False)  # the first of a stream compares itself with nothing
        return encode

    def default_point(self) -> FramePoint:
        """A point aside, of the ratio that the bundle was made for."""
        ratio = float(self._engines.bundle.defaults.get("keep_ratio", 0.5))
        return self._point(ratio, cells_at(ratio, self._engines.bundle.config.vision.num_cells))

    def to_list(self) -> list[dict[str, Any]]:
        return [point.to_dict(self.points[0]) for point in self.points]

    def close(self) -> None:
        self._arena.close()


def prefill_frame(engines: LoadedBundle, arena: KVArena, features: np.ndarray) -> None:
    """Appends one frame of features f32 [K, width], as a session does."""
    prompt, language = engines.prompt, engines.language
    ids = prompt.frame_ids(8.0, len(features), first=False)
    blocks = np.where(prompt.vision_mask(ids), 0, CAUSAL).astype(np.int32)
    language.prefill(arena, language.embed(ids, features), blocks)


def context_arena(engines: LoadedBundle, workload: Workload, context: int) -> KVArena:
    """A memory of exactly `context` tokens of made-up video, with room for what is measured."""
    language, room = engines.language, workload.room(engines.bundle.config)
    arena = language.new_arena(context + room)
    if context:
        noise = np.random.default_rng(0).standard_normal((context, language.cfg.width))
        try:
            language.prefill(arena, (noise * 0.1).astype(np.float32))
        except BaseException:
            arena.close()
            raise
    return arena


@dataclass
class AnswerPoint:
    """One context."""

    context: int
    arena: KVArena
    ttft: Series = field(default_factory=Series)
    itl: Series = field(default_factory=Series)
    """Milliseconds of every token behind the first."""

    def to_dict(self) -> dict[str, Any]:
        itl = self.itl.summary()
        return {
            "context": self.context,
            "ttft_ms": self.ttft.summary(),
            "itl_ms": itl,
            "tokens_per_s": None if itl is None else round(1e3 / itl["p50"], 2),
        }


class AnswerBench:
    """A question and its answer behind each context.

    Time to the first token: from a question's text to the text of the first token. Every later
    token: one decode step, the choice and its text. An end token does not end these answers.
    """

    def __init__(self, engines: LoadedBundle, workload: Workload) -> None:
        self._engines, self._workload = engines, workload
        self.points: list[AnswerPoint] = []
        self.question_tokens = len(engines.prompt.question_ids(QUESTION))

    def run(self, step: Step) -> None:
        for context in self._workload.contexts:
            step(f"context of {context} tokens")
            arena = context_arena(self._engines, self._workload, context)
            self.points.append(AnswerPoint(context, arena))
        workload = self._workload
        for point in self.points:
            step(f"warm-up at context {point.context}")
            scratch = AnswerPoint(point.context, point.arena)
            most = max(1, workload.warmups // 5)
            repeat_for(partial(self._answer, scratch), most, workload.point_s)
        for turn in range(workload.repeat):
            for point in a_b_a(self.points):
                step(f"turn {turn + 1}: context {point.context}")
                point.ttft.begin_turn()
                point.itl.begin_turn()
                answer = partial(self._answer, point)
                repeat_for(answer, workload.samples, workload.point_s)

    def _answer(self, point: AnswerPoint) -> None:
        engines, arena = self._engines, point.arena
        language, prompt = engines.language, engines.prompt
        sampler, mark = Sampler(Sampling()), arena.mark()
        begin = time.perf_counter()
        logits = language.prefill(arena, language.embed(prompt.question_ids(QUESTION)))
        token = sampler.sample(logits)
        prompt.tokenizer.decode([token])
        end = time.perf_counter()
        point.ttft.add((end - begin) * 1e3)
        for _ in range(self._workload.answer_tokens - 1):
            begin = end
            token = sampler.sample(language.decode_step(arena, token))
            prompt.tokenizer.decode([token])
            end = time.perf_counter()
            point.itl.add((end - begin) * 1e3)
        arena.truncate(mark)

    def answer(self) -> int:
        """One answer aside, behind the first context; its tokens."""
        point = self.points[0]
        self._answer(AnswerPoint(point.context, point.arena))
        return self._workload.answer_tokens

    def to_list(self) -> list[dict[str, Any]]:
        return [point.to_dict() for point in self.points]

    def close(self) -> None:
        for point in self.points:
            point.arena.close()
