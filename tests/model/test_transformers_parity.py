"""Same weights, same tokens, same logits as transformers' own Molmo2.

Several frames of several vision tokens each, grouped queries, frame markers that see each other:
the places where ports have gone wrong. The published processors are not involved, tensors go in.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from edge_vlm.config import ModelConfig, VisionAttention, tiny
from edge_vlm.errors import CheckpointError, ConfigError
from edge_vlm.model.published import config_from_published, load_published
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.model.weights import HUB, TRANSFORMERS, to_ours, to_published
from tests.model.prompts import read

FRAMES = 3
TOLERANCE = 1e-4
CFG: ModelConfig = dataclasses.replace(tiny(), scorer=None, attention=VisionAttention.ALL)
START, PATCH, END = (CFG.language.base_vocab + i for i in range(3))


def peer_config() -> object:
    vision, connector, language = CFG.vision, CFG.connector, CFG.language
    return transformers.Molmo2Config(
        vision_config={
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp_width,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "num_key_value_heads": vision.num_heads,
            "head_dim": vision.head_dim,
            "image_size": [vision.image_size, vision.image_size],
            "patch_size": vision.patch_size,
        },
        adapter_config={
            "vision_feature_layer": list(vision.feature_layers),
            "hidden_size": connector.width,
            "num_attention_heads": connector.num_heads,
            "num_key_value_heads": connector.num_heads,
            "head_dim": connector.head_dim,
            "intermediate_size": connector.mlp_width,
            "text_hidden_size": language.width,
        },
        text_config={
            "hidden_size": language.width,
            "num_attention_heads": language.num_heads,
            "num_key_value_heads": language.num_kv_heads,
            "head_dim": language.head_dim,
            "vocab_size": language.base_vocab,
            "additional_vocab_size": language.extra_vocab,
            "num_hidden_layers": language.num_layers,
            "intermediate_size": language.mlp_width,
            "max_position_embeddings": language.max_positions,
            "rope_parameters": {"rope_type": "default", "rope_theta": language.rope_theta},
        },
        image_start_token_id=START,
        image_patch_id=PATCH,
        image_end_token_id=END,
    )


@pytest.fixture(scope="module")
def peer() -> torch.nn.Module:
    torch.manual_seed(0)
    config = peer_config()
    config._attn_implementation = "eager"  # type: ignore[attr-defined]
    model = transformers.Molmo2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Weights large enough that a wrong mask, order or position shows far above 1e-4.
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
    return model


@pytest.fixture(scope="module")
def prompt() -> tuple[Tensor, Tensor, Tensor]:
    """Ids [s], whether each is a vision token [s], pixels [F, N, P]: two text tokens per frame."""
    generator = torch.Generator().manual_seed(1)
    cells = CFG.vision.num_cells

    def text(count: int) -> list[int]:
        high = CFG.language.base_vocab
        return torch.randint(high, (count,), generator=generator).tolist()

    ids = text(1)
    for _ in range(FRAMES):
        ids += [*text(2), START, *[PATCH] * cells, END]
    ids += text(6)
    tokens = torch.tensor(ids)
    shape = (FRAMES, CFG.vision.num_patches, CFG.vision.patch_dim)
    return tokens, tokens >= CFG.language.base_vocab, torch.randn(shape, generator=generator)


def peer_logits(peer: torch.nn.Module, prompt: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    ids, vision, pixels = prompt
    table = VideoLM(CFG).vit.cell_patches_C9
    offsets = torch.arange(FRAMES)[:, None, None] * CFG.vision.num_patches
    side = CFG.vision.cell_grid
    with torch.no_grad():
        out = peer(
            input_ids=ids[None],
            pixel_values_videos=pixels,
            video_token_pooling=(table[None] + offsets).flatten(0, 1),
            video_grids=torch.tensor([[FRAMES, side, side]]),
            mm_token_type_ids=vision.long()[None],
            attention_mask=torch.ones_like(ids)[None],
        )
    return out.logits[0]


def our_logits(
    model: VideoLM, prompt: tuple[Tensor, Tensor, Tensor], blocks: list[int] | None = None
) -> Tensor:
    ids, vision, pixels = prompt
    with torch.no_grad():
        everything = torch.arange(FRAMES * CFG.vision.num_cells)
        frames = everything // CFG.vision.num_cells
        features = model.vit_trunk(model.vit.embed(pixels), everything, frames)
        embeds = model.llm.embed(ids)
        embeds = embeds.index_add(0, (ids == PATCH).nonzero().squeeze(1), features)
        # ALL: every vision token of the prompt is in one block.
        return read(model, embeds, blocks or [0 if v else -1 for v in vision.tolist()])[0]


def ours(weights: dict[str, Tensor]) -> VideoLM:
    model = VideoLM(CFG).eval()
    model.load_state_dict(weights)
    return model


def test_logits_equal_those_of_transformers(
    peer: torch.nn.Module, prompt: tuple[Tensor, Tensor, Tensor]
) -> None:
    model = ours(to_ours(TRANSFORMERS, CFG, peer.state_dict()))
    theirs, mine = peer_logits(peer, prompt), our_logits(model, prompt)
    assert theirs.std() > 0.1
    assert (theirs - mine).abs().max() <= TOLERANCE


def test_the_comparison_sees_a_wrong_mask(
    peer: torch.nn.Module, prompt: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Markers taken for text, or frames kept apart: each must show."""
    model = ours(to_ours(TRANSFORMERS, CFG, peer.state_dict()))
    theirs = peer_logits(peer, prompt)
    ids, vision, _ = prompt
    markers_as_text = [0 if token == PATCH else -1 for token in ids.tolist()]
    frame = (ids == START).cumsum(0)
    frames_apart = torch.where(vision, frame, -1).tolist()
    for blocks in (markers_as_text, frames_apart):
        assert (theirs - our_logits(model, prompt, blocks)).abs().max() > 10 * TOLERANCE


