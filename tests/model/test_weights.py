"""Weight names: every published one has its place, and misfits are listed in one error."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from edge_vlm.config import molmo2_4b, tiny
from edge_vlm.errors import WeightNamesError
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.model.weights import (
    HUB,
    NAMINGS,
    STTS,
    TRANSFORMERS,
    Naming,
    recognise,
    shapes,
    to_ours,
    to_published,
)

INDEX = Path(__file__).parents[3] / "shared" / "molmo2-4b" / "model.safetensors.index.json"
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


@pytest.mark.skipif(not INDEX.is_file(), reason="needs the published 4B folder beside the clone")
def test_every_published_4b_name_has_its_place() -> None:
    cfg = dataclasses.replace(molmo2_4b(), scorer=None)
    named = {name for row in HUB.expand(cfg) for name in row.published}
    assert named == set(json.loads(INDEX.read_text())["weight_map"])
    assert {name for row in HUB.expand(cfg) for name in row.ours} == shapes(cfg).keys()


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


def test_all_misfits_are_listed_in_one_error() -> None:
    cfg = tiny()
    published = to_published(STTS, cfg, covered(STTS))
    del published["image_vit.patch_embedding.bias"], published["image_projector.w2.weight"]
    published["image_vit.cls"] = torch.zeros(1)
    published["image_projector.w1.weight"] = torch.zeros(2, 3)
    with pytest.raises(WeightNamesError) as caught:
        to_ours(STTS, cfg, published, where="some/file")
    error = caught.value
    assert error.missing == ("image_projector.w2.weight", "image_vit.patch_embedding.bias")
    assert error.unknown == ("image_vit.cls",)
    assert error.misshaped == ("image_projector.w1.weight is [2, 3], expected [56, 32]",)
    for name in (*error.missing, *error.unknown, "image_projector.w1.weight", "some/file"):
        assert name in str(error)


def test_unknown_namings_are_refused() -> None:
    with pytest.raises(WeightNamesError, match="known namings: stts, hub, transformers"):
        recognise(["encoder.weight"])
