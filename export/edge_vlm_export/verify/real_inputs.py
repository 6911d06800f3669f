"""Inputs that real pictures bring, for graphs that were quantised.

Rounding weights and activations is judged by what it does to the values a model works with. On
noise, which no training ever showed it, a model's output hangs on its smallest weights and says
little.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm.formats.precision import Precision
from edge_vlm_export.graphs.graphs import graph_specs
from edge_vlm_export.verify.check_inputs import LanguageStates, RealInputs, sample_inputs
from edge_vlm_export.verify.ort_runner import run_torch, torch_module
from edge_vlm_export.verify.pipeline import Arrays, Chain, Clip, Run

if TYPE_CHECKING:
    from edge_vlm.model.video_lm import VideoLM


def real_inputs(
    model: VideoLM, clip: Clip, run: Run, make_chain: Callable[[Run], Chain], precision: Precision
) -> RealInputs:
    """What torch (`run`) makes of a clip; of the language model only if its weights are rounded."""
    language = None
    if precision.llm != "base" or precision.head != "base":
        recorder = _Recorder(run)
        make_chain(recorder).whole(clip, num_tokens=1)
        language = recorder.states()
    return RealInputs(clip=clip, hidden=stem_states(model, clip), language=language)


def stem_states(model: VideoLM, clip: Clip) -> np.ndarray:
    """What the stem makes of a clip's frames, f32 [n, N, D]."""
    spec = graph_specs(model.cfg)["vit_stem"]
    inputs = sample_inputs(
        spec, {"F": len(clip.pictures)}, model.cfg, seed=0, real=RealInputs(clip=clip)
    )
    return run_torch(torch_module("vit_stem", model), spec, inputs)["hidden"]


class _Recorder:
    """Passes runs on and keeps the language model's inputs, keys and values."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._embeds: list[np.ndarray] = []
        self._cache: list[Arrays] = []

    def __call__(self, name: str, inputs: Arrays) -> Arrays:
        out = self._run(name, inputs)
        if name.startswith("llm"):
            s, end = inputs["attn_bias"].shape
            self._embeds.append(inputs["inputs_embeds"])
            rows = {}
            for key, array in out.items():
                side, _, kind = key.partition("_")
                if side == "new":
                    rows[kind] = array
                elif side == "present":
                    rows[kind] = array[0, :, end - s : end].swapaxes(0, 1)
            self._cache.append(rows)
        return out

    def states(self) -> LanguageStates:
        kinds = self._cache[0]
        return LanguageStates(
            embeds=np.concatenate(self._embeds),
            cache={k: np.concatenate([rows[k] for rows in self._cache]) for k in kinds},
        )
