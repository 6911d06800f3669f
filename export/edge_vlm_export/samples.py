"""Inputs for one graph at chosen sizes, that obey the graph's rules."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_vlm.config import ModelConfig
from edge_vlm.images import PADDING
from edge_vlm.patches import to_pixel_values
from edge_vlm.rope import rope_table
from edge_vlm.specs import GraphSpec
from edge_vlm_export.chain import MASKED, Clip
from edge_vlm_export.sessions import Arrays

REFERENCE_SIZES = {"F": 2, "G": 6, "I": 2, "T": 8, "s": 5, "p": 9, "n": 1, "C": 24}
"""Sizes of the reference tensors that travel in the bundle."""


def reference_sizes(spec: GraphSpec) -> dict[str, int]:
    return {
        name: min(max(REFERENCE_SIZES[name], limits.min), limits.max)
        for name, limits in spec.dims.items()
    }


def check_sizes(spec: GraphSpec, *, largest: bool = True) -> list[dict[str, int]]:
    """Smallest, usual and largest; for language graphs also one token behind the longest past."""
    least, usual, most = (spec.sizes(which) for which in ("min", "opt", "max"))
    if usual == least:
        usual = {name: (least[name] + most[name]) // 2 for name in least}
    cases = [least, usual]
    if largest:
        cases.append(most)
    if "p" in spec.dims:
        cases.append({**least, "p": spec.dims["p"].max if largest else usual["p"]})
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
    clip: Clip | None = None,
    hidden: np.ndarray | None = None,
) -> Arrays:
    """Random numbers, but real indices, rotations and masks.

    `clip` and `hidden` [n, N, D] (what its frames become in the stem) replace random pictures and
    states: activations that were quantised by real footage are worth comparing on real footage
    only.
    """
    rng = np.random.default_rng(seed)
    arrays: Arrays = {}
    for tensor in spec.inputs:
        shape = tensor.resolve(sizes)
        if tensor.name == "pixels":
            arrays[tensor.name] = rng.uniform(-1, 1, shape)
            if clip is not None:
                frames = [to_pixel_values(picture, cfg.vision) for picture in clip.pictures]
                arrays[tensor.name] = _cycled(np.stack(frames), shape[0])
        elif tensor.name == "hidden" and hidden is not None:
            arrays[tensor.name] = _cycled(hidden, shape[0])
        elif tensor.dtype in ("float32", "float16"):
            arrays[tensor.name] = rng.standard_normal(shape, np.float32)
    names = {tensor.name for tensor in spec.inputs}
    if "is_first" in names:
        arrays["is_first"] = np.arange(sizes["F"]) % 3 == 1
    if "cell_idx" in names:
        num_cells = cfg.vision.num_cells
        cells = np.sort(rng.permutation(sizes["F"] * num_cells)[: sizes["G"]])
        arrays["cell_idx"], arrays["frame_id"] = cells, cells // num_cells
    if "windows" in names:
        shape = spec.inputs[1].resolve(sizes)
        windows = rng.integers(0, sizes["I"] * cfg.vision.num_patches, shape)
        # At the edge of a picture some places of a window are empty, but never all.
        windows[:, 1:][rng.random((shape[0], shape[1] - 1)) < 0.2] = PADDING
        arrays["windows"] = windows
    if "attn_bias" in names:
        s, p = sizes["s"], sizes["p"]
        arrays["cos"], arrays["sin"] = (t[p:] for t in rope_table(cfg.language, p + s))
        rows, columns = np.arange(s)[:, None], np.arange(-p, s)[None, :]
        frame = (np.maximum(rows, columns) < s // 2) & (columns >= 0)
        arrays["attn_bias"] = np.where((columns <= rows) | frame, 0.0, MASKED)
        arrays["last_idx"] = np.sort(rng.permutation(s)[: sizes["n"]])
    return {t.name: np.ascontiguousarray(arrays[t.name], dtype=t.dtype) for t in spec.inputs}


def _cycled(rows: np.ndarray, count: int) -> np.ndarray:
    return rows[np.arange(count) % len(rows)]
