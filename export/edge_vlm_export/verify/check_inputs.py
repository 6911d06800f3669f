"""Inputs for one graph at chosen sizes, that obey the graph's rules.

Random ones, or those that real pictures bring, for graphs that were quantised: rounding weights and
activations is judged by what it does to the values a model works with. On noise, which no training
ever showed it, a model's output hangs on its smallest weights and says little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm.config import ModelConfig
from edge_vlm.formats.bundle import VIT_STEM_REUSE
from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm.formats.precision import Precision
from edge_vlm.pixels.patches import cell_table, to_pixel_values
from edge_vlm.pixels.stills import PADDING
from edge_vlm.text.masks import CAUSAL, block_bias, block_rule
from edge_vlm.text.rope import rope_table
from edge_vlm_export.graphs.graphs import graph_specs
from edge_vlm_export.verify.ort_runner import run_module, torch_module
from edge_vlm_export.verify.pipeline import Arrays, Clip, Pipeline, RunGraph

if TYPE_CHECKING:
    from edge_vlm.model.video_lm import VideoLM

REFERENCE_SIZES = {"F": 2, "G": 6, "M": 4, "I": 2, "T": 8, "s": 5, "p": 9, "n": 1, "C": 24}
"""Sizes of the reference tensors that travel in the bundle."""
LARGEST_CHECK = {"s": 1024, "p": 8192, "n": 16}
"""Torch has all scores at once, and 1024 rows of 152,000 logits are 5 GB to compare; more of either
proves no more."""


@dataclass(frozen=True, kw_only=True)
class LanguageStates:
    """What the language model was given on a clip, row by row, and what it kept of it."""

    embeds: np.ndarray
    """f32 [T, width]"""
    cache: Mapping[str, np.ndarray]
    """[T, heads, head_dim] by "k_0", "v_0", "k_1", ..."""


@dataclass(frozen=True, kw_only=True)
class RealInputs:
    """In place of random numbers, as far as they are there; repeated where more is asked for."""

    clip: Clip | None = None
    hidden: np.ndarray | None = None
    """f32 [n, N, D]: what the clip's frames become in the stem."""
    language: LanguageStates | None = None


def reference_sizes(spec: GraphSpec) -> dict[str, int]:
    return {
        name: min(max(REFERENCE_SIZES[name], limits.min), limits.max)
        for name, limits in spec.dims.items()
    }


