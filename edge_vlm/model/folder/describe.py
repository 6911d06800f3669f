"""What a folder of weights holds, from its config and its files' headers: no weight is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from edge_vlm.config import LanguageConfig, ModelConfig, VisionAttention
from edge_vlm.formats.precision import PRESETS, weights_bytes
from edge_vlm.formats.report import Report, gigabytes
from edge_vlm.formats.usage import Usage
from edge_vlm.model.published.files import StoredTensor
from edge_vlm.model.published.folder import ModelFolder, open_folder
from edge_vlm.model.published.mapping import shapes

Shapes = Mapping[str, tuple[int, ...]]

# The first that begins a weight's name is the part it belongs to.
PARTS = {
    "vit.": "vision transformer",
    "scorer.": "scorer",
    "connector.": "connector",
    "llm.embed.": "token embeddings",
    "llm.head.": "language head",
    "llm.": "language blocks",
}


def describe_weights(folder: Path, tokenizer: Path | None = None) -> Report:
    """A folder of weights (`open_folder`, which says what is raised)."""
    found = open_folder(folder, tokenizer)
    if tokenizer is not None:
        found.require_tokenizer()
    return report(f"{folder}: {found.kind}", found)


def report(title: str, found: ModelFolder) -> Report:
    cfg, tensors = found.config, found.tensors
    ours = shapes(cfg)
    total = sum(map(math.prod, ours.values()))
    return Report(
        title=title,
        facts={
            **found.facts,
            "weights": _stored(tensors),
            "vision": _vision(cfg),
            "scorer": _scorer(cfg),
            "connector": (
                f"{cfg.connector.num_heads} heads of {cfg.connector.head_dim} pool the patches of "
                f"a cell, MLP {cfg.connector.mlp_width}"
            ),
            "language": _language(cfg.language),
            "attention": {
                VisionAttention.ALL: "all: every vision token sees every other one, so past frames "
                "cannot be cached",
                VisionAttention.FRAME: "frame: vision tokens see their own frame and what came "
                "before, so past frames stay cached",
            }[cfg.attention],
            **_usage(found.usage),
            "tokenizer": _tokenizer(found),
        },
        tables={
            "parameters": {n: (v, "") for n, v in parameters(ours).items()}
            | {"total": (total, "")},
            "memory": {n: (v, "bytes") for n, v in memory(ours).items()}
            | {"cache per token": (cache_bytes(cfg.language), "bytes")},
        },
        notes=(
            "memory: bf16 in training, the others as `edge-vlm export --precision` writes them. "
            "The cache is at 16 bits.",
            *found.notes,
        ),
        data={"config": cfg.to_dict(), "usage": found.usage.to_dict()},
    )


def parameters(ours: Shapes) -> dict[str, int]:
    """How many each part has; parts that a model lacks are left out."""
    counts: dict[str, int] = {}
    for name, shape in ours.items():
        part = next(part for prefix, part in PARTS.items() if name.startswith(prefix))
        counts[part] = counts.get(part, 0) + math.prod(shape)
    return {part: counts[part] for part in PARTS.values() if part in counts}


def memory(ours: Shapes) -> dict[str, int]:
    """Bytes of the weights in training and in a bundle of each preset."""
    return {
        "bf16": 2 * sum(map(math.prod, ours.values())),
        **{name: weights_bytes(ours, precision) for name, precision in PRESETS.items()},
    }


def cache_bytes(language: LanguageConfig) -> int:
    """Keys and values of one token, at 16 bits."""
    return 2 * 2 * language.num_layers * language.num_kv_heads * language.head_dim


def _stored(tensors: Mapping[str, StoredTensor]) -> str:
    files = len({tensor.file for tensor in tensors.values()})
    size = sum(tensor.num_bytes for tensor in tensors.values())
    types = Counter(tensor.dtype for tensor in tensors.values())
    named = ", ".join(f"{count} {dtype}" for dtype, count in types.most_common())
    return f"{files} file{'s' * (files > 1)}, {gigabytes(size)}, tensors: {named}"


def _usage(usage: Usage) -> dict[str, str]:
    style, frames = usage.style, usage.frames
    marks = (
        "<frame_start> and <frame_end>" if style.own_frame_markers else "<im_start> and <im_end>"
    )
    told = {
        "prompt": f"begins with {style.begin}, answers end at {' or '.join(style.ends)}; frames "
        f"between {marks}",
    }
    if frames is not None:
        told["frames"] = (
            f"at most {frames.num_frames} of a clip, {frames.max_fps:g} a second, {frames.mode}"
        )
    if usage.defaults:
        told["defaults"] = ", ".join(f"{k}={v}" for k, v in usage.defaults.items())
    return told


def _tokenizer(found: ModelFolder) -> str:
    if found.tokenizer is not None:
        return str(found.tokenizer)
    named = f" (trained with {found.tokenizer_name})" if found.tokenizer_name else ""
    return f"none here{named}: name one with --tokenizer where it is needed"


def _vision(cfg: ModelConfig) -> str:
    vision = cfg.vision
    read = " and ".join(map(str, vision.feature_layers))
    return (
        f"{vision.image_size} pixels square, {vision.num_patches} patches, {vision.num_cells} "
        f"cells; {vision.num_layers} blocks of {vision.width}, {vision.num_heads} heads of "
        f"{vision.head_dim}, MLP {vision.mlp_width}; read after blocks {read}"
    )


def _scorer(cfg: ModelConfig) -> str:
    scorer = cfg.scorer
    if scorer is None:
        return "none: every cell is kept; export --scorer change adds one without weights"
    return (
        f"STTS after block {scorer.prune_at}, cells dropped after block {scorer.prune_at + 1}; "
        f"scores rescaled by {scorer.rescale.value}"
    )


def _language(language: LanguageConfig) -> str:
    norms = "norms after" if language.post_norm else "norms before"
    heads = "over all heads" if language.full_qk_norm else "per head"
    scaling = language.rope_scaling
    rope = f"rotary base {language.rope_theta:,.0f}"
    if scaling is not None:
        rope += f", scaled {scaling.factor:g} times in {len(scaling.layers)} blocks"
    return (
        f"{language.num_layers} blocks of {language.width}, {language.num_heads} heads of "
        f"{language.head_dim} on {language.num_kv_heads} of keys and values, MLP "
        f"{language.mlp_width}; {norms}, q/k norm {heads}; {rope}; {language.base_vocab:,} + "
        f"{language.extra_vocab} ids, {language.max_positions:,} positions"
    )
