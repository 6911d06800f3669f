"""What a process of a run will need at its peak, from shapes alone, before anything is loaded.

The sum of what is certain (weights, gradients, moments, what is kept for the backward pass) with a
margin for what allocators waste; `benchmarks/training` states it beside what was measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from edge_vlm.config import CELL, ModelConfig
from edge_vlm.errors import RecipeTooLarge
from edge_vlm.model.lora.layers import block_matrices
from edge_vlm.model.published.mapping import shapes
from edge_vlm_training.recipes.base import Clips, Recipe, Rows
from edge_vlm_training.recipes.overrides import override
from edge_vlm_training.trainer.adapters import adapted_layers
from edge_vlm_training.trainer.distributed import Ranks

GIB = 2**30
_MARGIN = 1.15
_TRAINED = 16
"""Bytes of a trained number: itself, gradient and two moments, float32 each."""
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a packed number: four bits, of 64 numbers one scale of eight bits, and of 256 scales one
of 32."""
_CUDA = 0.8e9
"""Its context and libraries, and what they keep to work in."""
_TEXT_PER_FRAME = 8
"""Stamp and markers."""
_TEXT_SHARE = 0.2
"""Of a row's tokens, those whose successor is trained on, at most; they have logits."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes of one process by what they are for."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return _MARGIN * sum(self.parts.values())

    def __str__(self) -> str:
        named = ", ".join(f"{name} {size / GIB:.1f}" for name, size in self.parts.items())
        return f"{self.total / GIB:.1f} GiB ({named}, margin {_MARGIN - 1:.0%})"


def estimate(recipe: Recipe, cfg: ModelConfig, processes: int, *, cuda: bool) -> Estimate:
    """The peak of one of `processes` processes."""
    width = 4 if recipe.precision == "float32" else 2
    held = _adapted(recipe, cfg, cuda=cuda) if recipe.lora else _whole(recipe, cfg, processes)
    activations = max(
        _activations(recipe, stage.data, kept, cfg, width, processes, cuda=cuda)
        for stage in recipe.stages
        for kept in (stage.data.keep_ratio if cfg.scorer is not None else (1.0,))
    )
    return Estimate({**held, "activations": activations})


def _whole(recipe: Recipe, cfg: ModelConfig, processes: int) -> dict[str, float]:
    """Where every weight may be trained."""
    sizes = {name: math.prod(shape) for name, shape in shapes(cfg).items()}
    count = sum(sizes.values())
    width = 4 if recipe.precision == "float32" else 2
    state = _TRAINED * count / processes  # weight, gradient, two moments: float32 each
    if processes == 1:
        computed = float(width * count if width < 4 else 0)  # copies to compute with
    else:
        groups: dict[str, int] = {}
        for name, size in sizes.items():
            words = name.split(".")
            whole = ("embed", "head")
            own = 3 if "blocks" in words else 2 if words[0] == "llm" and words[1] in whole else 0
            key = ".".join(words[:own])
            groups[key] = groups.get(key, 0) + size
        rest = groups.pop("", 0)
        # The part in use, the one gathered ahead, and one's gradients before they are reduced.
        largest = max(groups.values(), default=0)
        computed = width * (rest + 2 * largest) + (width + 4) * max(largest, rest)
    return {"weights, gradients and moments": state, "copies to compute with": computed}


def _adapted(recipe: Recipe, cfg: ModelConfig, *, cuda: bool) -> dict[str, float]:
    """Frozen weights, which have neither gradients nor moments, and what is trained beside them."""
    assert recipe.lora is not None
    sizes = shapes(cfg)
    matrices = {f"{name}.weight" for name in block_matrices(sizes)}
    width = 4 if recipe.lora.base == "float32" else 2
    packed = _NF4 if recipe.lora.base == "nf4" else width
    trained = dict.fromkeys(("scorer", "llm", "vit"), 0)
    for name, shape in sizes.items():
        if name.startswith("scorer."):
            trained["scorer"] += math.prod(shape)
    for name in adapted_layers(recipe, sizes):
        trained[name.partition(".")[0]] += recipe.lora.rank * sum(sizes[f"{name}.weight"])
    return {
        f"frozen weights in {recipe.lora.base}": sum(
            math.prod(shape) * (packed if name in matrices else width)
            for name, shape in sizes.items()
            if not name.startswith("scorer.")
        ),
        "scorer": _TRAINED * trained["scorer"],
        "adapters of llm": _TRAINED * trained["llm"],
        "adapters of vit": _TRAINED * trained["vit"],
        **({"CUDA": _CUDA} if cuda else {}),
    }


def _activations(
    recipe: Recipe,
    data: Clips | Rows,
    kept: float,
    cfg: ModelConfig,
    width: int,
    processes: int,
    *,
    cuda: bool,
) -> float:
    """Where a share `kept` of the cells is: the fewer are, the more frames a row has."""
    vision, language = cfg.vision, cfg.language
    row_tokens, row_frames = data.row_shape
    tokens = data.device_batch * row_tokens
    per_frame = kept * vision.num_cells + _TEXT_PER_FRAME
    frames = max(1.0, (1 - _TEXT_SHARE) * tokens / per_frame)
    frames = min(frames, data.device_batch * row_frames)
    # Autocast leaves the residual stream in the type of the weights.
    in_float32 = recipe.lora is None or recipe.lora.base == "float32"
    residual = 4 if recipe.precision == "bfloat16" and processes == 1 and in_float32 else width

    stem_blocks = 0 if cfg.scorer is None else cfg.scorer.prune_at + 2
    trunk_blocks = vision.num_layers - stem_blocks
    inner = vision.num_heads * vision.head_dim
    patch_block = (
        residual * 2 * vision.width
        + width * (2 * vision.width + 4 * inner + 3 * vision.mlp_width)
        + (0 if cuda else 2 * width * vision.num_heads * vision.num_patches * kept)
    )
    patches = frames * vision.num_patches
    trunk_patches = frames * kept * vision.num_cells * CELL * CELL
    queries, keys = (n * language.head_dim for n in (language.num_heads, language.num_kv_heads))
    token_block = (
        residual * 4 * language.width
        + width * (3 * language.width + 6 * queries + 4 * keys + 4 * language.mlp_width)
        + (0 if cuda else 2 * width * language.num_heads * row_tokens)
    )
    if recipe.activation_checkpointing:
        held = residual * vision.width * (patches * stem_blocks + trunk_patches * trunk_blocks)
        held += residual * language.width * tokens * language.num_layers
        held += max(patches * patch_block, tokens * token_block)
    else:
        held = patch_block * (patches * stem_blocks + trunk_patches * trunk_blocks)
        held += token_block * tokens * language.num_layers
    taps = len(vision.feature_layers) * trunk_patches * vision.width * (residual + 3 * width)
    scorer = patches * vision.width * (4 * 3 + 3 * width) if cfg.scorer is not None else 0
    connector = frames * kept * vision.num_cells * cfg.connector.mlp_width * 4 * width
    pictures = patches * vision.patch_dim * (1 + 2 * width)
    mask = data.device_batch * row_tokens**2 * (width + 4)
    logits = _TEXT_SHARE * tokens * language.base_vocab * (width + 12)
    return held + taps + scorer + connector + pictures + mask + logits


def available(ranks: Ranks) -> float | None:
    """Bytes that this process may still take; None where the system does not say."""
    if ranks.device.type == "cuda":
        return float(torch.cuda.mem_get_info(ranks.device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = [float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = float((group / "memory.current").read_text())
        free += [] if limit == "max" else [float(limit) - used]
    except OSError:
        pass  # no such group: the machine's own figure stands
    return min(free) / ranks.size if free else None


def check_fits(recipe: Recipe, cfg: ModelConfig, ranks: Ranks) -> Estimate:
    """The estimate for these processes. Raises RecipeTooLarge with numbers and what would fit."""
    cuda = ranks.device.type == "cuda"
    need = estimate(recipe, cfg, ranks.size, cuda=cuda)
    limit = recipe.memory_gib * GIB if recipe.memory_gib else available(ranks)
    if limit is not None and need.total > limit:
        raise RecipeTooLarge(
            f"the recipe needs about {need} in each process, and there are {limit / GIB:.1f} GiB",
            where=recipe.name,
            remedy=_remedy(recipe, cfg, ranks, limit, cuda=cuda),
        )
    return need


_LAST = "lower sequence_length and row_frames, or take a smaller model"


def _remedy(recipe: Recipe, cfg: ModelConfig, ranks: Ranks, limit: float, *, cuda: bool) -> str:
    """The first change that makes it fit: recompute, smaller batches, packed frozen weights or
    more processes."""
    changes: dict[str, str] = {}
    if not recipe.activation_checkpointing:
        changes["activation_checkpointing"] = "true"
        recipe = override(recipe, ["activation_checkpointing=true"])
    processes = ranks.size
    while (need := estimate(recipe, cfg, processes, cuda=cuda)).total > limit:
        rows = [stage.data for stage in recipe.stages if isinstance(stage.data, Rows)]
        if any(data.device_batch > 1 for data in rows):
            recipe = override(recipe, ["device_batch=1"])
            changes["device_batch"] = "1"
        elif recipe.lora is not None and recipe.lora.base != "nf4":
            recipe = override(recipe, ["base=nf4", "precision=bfloat16"])
            changes |= {"base": "nf4", "precision": "bfloat16"}
        elif recipe.lora is not None:
            return f"{_LAST} (in NF4 and one row at a time it needs {need.total / GIB:.1f} GiB)"
        elif processes < 1024:
            processes *= 2
        else:
            return f"no number of processes makes it fit: {_LAST}"
    settings = " ".join(f"--set {key}={value}" for key, value in changes.items())
    started = (
        f"torchrun with {processes} processes of that memory" if processes > ranks.size else ""
    )
    wanted = " and ".join(filter(None, [settings, started]))
    return f"with {wanted} it needs {need.total / GIB:.1f} GiB"
