"""Prompts about images for both models: each side gets what its own processor made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import tokenizers
import torch
from torch import Tensor

from edge_vlm.config import ModelConfig
from edge_vlm.model.images import encode_images
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.pixels.stills import ImageConfig, join_images, prepare_image
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from tests.model.peers import Prompt

CUT = ImageConfig(max_crops=4, overlap=(2, 3))
TEXT_SPECIAL = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
# In the order of the published ids, as `Prompt` takes them.
EXTRA = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>")


@dataclasses.dataclass(frozen=True)
class ImagePrompt(Prompt):
    """`pixels` [crops, N, P] and `windows` [T, 4] are ours, `theirs` what transformers made."""

    windows: Tensor
    theirs: dict[str, Tensor]

    def peer_inputs(self) -> dict[str, Tensor]:
        return {
            "input_ids": self.ids[None],
            "attention_mask": torch.ones_like(self.ids)[None],
            "mm_token_type_ids": self.is_vision.long()[None],
            **self.theirs,
        }

    def features(self, model: VideoLM) -> Tensor:
        assert self.pixels is not None
        return encode_images(model, self.pixels, self.windows)


def words(cfg: ModelConfig) -> Tokenizer:
    """One token per letter in the base vocabulary, the markers right behind it."""
    letters = [chr(0x21 + i) for i in range(cfg.language.base_vocab - len(TEXT_SPECIAL))]
    base = {token: i for i, token in enumerate((*TEXT_SPECIAL, *letters))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(base, unk_token=letters[0]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    backend.add_special_tokens([*TEXT_SPECIAL, *EXTRA])
    assert backend.token_to_id(EXTRA[0]) == cfg.language.base_vocab
    return Tokenizer(backend)


def image_prompt(cfg: ModelConfig, sizes: Sequence[tuple[int, int]]) -> ImagePrompt:
    from tests.published_processors import published_images

    rng = np.random.default_rng(len(sizes))
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    images = [prepare_image(picture, cfg.vision, CUT) for picture in pictures]
    pixels, windows = join_images(images)
    prompt = PromptFormat(words(cfg))
    ids = [
        prompt.bos_ids,
        prompt.image_ids([image.grid for image in images]),
        prompt.question_ids("Which of the 3 labels says MILK, and what else?"),
    ]
    theirs = published_images(
        pictures,
        max_crops=CUT.max_crops,
        size={"height": cfg.vision.image_size, "width": cfg.vision.image_size},
        patch_size=cfg.vision.patch_size,
        overlap_margins=list(CUT.overlap),
        pooling_size=[CUT.pool, CUT.pool],
    )
    return ImagePrompt(
        cfg,
        torch.from_numpy(np.concatenate(ids).astype(np.int64)),
        torch.from_numpy(pixels),
        torch.from_numpy(windows),
        {name: torch.from_numpy(array) for name, array in theirs.items()},
    )


def one_image_prompt(cfg: ModelConfig) -> ImagePrompt:
    return image_prompt(cfg, [(57, 83)])


def several_images_prompt(cfg: ModelConfig) -> ImagePrompt:
    """Of different tilings, one of them smaller than the margins."""
    return image_prompt(cfg, [(40, 120), (11, 15), (90, 50)])
