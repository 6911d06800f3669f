"""`config.json` of published Molmo2 folders, read and written.

Two generations of field names exist: the hub's (`vit_config`, `rope_scaling`, 27 blocks of the ViT
declared of which 25 have weights) and that of transformers 5.20 and later (`vision_config`,
`rope_parameters`). Both are read; the hub's is written, and transformers reads it too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from edge_vlm.config import (
    MOST,
    ConnectorConfig,
    LanguageConfig,
    ModelConfig,
    RopeScaling,
    ScorerConfig,
    VisionAttention,
    VisionConfig,
)
from edge_vlm.errors import ConfigError
from edge_vlm.json_text import MALFORMED
from edge_vlm.model.published.section import Section, show

MODEL_TYPE = "molmo2"
RELATIVES = ("MolmoPoint", "MolmoAct2", "MolmoAct", "MolmoMotion", "Molmo")
"""Of the same family and another architecture."""
RECORD = "edge_vlm"
"""Key of config.json under which stands what a hub config has no words for; others ignore it."""
REMEDY = "use the config.json that was published with the weights"

# Where the extra vocabulary's first ids stand, in the order in which the tokenizers add them.
_SPECIAL_IDS = (
    "image_start_token_id",
    "image_end_token_id",
    "image_patch_id",
    "image_col_id",
    "low_res_image_start_token_id",
    None,  # `<|image|>` in a prompt: an image takes its place before the model sees it
    "image_low_res_id",
    "frame_start_token_id",
    "frame_end_token_id",
)


def config_from_published(data: Mapping[str, Any], where: object = None) -> ModelConfig:
    """The model a config.json describes, without a scorer, which no published config mentions.

    Raises ConfigError that lists every field which is missing, ill-typed or of a value that is not
    computed here; a config of another model family is one of those.
    """
    _require_family(data, where)
    problems: list[str] = []
    legacy = "vit_config" in data
    text = Section("text_config", data.get("text_config"), problems)
    adapter = Section("adapter_config", data.get("adapter_config"), problems)
    vision_name = "vit_config" if legacy else "vision_config"
    vision = Section(vision_name, data.get(vision_name), problems)
    Section("config.json", data, problems).expect(False, "tie_word_embeddings")
    try:
        cfg = ModelConfig(
            vision=_vision(vision, adapter, legacy),
            scorer=None,
            connector=_connector(adapter, text),
            language=_language(text),
            attention=VisionAttention.ALL,
        )
    except MALFORMED as error:
        if not problems:  # or else it comes of what stands in for missing values
            problems.append(str(error))
    if problems:
        raise ConfigError(
            f"the config is not one of a Molmo2 that is computed here: {'; '.join(problems)}",
            where=where,
            remedy=REMEDY,
        )
    return cfg


def _require_family(data: Mapping[str, Any], where: object) -> None:
    """Raises ConfigError for another architecture, and for weights that are quantised already."""
    kind = data.get("model_type")
    if kind != MODEL_TYPE:
        name = str(kind).lower().replace("-", "").replace("_", "")
        known = next((family for family in RELATIVES if name.startswith(family.lower())), None)
        raise ConfigError(
            f"a model of another family: {known + ', ' if known else ''}model_type is "
            f"{show(kind)}, expected {MODEL_TYPE!r}",
            where=where,
            remedy="Molmo2 folders are read, those of its training repository, and checkpoints "
            "written by `edge-vlm train`",
        )
    quantised = data.get("quantization_config", data.get("quantization"))
    if quantised is not None:
        found = quantised if isinstance(quantised, Mapping) else {}
        told = [
            found[f] for f in ("quant_method", "bnb_4bit_quant_type", "quant_algo") if f in found
        ]
        maker = ", ".join(map(str, told)) or ("MLX" if "quantization" in data else "unknown")
        raise ConfigError(
            f"the weights are quantised already ({maker})",
            where=where,
            remedy="take the folder with BF16 or F32 weights and quantise at `edge-vlm export "
            "--precision int4`",
        )


def _vision(vision: Section, adapter: Section, legacy: bool) -> VisionConfig:
    heads = vision.whole("num_attention_heads")
    vision.expect("gelu_pytorch_tanh", "hidden_act")
    vision.expect(heads, "num_key_value_heads")
    vision.expect(True, "attention_bias")
    vision.expect(3, "num_channels")
    declared = vision.whole("num_hidden_layers", most=MOST["num_layers"])
    layers = adapter.wholes("vit_layers", "vision_feature_layer")
    if not all(-declared <= i < declared for i in layers):
        adapter.fault("vit_layers", layers, f"some of the {declared} declared layers")
    features = [i % declared for i in layers]
    side, *others = vision.wholes("image_default_input_size", "image_size")
    if others != [side]:
        vision.fault("image_size", [side, *others], "a square")
    patch = vision.whole("image_patch_size", "patch_size")
    vision.expect((side // patch) ** 2, "image_num_pos", "num_position_embeddings")
    return VisionConfig(
        image_size=side,
        patch_size=patch,
        width=vision.whole("hidden_size"),
        num_heads=heads,
        head_dim=vision.whole("head_dim"),
        mlp_width=vision.whole("intermediate_size"),
        # Hub folders declare blocks after the last one that is read and hold no weights of them.
        num_layers=max(features) + 1 if legacy else declared,
        feature_layers=tuple(features),
        norm_eps=vision.number("layer_norm_eps"),
    )


def _connector(adapter: Section, text: Section) -> ConnectorConfig:
    heads = adapter.whole("num_attention_heads")
    adapter.expect("silu", "hidden_act")
    adapter.expect(heads, "num_key_value_heads")
    adapter.expect(True, "attention_bias", "pooling_attention_mask")
    adapter.expect(False, "mlp_bias")
    adapter.expect(text.data.get("hidden_size"), "text_hidden_size")
    return ConnectorConfig(
        width=adapter.whole("hidden_size"),
        num_heads=heads,
        head_dim=adapter.whole("head_dim"),
        mlp_width=adapter.whole("intermediate_size"),
    )


def _language(text: Section) -> LanguageConfig:
    text.expect("silu", "hidden_act")
    text.expect(False, "attention_bias", "qkv_bias")
    text.expect(True, "use_qk_norm")
    norm_type = text.data.get("qk_norm_type", "qwen3")
    if norm_type not in ("qwen3", "olmo"):
        text.fault("qk_norm_type", norm_type, "'qwen3' or 'olmo'")
    num_layers = text.whole("num_hidden_layers", most=MOST["num_layers"])
    max_positions = text.whole("max_position_embeddings")
    theta, scaling = _rope(text, num_layers, max_positions)
    return LanguageConfig(
        width=text.whole("hidden_size"),
        num_layers=num_layers,
        num_heads=text.whole("num_attention_heads"),
        num_kv_heads=text.whole("num_key_value_heads"),
        head_dim=text.whole("head_dim"),
        mlp_width=text.whole("intermediate_size"),
        base_vocab=text.whole("vocab_size"),
        extra_vocab=text.whole("additional_vocab_size"),
        rope_theta=theta,
        norm_eps=text.number("rms_norm_eps", "layer_norm_eps"),
        max_positions=max_positions,
        post_norm=bool(text.data.get("norm_after", False)),
        full_qk_norm=norm_type == "olmo",
        rope_scaling=scaling,
    )


def _rope(text: Section, num_layers: int, max_positions: int) -> tuple[float, RopeScaling | None]:
    """The base of the rotations and how some blocks scale them."""
    rope = text.inner("rope_parameters", "rope_scaling")
    theta = float((rope if rope.has("rope_theta") else text).number("rope_theta"))
    rope.expect(1.0, "partial_rotary_factor")
    kind = rope.data.get("rope_type", rope.data.get("type", "default"))
    # Without a list every block is scaled; the newer configs list the blocks in any case.
    layers = list(range(num_layers))
    listed = text.data.get("rope_scaling_layers")
    if listed is not None:
        layers = [] if listed == [] else text.wholes("rope_scaling_layers")
    if kind == "default" or not layers:
        return theta, None
    if kind != "yarn":
        rope.fault("rope_type", kind, "'default' or 'yarn'")
        return theta, None
    original = rope.whole("original_max_position_embeddings", default=max_positions)
    factor = float(rope.number("factor", default=max_positions / original))
    scaling = RopeScaling(
        factor=factor,
        original_max_positions=original,
        attention_factor=_attention_factor(rope, factor),
        layers=tuple(layers),
        beta_fast=float(rope.number("beta_fast", default=32.0)),
        beta_slow=float(rope.number("beta_slow", default=1.0)),
        truncate=bool(rope.data.get("truncate", True)),
    )
    return theta, scaling


def _attention_factor(rope: Section, factor: float) -> float:
    """As given, or as the paper suggests (arXiv 2309.00071, 3.4)."""
    if rope.has("attention_factor"):
        return float(rope.number("attention_factor"))

    def suggested(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1

    if rope.data.get("mscale") and rope.data.get("mscale_all_dim"):
        return suggested(rope.number("mscale")) / suggested(rope.number("mscale_all_dim"))
    return suggested(1.0)


def with_record(cfg: ModelConfig, record: Mapping[str, Any], where: object) -> ModelConfig:
    """The model with the scorer and the attention that a record tells.

    Raises ConfigError for a damaged record.
    """
    try:
        scorer = record.get("scorer")
        return dataclasses.replace(
            cfg,
            scorer=None if scorer is None else ScorerConfig(**scorer),
            attention=VisionAttention(record.get("attention", cfg.attention)),
        )
    except MALFORMED as error:
        raise ConfigError(f"bad {RECORD!r}: {error}", where=where, remedy=REMEDY) from error


def record_of(cfg: ModelConfig) -> dict[str, Any]:
    """What `published_config` leaves out of a model."""
    everything = cfg.to_dict()
    return {field: everything[field] for field in ("scorer", "attention")}


def published_config(cfg: ModelConfig) -> dict[str, Any]:
    """The hub's config.json of a model; `config_from_published` reads it back, less the scorer and
    the attention, which `record_of` tells.

    What a model does not know of its prompts is said as the released models have it: markers are
    the first ids after the base vocabulary, and frames have no markers of their own. Raises
    ConfigError for what such a config cannot say.
    """
    _require_sayable(cfg)
    vision, connector, language = cfg.vision, cfg.connector, cfg.language
    ids = {name: language.base_vocab + i for i, name in enumerate(_SPECIAL_IDS) if name}
    return {
        "architectures": ["Molmo2ForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "tie_word_embeddings": False,
        "use_frame_special_tokens": False,
        **ids,
        "vit_config": {
            "model_type": MODEL_TYPE,
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp_width,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "num_key_value_heads": vision.num_heads,
            "head_dim": vision.head_dim,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": vision.norm_eps,
            "image_default_input_size": [vision.image_size, vision.image_size],
            "image_patch_size": vision.patch_size,
            "image_num_pos": vision.num_patches,
        },
        "adapter_config": {
            "model_type": MODEL_TYPE,
            "vit_layers": list(vision.feature_layers),
            "pooling_attention_mask": True,
            "hidden_size": connector.width,
            "intermediate_size": connector.mlp_width,
            "num_attention_heads": connector.num_heads,
            "num_key_value_heads": connector.num_heads,
            "head_dim": connector.head_dim,
            "hidden_act": "silu",
            "text_hidden_size": language.width,
        },
        "text_config": _text_config(language),
    }


def _text_config(language: LanguageConfig) -> dict[str, Any]:
    scaling = language.rope_scaling
    rope = scaling and {
        "rope_type": "yarn",
        "factor": scaling.factor,
        "attention_factor": scaling.attention_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "truncate": scaling.truncate,
    }
    return {
        "model_type": f"{MODEL_TYPE}_text",
        "hidden_size": language.width,
        "intermediate_size": language.mlp_width,
        "num_hidden_layers": language.num_layers,
        "num_attention_heads": language.num_heads,
        "num_key_value_heads": language.num_kv_heads,
        "head_dim": language.head_dim,
        "hidden_act": "silu",
        "layer_norm_eps": language.norm_eps,
        "max_position_embeddings": language.max_positions,
        "vocab_size": language.base_vocab,
        "additional_vocab_size": language.extra_vocab,
        "qkv_bias": False,
        "use_qk_norm": True,
        "qk_norm_type": "olmo" if language.full_qk_norm else "qwen3",
        "norm_after": language.post_norm,
        "rope_theta": language.rope_theta,
        "rope_scaling": rope,
        "rope_scaling_layers": None if scaling is None else list(scaling.layers),
    }


def _require_sayable(cfg: ModelConfig) -> None:
    unsaid = []
    read = max(cfg.vision.feature_layers) + 1
    if cfg.vision.num_layers != read:
        unsaid.append(f"{cfg.vision.num_layers} ViT blocks, expected the {read} that are read")
    if cfg.language.extra_vocab < len(_SPECIAL_IDS):
        unsaid.append(
            f"{cfg.language.extra_vocab} extra ids, expected at least {len(_SPECIAL_IDS)}"
        )
    if unsaid:
        raise ConfigError(
            f"a published config cannot describe this model: {'; '.join(unsaid)}",
            remedy="save it as a checkpoint of this project",
        )
