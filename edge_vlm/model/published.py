"""Loads a published Molmo2 folder: `config.json` and one or several safetensors files.

Folders of the model hub, folders written by `Molmo2ForConditionalGeneration.save_pretrained`, and
either of them with an STTS scorer inside are told apart by their weight names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edge_vlm.config import (
    ConnectorConfig,
    LanguageConfig,
    ModelConfig,
    Rescale,
    ScorerConfig,
    VisionAttention,
    VisionConfig,
)
from edge_vlm.errors import CheckpointError, ConfigError
from edge_vlm.model.checkpoint import CONFIG, WEIGHTS, read_tensors
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.model.vit import cell_patch_table
from edge_vlm.model.weights import recognise, to_ours

INDEX = "model.safetensors.index.json"
SCORER_WIDTH = "temporal_token_scorer.mlp.w1.bias"
STTS_PRUNE_AT = 3


def load_published(folder: Path, dtype: torch.dtype = torch.float32) -> VideoLM:
    """The model of a published folder. Weights stay mapped files where their type already fits.

    Raises CheckpointError for a missing or unreadable file, WeightNamesError for a misfit and
    ConfigError for a variant that this implementation does not compute.
    """
    weights = read_weights(folder)
    cfg = config_from_published(_read_json(folder / CONFIG))
    widths = [t.numel() for name, t in weights.items() if name.endswith(SCORER_WIDTH)]
    if widths:
        cfg = with_stts_scorer(cfg, widths[0])
    ours = to_ours(recognise(weights), cfg, weights, where=folder)
    with torch.device("meta"):
        model = VideoLM(cfg)
    model.load_state_dict({name: t.to(dtype) for name, t in ours.items()}, assign=True)
    # The one buffer that is computed rather than stored was computed on the meta device.
    model.vit.cell_patches_C9 = cell_patch_table(cfg.vision.patch_grid)
    return model.eval()


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder under their published names."""
    if (folder / INDEX).is_file():
        files = sorted(set(_read_json(folder / INDEX)["weight_map"].values()))
    else:
        files = [WEIGHTS]
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(
            f"missing weight files: {', '.join(absent)}",
            where=folder,
            remedy="download the folder again; only safetensors files are read",
        )
    weights: dict[str, Tensor] = {}
    for name in files:
        weights.update(read_tensors(folder / name))
    return weights


def config_from_published(data: Mapping[str, Any]) -> ModelConfig:
    """Reads both generations of field names. The model has no scorer yet: `with_stts_scorer`.

    Raises ConfigError naming the field that is missing, or whose value is not supported.
    """
    try:
        text, adapter = data["text_config"], data["adapter_config"]
        legacy = "vit_config" in data
        vision = data["vit_config"] if legacy else data["vision_config"]
        features = adapter["vit_layers"] if legacy else adapter["vision_feature_layer"]
        features = tuple(layer % vision["num_hidden_layers"] for layer in features)
        rope = text.get("rope_parameters") or {"rope_theta": text.get("rope_theta")}
        _supported("text_config.qk_norm_type", text.get("qk_norm_type", "qwen3"), "qwen3")
        _supported("text_config.norm_after", text.get("norm_after", False), False)
        _supported("text_config.rope_scaling", text.get("rope_scaling"), None)
        _supported("text_config.rope_type", rope.get("rope_type", "default"), "default")
        qkv_bias = text.get("attention_bias", text.get("qkv_bias", False))
        _supported("text_config.attention_bias", qkv_bias, False)
        for name, part, activation in (
            ("text_config", text, "silu"),
            ("adapter_config", adapter, "silu"),
            ("vision_config", vision, "gelu_pytorch_tanh"),
        ):
            _supported(f"{name}.hidden_act", part["hidden_act"], activation)
        for name, part in (("adapter_config", adapter), ("vision_config", vision)):
            heads = part["num_attention_heads"]
            _supported(f"{name}.num_key_value_heads", part["num_key_value_heads"], heads)
        height, width = vision["image_default_input_size" if legacy else "image_size"]
        _supported("vision_config.image_size", (height, width), (width, width))
        return ModelConfig(
            vision=VisionConfig(
                image_size=width,
                patch_size=vision["image_patch_size" if legacy else "patch_size"],
                width=vision["hidden_size"],
                num_heads=vision["num_attention_heads"],
                head_dim=vision["head_dim"],
                mlp_width=vision["intermediate_size"],
                # Hub folders declare 27 blocks and hold the weights of those that are read.
                num_layers=max(features) + 1 if legacy else vision["num_hidden_layers"],
                feature_layers=features,
                norm_eps=vision["layer_norm_eps"],
            ),
            scorer=None,
            connector=ConnectorConfig(
                width=adapter["hidden_size"],
                num_heads=adapter["num_attention_heads"],
                head_dim=adapter["head_dim"],
                mlp_width=adapter["intermediate_size"],
            ),
            language=LanguageConfig(
                width=text["hidden_size"],
                num_layers=text["num_hidden_layers"],
                num_heads=text["num_attention_heads"],
                num_kv_heads=text["num_key_value_heads"],
                head_dim=text["head_dim"],
                mlp_width=text["intermediate_size"],
                base_vocab=text["vocab_size"],
                extra_vocab=text["additional_vocab_size"],
                rope_theta=rope["rope_theta"],
                norm_eps=text["rms_norm_eps"] if "rms_norm_eps" in text else text["layer_norm_eps"],
                max_positions=text["max_position_embeddings"],
            ),
            attention=VisionAttention.ALL,
        )
    except KeyError as error:
        raise ConfigError(
            f"the published config lacks {error}", remedy="use the config.json of a Molmo2 folder"
        ) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the published config is not one of a Molmo2: {error}") from error


def with_stts_scorer(cfg: ModelConfig, mlp_width: int) -> ModelConfig:
    """The same model with the scorer of the published STTS code (arXiv 2603.18004)."""
    scorer = ScorerConfig(
        prune_at=STTS_PRUNE_AT,
        num_heads=cfg.vision.num_heads,
        head_dim=cfg.vision.head_dim,
        mlp_width=mlp_width,
        rescale=Rescale.ROW,
    )
    return ModelConfig(
        vision=cfg.vision,
        scorer=scorer,
        connector=cfg.connector,
        language=cfg.language,
        attention=cfg.attention,
    )


def _supported(field: str, value: object, wanted: object) -> None:
    if value != wanted:
        raise ConfigError(
            f"{field} = {value!r} is not supported",
            remedy=f"only models with {wanted!r} can be loaded, such as Molmo2-4B and Molmo2-8B",
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"there is no {path.name}", where=path.parent, remedy="point to a Molmo2 folder"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"not JSON: {error}", where=path) from error
    if not isinstance(data, dict):
        raise CheckpointError("not a JSON object", where=path)
    return data