def check_sizes(spec: GraphSpec, *, largest: bool = True) -> list[dict[str, int]]:
    """Smallest, usual and largest; for language graphs also one token after the longest past."""
    least, usual, most = (spec.sizes(which) for which in ("min", "opt", "max"))
    for name, bound in LARGEST_CHECK.items():
        if name in most:
            most[name] = max(least[name], min(most[name], bound))
    if usual == least:
        usual = {name: (least[name] + most[name]) // 2 for name in least}
    cases = [least, usual]
    if largest:
        cases.append(most)
    if "p" in spec.dims:
        cases.append({**least, "p": most["p"] if largest else usual["p"]})
    cases = [_with_room(sizes) for sizes in cases]
    return [sizes for i, sizes in enumerate(cases) if sizes not in cases[:i]]


def _with_room(sizes: Mapping[str, int]) -> dict[str, int]:
    """An in-place cache must have room for past and new tokens, and some to spare."""
    if "C" not in sizes:
        return dict(sizes)
    return {**sizes, "C": max(sizes["C"], sizes["p"] + sizes["s"] + 3)}


def sample_inputs(
    spec: GraphSpec,
    sizes: Mapping[str, int],
    cfg: ModelConfig,
    *,
    seed: int,
    real: RealInputs | None = None,
) -> Arrays:
    """Random numbers, but real indices, rotations and masks; `real` replaces them."""
    real = real or RealInputs()
    rng = np.random.default_rng(seed)
    arrays: Arrays = {}
    for tensor in spec.inputs:
        shape = tensor.resolve(sizes)
        if tensor.name == "pixels":
            arrays[tensor.name] = rng.uniform(-1, 1, shape)
            if real.clip is not None:
                frames = [to_pixel_values(picture, cfg.vision) for picture in real.clip.pictures]
                rows = np.stack(frames)
                if spec.name == VIT_STEM_REUSE:
                    rows = rows[:, cell_table(cfg.vision.cell_grid)].reshape(-1, *shape[1:])
                arrays[tensor.name] = _cycled(rows, shape[0])
        elif tensor.name in ("hidden", "prev_hidden") and real.hidden is not None:
            arrays[tensor.name] = _cycled(real.hidden, shape[0])
        elif tensor.name == "prev_resting":  # scores
            arrays[tensor.name] = rng.uniform(0, 1, shape)
        elif tensor.name == "inputs_embeds" and real.language is not None:
            arrays[tensor.name] = _cycled(real.language.embeds, shape[0], sizes["p"])
        elif tensor.name.startswith("past_") and real.language is not None:
            rows = real.language.cache[tensor.name.removeprefix("past_")]
            arrays[tensor.name] = _past(rows, sizes["p"], shape)
        elif tensor.dtype in ("float32", "float16"):
            arrays[tensor.name] = rng.standard_normal(shape, np.float32)
    names = {tensor.name for tensor in spec.inputs}
    if "is_first" in names:
        arrays["is_first"] = np.arange(sizes.get("F", 1)) % 3 == 1
    if "M" in sizes:
        arrays["cell_idx"] = np.sort(rng.permutation(cfg.vision.num_cells)[: sizes["M"]])
    elif "cell_idx" in names:
        num_cells = cfg.vision.num_cells
        cells = np.sort(rng.permutation(sizes["F"] * num_cells)[: sizes["G"]])
        arrays["cell_idx"], arrays["frame_id"] = cells, cells // num_cells
    if "windows" in names:
        shape = spec.inputs[1].resolve(sizes)
        windows = rng.integers(0, sizes["I"] * cfg.vision.num_patches, shape)
        # At the edge of a picture some places of a window are empty, but never all.
        windows[:, 1:][rng.random((shape[0], shape[1] - 1)) < 0.2] = PADDING
        arrays["windows"] = windows
    if "cos" in names:
        s, p = sizes["s"], sizes["p"]
        arrays["cos"], arrays["sin"] = (t[p:] for t in rope_table(cfg.language, p + s))
        blocks = np.where(np.arange(s) < s // 2, 0, CAUSAL)
        arrays["attn_bias"], arrays["mask_rule"] = block_bias(blocks, p), block_rule(blocks)
        arrays["last_idx"] = np.sort(rng.permutation(s)[: sizes["n"]])
    return {t.name: np.ascontiguousarray(arrays[t.name], dtype=t.dtype) for t in spec.inputs}


def _cycled(rows: np.ndarray, count: int, start: int = 0) -> np.ndarray:
    return rows[np.arange(start, start + count) % len(rows)]


def _past(rows: np.ndarray, count: int, shape: tuple[int, ...]) -> np.ndarray:
    """`count` rows, laid out as a graph with `shape` for its past wants them."""
    past = _cycled(rows, count)
    if len(shape) == 3:
        return past
    buffer = np.zeros(shape, rows.dtype)
    buffer[0, :, :count] = past.swapaxes(0, 1)
    return buffer


def real_inputs(
    model: VideoLM,
    clip: Clip,
    run: RunGraph,
    make_pipeline: Callable[[RunGraph], Pipeline],
    precision: Precision,
) -> RealInputs:
    """What torch (`run`) makes of a clip; of the language model only if its weights are rounded."""
    language = None
    if precision.llm != "base" or precision.head != "base":
        recorder = _Recorder(run)
        make_pipeline(recorder).whole(clip, num_tokens=1)
        language = recorder.states()
    return RealInputs(clip=clip, hidden=stem_states(model, clip), language=language)


def stem_states(model: VideoLM, clip: Clip) -> np.ndarray:
    """What the stem makes of a clip's frames, f32 [n, N, D]."""
    spec = graph_specs(model.cfg)["vit_stem"]
    inputs = sample_inputs(
        spec, {"F": len(clip.pictures)}, model.cfg, seed=0, real=RealInputs(clip=clip)
    )
    return run_module(torch_module("vit_stem", model), spec, inputs)["hidden"]


class _Recorder:
    """Passes runs on and keeps the language model's inputs, keys and values."""

    def __init__(self, run: RunGraph) -> None:
        self._run = run
        self._embeds: list[np.ndarray] = []
        self._cache: list[Arrays] = []

    def __call__(self, name: str, inputs: Arrays) -> Arrays:
        out = self._run(name, inputs)
        if name.startswith("llm"):
            s = len(inputs["inputs_embeds"])
            self._embeds.append(inputs["inputs_embeds"])
            rows = {}
            for key, array in out.items():
                side, _, kind = key.partition("_")
                if side == "new":
                    rows[kind] = array
                elif side == "present":
                    end = inputs["attn_bias"].shape[1]
                    rows[kind] = array[0, :, end - s : end].swapaxes(0, 1)
            self._cache.append(rows)
        return out

    def states(self) -> LanguageStates:
        kinds = self._cache[0]
        return LanguageStates(
            embeds=np.concatenate(self._embeds),
            cache={k: np.concatenate([rows[k] for rows in self._cache]) for k in kinds},
        )
