"""The contract of every exported graph: the only place that knows names, dtypes and free sizes.

Free dimensions: F frames, G kept cells over all frames, M changed cells of a frame, I crops of a
still picture, T its tokens, s new tokens, p past tokens, n rows of logits wanted, C rows that a
shared cache buffer has room for.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from edge_vlm.config import CELL, ModelConfig, VisionAttention
from edge_vlm.formats.bundle import IMAGE_ENCODER, VIT_STEM_REUSE
from edge_vlm.formats.graph_spec import DynamicDim, GraphSpec, TensorSpec
from edge_vlm.formats.precision import FP32, KVLayout, Precision, Variant
from edge_vlm.pixels.stills import ImageConfig, all_tilings, grid_of, image_crops, image_grid
from edge_vlm.text.prompt import PLAIN, PromptStyle, longest_frame, longest_image


class KVForm(str, enum.Enum):
    """How the portable language graph attends to its past; all give the same result."""

    CONCAT = "concat"
    """Past and new keys are joined first: engine builders can fuse the attention."""
    SPLIT = "split"
    """Only scores are joined: the past is never copied. Best where few tokens are new."""
    BOTH = "both"
    """`llm` joins keys, for prefill; `llm_decode` joins scores. They share one weights file."""


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


DEFAULT_FRAMES = 64
"""Of a model whose frames all see each other, where nothing says how many it was trained on."""
DIALOGUE_TOKENS = 2048
"""Room behind the video for earlier turns, a question and its answer."""
MOST_LOGITS = 1024
"""Rows of logits in one run."""


def default_limits(
    cfg: ModelConfig,
    *,
    frames: int | None = None,
    trained: int | None = None,
    images: ImageConfig | None = None,
    style: PromptStyle = PLAIN,
) -> GraphLimits:
    """Limits with room for so many whole frames, a picture after them and a dialogue.

    By default a model whose frames are prefilled together has room for as many as it was `trained`
    on; what is not used costs nothing. Raises ValueError where the model has too few positions.
    """
    wanted = frames
    if wanted is None:
        if not is_chunked(cfg):
            return GraphLimits()
        wanted = trained or DEFAULT_FRAMES
    video = 1 + wanted * longest_frame(cfg.vision.num_cells)
    if frames is not None and video > cfg.language.max_positions:
        raise ValueError(
            f"{frames} frames are {video} tokens, and the model has "
            f"{cfg.language.max_positions} positions"
        )
    picture = 0 if images is None else longest_image(images, cfg.vision, style)
    usual = GraphLimits()
    run = max(usual.max_tokens, video + picture) if is_chunked(cfg) else usual.max_tokens
    return GraphLimits(max_tokens=run, max_past=video + picture + DIALOGUE_TOKENS)


def graph_specs(
    cfg: ModelConfig,
    limits: GraphLimits | None = None,
    *,
    precision: Precision = FP32,
    variant: Variant = Variant.PORTABLE,
    kv_form: KVForm = KVForm.CONCAT,
    images: ImageConfig | None = None,
    reuse: bool = False,
) -> dict[str, GraphSpec]:
    """Specs of `vit_stem`, `vit_trunk`, perhaps `vit_stem_reuse` and `image_encoder`, `llm` and
    perhaps `llm_decode`, in that order."""
    limits = limits or GraphLimits()
    specs = [_stem(cfg, limits), _trunk(cfg, limits)]
    if reuse:
        specs.append(_stem_reuse(cfg, precision.base))
    if images is not None:
        specs.append(_image_encoder(cfg, images))
    if kv_layout(variant, cfg) is KVLayout.HEAD_MAJOR:
        specs.append(_llm_in_place(cfg, limits, precision.cache_format))
    else:
        specs.append(_llm(cfg, limits, precision.cache_format))
        if kv_form is KVForm.BOTH:
            specs.append(_llm(cfg, limits, precision.cache_format, decode=True))
    return {spec.name: spec for spec in specs}


def kv_layout(variant: Variant, cfg: ModelConfig) -> KVLayout:
    in_place = variant is Variant.ORT and not is_chunked(cfg)
    return KVLayout.HEAD_MAJOR if in_place else KVLayout.TOKEN_MAJOR


def is_chunked(cfg: ModelConfig) -> bool:
    """Its vision tokens all see each other, so all of them are new at once: the graph attends for a
    few of them at a time, and its mask is a rule instead of a matrix."""
    return cfg.attention is VisionAttention.ALL


def _f32(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


def _stem(cfg: ModelConfig, limits: GraphLimits) -> GraphSpec:
    vision = cfg.vision
    cells = vision.num_cells
    dims = {"F": DynamicDim(min=1, opt=1, max=limits.max_frames)}
    if cfg.scorer is None:
        hidden = _f32("hidden", "F", vision.num_patches, vision.width)
        scored = _f32("scored", "F", vision.num_patches, vision.width)
        return GraphSpec(
            name="vit_stem",
            inputs=(_f32("pixels", "F", vision.num_patches, vision.patch_dim),),
            outputs=(hidden,) if cfg.change is None else (hidden, scored),
            dims=dims,
        )
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
        dims=dims,
    )


def _stem_reuse(cfg: ModelConfig, kept_dtype: str) -> GraphSpec:
    """`prev_*` and `kept_*` are what the last frame's run gave by the names without `prev_`, and
    with `next_` for `kept_`."""
    vision = cfg.vision
    whole = (1, vision.num_patches, vision.width)
    heads = (vision.num_patches, vision.num_heads, vision.head_dim)
    kinds = [f"{kind}_{i}" for i in range(cfg.whole_blocks) for kind in ("k", "v")]

    def states(side: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name=f"{side}_{kind}", dtype=kept_dtype, shape=heads) for kind in kinds
        )

    inputs = [
        _f32("pixels", "M", CELL * CELL, vision.patch_dim),
        TensorSpec(name="cell_idx", dtype="int32", shape=("M",)),
    ]
    outputs = [_f32("hidden", *whole)]
    if cfg.change is not None:
        inputs += [_f32("prev_hidden", *whole), _f32("prev_scored", *whole)]
        outputs.append(_f32("scored", *whole))
    else:
        cells, scores = (1, vision.num_cells, vision.width), (1, vision.num_cells)
        inputs += [
            TensorSpec(name="is_first", dtype="bool", shape=(1,)),
            _f32("prev_hidden", *whole),
            _f32("prev_cells", *cells),
            _f32("prev_resting", *scores),
        ]
        outputs += [_f32("cells", *cells), _f32("scores", *scores), _f32("resting", *scores)]
    most = vision.num_cells
    return GraphSpec(
        name=VIT_STEM_REUSE,
        inputs=(*inputs, *states("kept")),
        outputs=(*outputs, *states("next")),
        dims={"M": DynamicDim(min=1, opt=-(-most // 5), max=most)},
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


CAMERA = (480, 640)
"""Height and width of the picture at which the image graph is to be fastest."""


def _image_encoder(cfg: ModelConfig, images: ImageConfig) -> GraphSpec:
    """One picture of any size, cut by `images`."""
    vision = cfg.vision
    tokens = [
        grid_of(tiling, vision, images).num_tokens for tiling in all_tilings(images.max_crops)
    ]
    return GraphSpec(
        name=IMAGE_ENCODER,
        inputs=(
            _f32("pixels", "I", vision.num_patches, vision.patch_dim),
            TensorSpec(name="windows", dtype="int32", shape=("T", images.pool**2)),
        ),
        outputs=(_f32("features", "T", cfg.language.width),),
        dims={
            "I": DynamicDim(
                min=2, opt=image_crops(*CAMERA, vision, images), max=1 + images.max_crops
            ),
            "T": DynamicDim(
                min=min(tokens), opt=image_grid(*CAMERA, vision, images).num_tokens, max=max(tokens)
            ),
        },
    )


def _llm(
    cfg: ModelConfig, limits: GraphLimits, kv_dtype: str, *, decode: bool = False
) -> GraphSpec:
    lm = cfg.language
    new, past, rows = _llm_dims(cfg, limits)
    if decode:
        new = rows = DynamicDim(min=1, opt=1, max=1)
    kinds = _kinds(cfg)

    def cache(side: str, axis: str) -> tuple[TensorSpec, ...]:
        shape = (axis, lm.num_kv_heads, lm.head_dim)
        return tuple(TensorSpec(name=f"{side}_{k}", dtype=kv_dtype, shape=shape) for k in kinds)

    return GraphSpec(
        name="llm_decode" if decode else "llm",
        inputs=(*_llm_inputs(cfg, by_rule=is_chunked(cfg) and not decode), *cache("past", "p")),
        outputs=(_f32("logits", "n", lm.base_vocab), *cache("new", "s")),
        dims={"s": new, "p": past, "n": rows},
    )


def _llm_in_place(cfg: ModelConfig, limits: GraphLimits, kv_dtype: str) -> GraphSpec:
    """The form whose `past_*` and `present_*` are bound to one buffer [1, h, C, d]."""
    lm = cfg.language
    new, past, rows = _llm_dims(cfg, limits)
    shape = (1, lm.num_kv_heads, "C", lm.head_dim)
    past_tensors, present_tensors = (
        tuple(TensorSpec(name=f"{side}_{k}", dtype=kv_dtype, shape=shape) for k in _kinds(cfg))
        for side in ("past", "present")
    )
    return GraphSpec(
        name="llm",
        inputs=(*_llm_inputs(cfg, by_rule=False), *past_tensors),
        outputs=(_f32("logits", "n", lm.base_vocab), *present_tensors),
        dims={
            "s": new,
            "p": past,
            "n": rows,
            "C": DynamicDim(min=1, opt=past.opt + new.opt, max=past.max + new.max),
        },
    )


def _llm_inputs(cfg: ModelConfig, *, by_rule: bool) -> tuple[TensorSpec, ...]:
    lm = cfg.language
    mask = _f32("attn_bias", "s", "p+s")
    if by_rule:
        mask = TensorSpec(name="mask_rule", dtype="int32", shape=(2, "s"))
    return (
        _f32("inputs_embeds", "s", lm.width),
        _f32("cos", "s", lm.rope_width),
        _f32("sin", "s", lm.rope_width),
        mask,
        TensorSpec(name="last_idx", dtype="int32", shape=("n",)),
    )


def _kinds(cfg: ModelConfig) -> list[str]:
    return [f"{kind}_{i}" for i in range(cfg.language.num_layers) for kind in ("k", "v")]


def _llm_dims(cfg: ModelConfig, limits: GraphLimits) -> tuple[DynamicDim, DynamicDim, DynamicDim]:
    """Ranges of s, p and n."""
    max_tokens = min(limits.max_tokens, cfg.language.max_positions)
    max_past = min(limits.max_past, cfg.language.max_positions)
    return (
        DynamicDim(min=1, opt=min(limits.opt_tokens, max_tokens), max=max_tokens),
        DynamicDim(min=0, opt=min(limits.opt_tokens * 8, max_past), max=max_past),
        DynamicDim(min=1, opt=1, max=min(MOST_LOGITS, max_tokens)),
    )
