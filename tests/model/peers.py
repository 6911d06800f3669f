"""transformers' own Molmo2 as a small random model, and the same prompts read by it and by ours.

Several frames of several vision tokens each, grouped queries, frame markers that see each other,
and for the OLMo kind two sorts of rotation: the places where ports have gone wrong. The published
processors are not involved, tensors go in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edge_vlm.config import ModelConfig, RopeScaling, VisionAttention
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import tiny
from tests.model.prompts import read

NUM_FRAMES = 3
TOLERANCE = 1e-4


def variant(name: str) -> ModelConfig:
    """A tiny model with everything in which the published 4B, 8B and O-7B differ."""
    cfg = dataclasses.replace(tiny(), scorer=None, attention=VisionAttention.ALL)
    changes: dict[str, dict[str, Any]] = {
        "4b": {"rope_theta": 5e6, "width": 40},
        "8b": {"rope_theta": 1e6, "num_kv_heads": 1, "width": 64},
        "o-7b": {
            "rope_theta": 5e5,
            "num_kv_heads": 4,
            "width": 64,
            "post_norm": True,
            "full_qk_norm": True,
            "rope_scaling": RopeScaling(
                factor=8.0,
                original_max_positions=64,
                attention_factor=1.2079441541679836,
                layers=(1, 3),
            ),
        },
    }
    return dataclasses.replace(
        cfg, language=dataclasses.replace(cfg.language, num_layers=4, **changes[name])
    )


def peer_config(cfg: ModelConfig) -> Any:
    """The `transformers.Molmo2Config` of the same model."""
    vision, connector, language = cfg.vision, cfg.connector, cfg.language
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": language.rope_theta}
    scaling = language.rope_scaling
    if scaling is not None:
        rope |= {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_positions,
            "attention_factor": scaling.attention_factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
    import transformers

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
            "rope_parameters": rope,
            "rope_scaling_layers": None if scaling is None else list(scaling.layers),
            "qk_norm_type": "olmo" if language.full_qk_norm else "qwen3",
            "norm_after": language.post_norm,
        },
        image_start_token_id=language.base_vocab,
        image_end_token_id=language.base_vocab + 1,
        image_patch_id=language.base_vocab + 2,
    )


def random_peer(cfg: ModelConfig) -> Any:
    """`Molmo2ForConditionalGeneration` with random weights, fp32."""
    import transformers

    torch.manual_seed(0)
    config = peer_config(cfg)
    config._attn_implementation = "eager"
    model = transformers.Molmo2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Weights large enough that a wrong mask, order or position shows far above 1e-4.
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
    return model


def load_peer(folder: Path, **settings: Any) -> Any:
    """As a user of transformers does; every weight of the folder must have found its place."""
    import transformers

    model, report = transformers.Molmo2ForConditionalGeneration.from_pretrained(
        folder,
        attn_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
        **settings,
    )
    assert not any(report.values()), report
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What both models read."""

    cfg: ModelConfig
    ids: Tensor
    """[s]"""
    pixels: Tensor | None
    """[F, N, P]; None for a prompt of text only."""

    @property
    def is_vision(self) -> Tensor:
        """Bool [s]: patches and the markers around them."""
        return self.ids >= self.cfg.language.base_vocab

    @property
    def is_patch(self) -> Tensor:
        return self.ids == self.cfg.language.base_vocab + 2

    @property
    def is_start(self) -> Tensor:
        return self.ids == self.cfg.language.base_vocab

    @property
    def blocks(self) -> list[int]:
        """`ALL`: every vision token of the prompt is in one block."""
        return torch.where(self.is_vision, 0, -1).tolist()

    def peer_inputs(self) -> dict[str, Tensor]:
        """What transformers' processor would have made of it."""
        inputs = {"input_ids": self.ids[None], "attention_mask": torch.ones_like(self.ids)[None]}
        if self.pixels is None:
            return inputs
        frames, side = len(self.pixels), self.cfg.vision.cell_grid
        table = VideoLM(self.cfg).vit.cell_patches_C9
        offsets = torch.arange(frames)[:, None, None] * self.cfg.vision.num_patches
        return inputs | {
            "pixel_values_videos": self.pixels,
            "video_token_pooling": (table[None] + offsets).flatten(0, 1),
            "video_grids": torch.tensor([[frames, side, side]]),
            "mm_token_type_ids": self.is_vision.long()[None],
        }

    def features(self, model: VideoLM) -> Tensor | None:
        """What is added to the embeddings of the patch tokens, [patches, E]."""
        if self.pixels is None:
            return None
        everything = torch.arange(len(self.pixels) * self.cfg.vision.num_cells)
        frames = everything // self.cfg.vision.num_cells
        return model.vit_trunk(model.vit.embed(self.pixels), everything, frames)


def text_prompt(cfg: ModelConfig, length: int = 40) -> Prompt:
    generator = torch.Generator().manual_seed(2)
    return Prompt(cfg, torch.randint(cfg.language.base_vocab, (length,), generator=generator), None)


def video_prompt(cfg: ModelConfig) -> Prompt:
    """Two text tokens before each frame, as a time stamp takes, and six behind the last."""
    generator = torch.Generator().manual_seed(1)
    high = cfg.language.base_vocab
    start, end, patch = range(high, high + 3)

    def text(count: int) -> list[int]:
        return torch.randint(high, (count,), generator=generator).tolist()

    ids = text(1)
    for _ in range(NUM_FRAMES):
        ids += [*text(2), start, *[patch] * cfg.vision.num_cells, end]
    ids += text(6)
    shape = (NUM_FRAMES, cfg.vision.num_patches, cfg.vision.patch_dim)
    return Prompt(cfg, torch.tensor(ids), torch.randn(shape, generator=generator))


def peer_logits(peer: Any, prompt: Prompt) -> Tensor:
    """[s, V]"""
    with torch.no_grad():
        logits: Tensor = peer(**prompt.peer_inputs()).logits[0]
    return logits


def embed(model: VideoLM, prompt: Prompt) -> Tensor:
    """[1, s, E]: features are added to the patch tokens' embeddings."""
    embeds: Tensor = model.llm.embed(prompt.ids)
    features = prompt.features(model)
    if features is None:
        return embeds
    return embeds.index_add(0, prompt.is_patch.nonzero().squeeze(1), features)


def our_logits(model: VideoLM, prompt: Prompt, blocks: list[int] | None = None) -> Tensor:
    """[s, V]"""
    with torch.no_grad():
        return read(model, embed(model, prompt), blocks or prompt.blocks)[0]


def our_greedy(model: VideoLM, prompt: Prompt, steps: int) -> tuple[list[int], Tensor]:
    """`steps` tokens decoded one at a time from a cache, and the logits each was chosen from."""
    blocks, rows = prompt.blocks, []
    with torch.no_grad():
        logits, past = read(model, embed(model, prompt), blocks)
        tokens: list[int] = []
        for _ in range(steps):
            rows.append(logits[-1])
            tokens.append(int(logits[-1].argmax()))
            blocks = [*blocks, -1]
            embeds = model.llm.embed(torch.tensor(tokens[-1:]))
            logits, past = read(model, embeds, blocks, len(blocks) - 1, past)
    return tokens, torch.stack(rows)


def load_ours(cfg: ModelConfig, weights: Mapping[str, Tensor]) -> VideoLM:
    model = VideoLM(cfg).eval()
    model.load_state_dict(weights)
    return model


def largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def parameters_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
