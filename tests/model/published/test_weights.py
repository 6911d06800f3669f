"""Weight names: every published one has its place, and misfits are listed in one error."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from edge_vlm.config import ModelConfig
from edge_vlm.errors import WeightNamesError
from edge_vlm.model.published.config import config_from_published, published_config
from edge_vlm.model.published.mapping import (
    published_shapes,
    shapes,
    to_ours,
    to_published,
)
from edge_vlm.model.published.names import (
    HUB,
    NAMINGS,
    STTS,
    TRAINING,
    TRANSFORMERS,
    Naming,
    recognise,
)
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import (
    molmo2_4b,
    molmo2_8b,
    molmo2_o_7b,
    tiny,
)
from tests.model.peers import variant

PUBLISHED_4B = Path(__file__).parents[4] / "shared" / "molmo2-4b"
INDEX = "model.safetensors.index.json"
PLAIN = dataclasses.replace(tiny(), scorer=None)


def covered(naming: Naming) -> dict[str, torch.Tensor]:
    cfg = PLAIN if naming is TRANSFORMERS else tiny()
    weights = VideoLM(cfg).state_dict()
    return {n: t for n, t in weights.items() if naming is not STTS or not n.startswith("llm.")}


@pytest.mark.parametrize("naming", NAMINGS, ids=lambda naming: naming.name)
def test_names_go_there_and_back(naming: Naming) -> None:
    cfg = PLAIN if naming is TRANSFORMERS else tiny()
    ours = covered(naming)
    published = to_published(naming, cfg, ours)
    assert recognise(published) is naming
    back = to_ours(naming, cfg, published)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[name], ours[name]) for name in ours)


@pytest.mark.skipif(
    not PUBLISHED_4B.is_dir(), reason="needs the published 4B folder in ../shared beside the clone"
)
def test_every_published_4b_name_has_its_place_and_shape() -> None:
    config = json.loads((PUBLISHED_4B / "config.json").read_text())
    index = json.loads((PUBLISHED_4B / INDEX).read_text())
    cfg = config_from_published(config)
    assert cfg == dataclasses.replace(molmo2_4b(), scorer=None)
    theirs = published_shapes(HUB, cfg)
    assert theirs.keys() == index["weight_map"].keys()
    assert {name for row in HUB.expand(cfg) for name in row.ours} == shapes(cfg).keys()
    assert sum(map(math.prod, theirs.values())) == 4_850_869_200
    assert index["metadata"]["total_parameters"] == 4_850_869_200


@pytest.mark.parametrize("make", [molmo2_4b, molmo2_8b, molmo2_o_7b])
def test_full_size_shapes_are_those_of_transformers(make: object) -> None:
    """Every tensor of all three models, on the meta device."""
    import transformers

    cfg = dataclasses.replace(make(), scorer=None)  # type: ignore[operator]
    with torch.device("meta"):
        peer = transformers.Molmo2ForConditionalGeneration(
            transformers.Molmo2Config(**published_config(cfg))
        )
    theirs = {name: tuple(tensor.shape) for name, tensor in peer.state_dict().items()}
    assert published_shapes(TRANSFORMERS, cfg) == theirs


def num_parameters(cfg: ModelConfig) -> int:
    return sum(map(math.prod, shapes(cfg).values()))


def test_known_parameter_counts() -> None:
    """The totals of the published files, and the scorer's as counted in the published code."""
    plain = {m: dataclasses.replace(m(), scorer=None) for m in (molmo2_4b, molmo2_8b)}
    assert num_parameters(plain[molmo2_4b]) == 4_850_869_200
    assert num_parameters(plain[molmo2_8b]) == 8_661_703_120
    assert num_parameters(molmo2_4b()) - num_parameters(plain[molmo2_4b]) == 33_766_769
    connector = {n: s for n, s in shapes(molmo2_o_7b()).items() if n.startswith("connector.")}
    assert round(sum(map(math.prod, connector.values())) / 1e6) == 80