def test_our_weights_load_back(peer: torch.nn.Module) -> None:
    theirs = peer.state_dict()
    back = to_published(TRANSFORMERS, CFG, to_ours(TRANSFORMERS, CFG, theirs))
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


def test_a_saved_folder_loads_here(
    peer: torch.nn.Module, prompt: tuple[Tensor, Tensor, Tensor], tmp_path: Path
) -> None:
    peer.save_pretrained(tmp_path)  # type: ignore[operator]
    model = load_published(tmp_path)
    assert model.cfg == CFG
    assert (peer_logits(peer, prompt) - our_logits(model, prompt)).abs().max() <= TOLERANCE


def test_our_folder_loads_there(
    peer: torch.nn.Module, prompt: tuple[Tensor, Tensor, Tensor], tmp_path: Path
) -> None:
    """Under the names of the published folders, which transformers converts on its own."""
    published = to_published(HUB, CFG, to_ours(TRANSFORMERS, CFG, peer.state_dict()))
    contiguous = {name: t.contiguous().clone() for name, t in published.items()}
    save_file(contiguous, tmp_path / "model.safetensors", {"format": "pt"})
    peer.config.save_pretrained(tmp_path)  # type: ignore[operator, union-attr]
    loaded = transformers.Molmo2ForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    ).eval()
    assert torch.equal(peer_logits(loaded, prompt), peer_logits(peer, prompt))


def test_variants_we_do_not_compute_are_refused() -> None:
    config = peer_config().to_dict()  # type: ignore[attr-defined]
    assert config_from_published(json.loads(json.dumps(config))) == CFG
    for field, value in (("qk_norm_type", "olmo"), ("norm_after", True)):
        other = {**config, "text_config": {**config["text_config"], field: value}}
        with pytest.raises(ConfigError, match=field):
            config_from_published(other)
    with pytest.raises(ConfigError, match="text_config"):
        config_from_published({})


def test_a_folder_without_weights_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_published(tmp_path)
