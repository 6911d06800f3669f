"""The contract of every exported graph: the only place that knows names, dtypes and free sizes.

Free dimensions: F frames, G kept cells over all frames, s new tokens, p past tokens, n rows of
logits wanted.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_vlm.config import ModelConfig
from edge_vlm.specs import DynamicDim, GraphSpec, TensorSpec


@dataclass(frozen=True, kw_only=True)
class GraphLimits:
    """How large the free dimensions may become. A frame is about `opt_tokens` tokens."""

    max_frames: int = 4
    """Frames per vision call. Past four the block mask of the trunk wastes more than it saves."""
    opt_tokens: int = 48
    max_tokens: int = 1024
    """New tokens per call of the language model."""
    max_past: int = 8192

    def __post_init__(self) -> None:
        for field in ("max_frames", "opt_tokens", "max_tokens", "max_past"):
            if getattr(self, field) < 1:
                raise ValueError(f"GraphLimits.{field} = {getattr(self, field)}: must be positive")


def graph_specs(cfg: ModelConfig, limits: GraphLimits | None = None) -> dict[str, GraphSpec]:
    """Specs of `vit_stem`, `vit_trunk` and `llm`, in that order."""
    limits = limits or GraphLimits()
    return {
        spec.name: spec for spec in (_stem(cfg, limits), _trunk(cfg, limits), _llm(cfg, limits))
    }


def _f32(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


def _stem(cfg: ModelConfig, limits: GraphLimits) -> GraphSpec:
    vision = cfg.vision
    cells = vision.num_cells
    return GraphSpec(
        name="vit_stem",
        inputs=(
            _f32("pixels", "F", vision.num_patches, vision.patch_dim),
            _f32("prev_cells", 1, cells, vision.width),
            TensorSpec(name="is_first", dtype="bool", shape=("F",)),
        ),
        outputs=(
            _f32("hidden", "F", vision.num_patches, vision.width),
            _f32("cells", "F", cells, vision.width),
            _f32("scores", "F", cells),
        ),
        dims={"F": DynamicDim(min=1, opt=1, max=limits.max_frames)},
    )


def _trunk(cfg: ModelConfig, limits: GraphLimits) -> GraphSpec:
    vision = cfg.vision
    cells = vision.num_cells
    return GraphSpec(
        name="vit_trunk",
        inputs=(
            _f32("hidden", "F", vision.num_patches, vision.width),
            TensorSpec(name="cell_idx", dtype="int32", shape=("G",)),
            TensorSpec(name="frame_id", dtype="int32", shape=("G",)),
        ),
        outputs=(_f32("features", "G", cfg.language.width),),
        dims={
            "F": DynamicDim(min=1, opt=1, max=limits.max_frames),
            "G": DynamicDim(min=1, opt=(cells + 1) // 2, max=cells * limits.max_frames),
        },
    )


def _llm(cfg: ModelConfig, limits: GraphLimits) -> GraphSpec:
    lm = cfg.language
    max_tokens = min(limits.max_tokens, lm.max_positions)
    max_past = min(limits.max_past, lm.max_positions)
    kinds = [(kind, i) for i in range(lm.num_layers) for kind in ("k", "v")]
    return GraphSpec(
        name="llm",
        inputs=(
            _f32("inputs_embeds", "s", lm.width),
            _f32("cos", "s", lm.rope_width),
            _f32("sin", "s", lm.rope_width),
            _f32("attn_bias", "s", "p+s"),
            TensorSpec(name="last_idx", dtype="int32", shape=("n",)),
            *(_f32(f"past_{kind}_{i}", "p", lm.num_kv_heads, lm.head_dim) for kind, i in kinds),
        ),
        outputs=(
            _f32("logits", "n", lm.base_vocab),
            *(_f32(f"new_{kind}_{i}", "s", lm.num_kv_heads, lm.head_dim) for kind, i in kinds),
        ),
        dims={
            "s": DynamicDim(min=1, opt=min(limits.opt_tokens, max_tokens), max=max_tokens),
            "p": DynamicDim(min=0, opt=min(limits.opt_tokens * 8, max_past), max=max_past),
            "n": DynamicDim(min=1, opt=1, max=max_tokens),
        },
    )
