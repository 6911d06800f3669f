"""config.json of both generations, and one error for everything that is wrong in one."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import pytest

from edge_vlm.config import ModelConfig, RopeScaling
from edge_vlm.errors import ConfigError
from edge_vlm.model.published.config import config_from_published, published_config
from edge_vlm.presets import (
    molmo2_4b,
    molmo2_8b,
    molmo2_o_7b,
    tiny,
)


def without_scorer(cfg: ModelConfig) -> ModelConfig:
    return dataclasses.replace(cfg, scorer=None)


def hub(cfg: ModelConfig) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(published_config(cfg)))
    return data


def newer(cfg: ModelConfig) -> dict[str, Any]:
    """The same model in the field names of transformers 5.20 and later."""
    data = hub(cfg)
    vision, adapter, text = (data[k] for k in ("vit_config", "adapter_config", "text_config"))
    del data["vit_config"]
    vision["image_size"] = vision.pop("image_default_input_size")
    vision["patch_size"] = vision.pop("image_patch_size")
    vision["num_position_embeddings"] = vision.pop("image_num_pos")
    adapter["vision_feature_layer"] = adapter.pop("vit_layers")
    text["rms_norm_eps"] = text.pop("layer_norm_eps")
    text["attention_bias"] = text.pop("qkv_bias")
    rope = text.pop("rope_scaling") or {"rope_type": "default"}
    text["rope_parameters"] = rope | {"rope_theta": text.pop("rope_theta")}
    layers = text["rope_scaling_layers"]
    text["rope_scaling_layers"] = layers or list(range(text["num_hidden_layers"]))
    return data | {"vision_config": vision}


@pytest.mark.parametrize("make", [molmo2_4b, molmo2_8b, molmo2_o_7b])
@pytest.mark.parametrize("write", [hub, newer])
def test_both_generations_describe_the_same_model(make: Any, write: Any) -> None:
    cfg = without_scorer(make())
    assert config_from_published(write(cfg)) == cfg


@pytest.mark.parametrize("make", [molmo2_4b, molmo2_8b, molmo2_o_7b])
def test_our_own_config_goes_through_json(make: Any) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(make().to_dict()))) == make()


def test_a_config_without_new_fields_is_an_old_one() -> None:
    """Checkpoints and bundles written before the OLMo fields existed."""
    data = tiny().to_dict()
    for field in ("post_norm", "full_qk_norm", "rope_scaling"):
        del data["language"][field]
    assert ModelConfig.from_dict(data) == tiny()


def scaled(**changes: Any) -> RopeScaling:
    data = hub(without_scorer(molmo2_o_7b()))
    text = data["text_config"]
    for field, value in changes.items():
        if value is None:
            del text["rope_scaling"][field]
        else:
            text["rope_scaling"][field] = value
    scaling = config_from_published(data).language.rope_scaling
    assert scaling is not None
    return scaling


def test_what_scaled_rotations_leave_out_is_filled_in() -> None:
    """As transformers fills it in (its `_compute_yarn_parameters`)."""
    assert math.isclose(scaled(attention_factor=None).attention_factor, 1.2079441541679836)
    assert (scaled(beta_fast=None).beta_fast, scaled(beta_slow=None).beta_slow) == (32, 1)
    assert scaled(factor=None).factor == 65_536 / 8192
    both = scaled(attention_factor=None, mscale=1.0, mscale_all_dim=0.5).attention_factor
    assert math.isclose(both, (0.1 * math.log(8) + 1) / (0.05 * math.log(8) + 1))


def test_which_blocks_are_scaled() -> None:
    data = hub(without_scorer(molmo2_o_7b()))
    text = data["text_config"]
    text["rope_scaling_layers"] = None
    language = config_from_published(data).language
    assert language.rope_scaling is not None
    assert language.rope_scaling.layers == tuple(range(32))
    assert language.num_rope_tables == 1
    text["rope_scaling_layers"] = []
    assert config_from_published(data).language.rope_scaling is None
    text["rope_scaling_layers"] = [32]
    with pytest.raises(ConfigError, match=r"blocks 0\.\.31"):
        config_from_published(data)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("text_config", "qk_norm_type", "gemma"),
        ("text_config", "use_qk_norm", False),
        ("text_config", "qkv_bias", True),
        ("text_config", "hidden_act", "gelu"),
        ("text_config", "hidden_size", "wide"),
        ("text_config", "hidden_size", 0),
        ("text_config", "hidden_size", 1.5),
        ("text_config", "hidden_size", True),
        ("text_config", "rope_theta", math.inf),
        ("text_config", "rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("text_config", "rope_scaling", [8]),
        ("text_config", "num_key_value_heads", 5),
        ("adapter_config", "pooling_attention_mask", False),
        ("adapter_config", "text_hidden_size", 3),
        ("adapter_config", "vit_layers", [30]),
        ("adapter_config", "vit_layers", []),
        ("vit_config", "num_key_value_heads", 2),
        ("vit_config", "image_default_input_size", [378, 364]),
        ("vit_config", "image_num_pos", 730),
        ("vit_config", "hidden_act", "quick_gelu"),
    ],
)
def test_a_value_that_is_not_computed_is_named(section: str, field: str, value: Any) -> None:
    data = hub(without_scorer(molmo2_4b()))
    data[section][field] = value
    with pytest.raises(ConfigError) as caught:
        config_from_published(data, where="some/config.json")
    text = str(caught.value)
    assert "some/config.json" in text
    assert field.replace("image_default_input_size", "image_size") in text or "num_kv" in text


def test_every_fault_is_in_one_error() -> None:
    data = hub(without_scorer(molmo2_4b()))
    del data["text_config"]["hidden_size"], data["vit_config"]["layer_norm_eps"]
    data["adapter_config"] = None
    data["tie_word_embeddings"] = True
    with pytest.raises(ConfigError) as caught:
        config_from_published(data)
    for fault in (
        "text_config lacks hidden_size",
        "vit_config lacks layer_norm_eps",
        "adapter_config is None, expected an object",
        "tie_word_embeddings is True, expected False",
    ):
        assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "named"),
    [
        *((None, "None"), ("llava", "'llava'"), ("molmo", "Molmo,")),
        *(("molmo_point", "MolmoPoint,"), ("molmoact2", "MolmoAct2,")),
        ("molmo-motion", "MolmoMotion,"),
    ],
)
def test_another_family_is_told_by_its_type(model_type: str | None, named: str) -> None:
    with pytest.raises(ConfigError, match="another family") as caught:
        config_from_published({"model_type": model_type})
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}},
            "bitsandbytes, nf4",
        ),
        (
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
            "modelopt, NVFP4",
        ),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization_config": "int4"}, "unknown"),
    ],
)
def test_quantised_weights_are_named_with_the_way_out(extra: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match="quantised already") as caught:
        config_from_published(hub(without_scorer(molmo2_4b())) | extra)
    assert named in str(caught.value)
    assert "--precision int4" in str(caught.value)


def test_what_a_published_config_cannot_say() -> None:
    small = dataclasses.replace(tiny(extra_vocab=2), scorer=None)
    vision = dataclasses.replace(small.vision, feature_layers=(3, 2))
    with pytest.raises(ConfigError) as caught:
        published_config(dataclasses.replace(small, vision=vision))
    for fault in ("5 ViT blocks, expected the 4", "2 extra ids"):
        assert fault in str(caught.value)


def test_reading_changes_nothing() -> None:
    data = hub(without_scorer(molmo2_o_7b()))
    before = copy.deepcopy(data)
    config_from_published(data)
    assert data == before