def test_fused_tensors_are_cut_in_order() -> None:
    cfg = PLAIN
    published = to_published(HUB, cfg, VideoLM(cfg).state_dict())
    fused = published["model.transformer.blocks.1.self_attn.att_proj.weight"]
    ours = to_ours(HUB, cfg, published)
    parts = [ours[f"llm.blocks.1.attn.{part}.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), fused)
    assert [len(part) for part in parts] == [64, 32, 32]
    # The published MLP computes silu(second half) * first half.
    up, gate = published["model.transformer.blocks.0.mlp.ff_proj.weight"].chunk(2)
    assert torch.equal(ours["llm.blocks.0.mlp.up.weight"], up)
    assert torch.equal(ours["llm.blocks.0.mlp.gate.weight"], gate)
    base = published["model.transformer.wte.embedding"]
    assert len(base) == cfg.language.base_vocab


def test_the_training_repository_names_the_same_tensors() -> None:
    """Its converter to the hub's names adds prefixes and moves the head, nothing else."""
    weights = VideoLM(tiny()).state_dict()
    hub = to_published(HUB, tiny(), weights)
    for name, tensor in to_published(TRAINING, tiny(), weights).items():
        moved = name.replace("transformer.ff_out.weight", "lm_head.weight")
        if moved == name:
            for part, place in (("att_proj", "self_attn"), ("attn_out", "self_attn")):
                moved = moved.replace(f".{part}.", f".{place}.{part}.")
            if "blocks" in moved and "resblocks" not in moved:
                for part in ("q_norm", "k_norm"):
                    moved = moved.replace(f".{part}.", f".self_attn.{part}.")
                for part in ("ff_proj", "ff_out"):
                    moved = moved.replace(f".{part}.", f".mlp.{part}.")
            moved = f"model.{moved}"
        assert torch.equal(hub.pop(moved), tensor)
    assert not hub


def test_full_width_norms_have_their_shape() -> None:
    cfg = variant("o-7b")
    wanted = published_shapes(HUB, cfg)
    heads = cfg.language.num_heads * cfg.language.head_dim
    assert wanted["model.transformer.blocks.0.self_attn.q_norm.weight"] == (heads,)
    published = to_published(HUB, cfg, VideoLM(cfg).state_dict())
    per_head = dataclasses.replace(
        cfg, language=dataclasses.replace(cfg.language, full_qk_norm=False)
    )
    with pytest.raises(WeightNamesError) as caught:
        to_ours(HUB, per_head, published)
    assert len(caught.value.misshaped) == 2 * cfg.language.num_layers


def test_all_misfits_are_listed_in_one_error() -> None:
    cfg = tiny()
    published = to_published(STTS, cfg, covered(STTS))
    del published["image_vit.patch_embedding.bias"], published["image_projector.w2.weight"]
    published["image_vit.cls"] = torch.zeros(1)
    published["image_projector.w1.weight"] = torch.zeros(2, 3)
    published["image_projector.w3.weight"] = published["image_projector.w3.weight"].to(torch.int8)
    with pytest.raises(WeightNamesError) as caught:
        to_ours(STTS, cfg, published, where="some/file")
    error = caught.value
    assert set(error.missing) == {"image_projector.w2.weight", "image_vit.patch_embedding.bias"}
    assert error.unknown == ("image_vit.cls",)
    assert error.misshaped == ("image_projector.w1.weight is [2, 3], expected [56, 32]",)
    assert error.mistyped == ("image_projector.w3.weight is torch.int8, expected F32, BF16, F16",)
    listed = (*error.missing, *error.unknown, *error.misshaped, *error.mistyped, "some/file")
    assert all(name in str(error) for name in listed)


def test_unknown_namings_are_refused() -> None:
    with pytest.raises(WeightNamesError, match="known namings: stts, training, hub, transformers"):
        recognise(["encoder.weight"])
