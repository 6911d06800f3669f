"""What torch answers to a snapshot question: the model's own image forward, no engine, no cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from edge_vlm.model.images import encode_images
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.pixels.frames import decode_jpeg
from edge_vlm.pixels.patches import to_pixel_values
from edge_vlm.pixels.stills import ImageConfig, prepare_image
from edge_vlm.text.prompt import RELEASED, PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from tests.model.prompts import read
from tests.published_folder import published_folder

Part = tuple[np.ndarray, Tensor | None]
"""Ids, and the features of the patch tokens among them."""


def prompt_format() -> PromptFormat:
    return PromptFormat(Tokenizer.from_file(published_folder() / "tokenizer.json"), RELEASED)


def video_part(model: VideoLM, frames: Sequence[tuple[float, bytes]]) -> list[Part]:
    """Frames, time in seconds and JPEG, every cell of which is kept."""
    prompt, parts = prompt_format(), list[Part]()
    cells = torch.arange(model.cfg.vision.num_cells)
    for index, (time_s, jpeg) in enumerate(frames):
        pixels = to_pixel_values(decode_jpeg(jpeg), model.cfg.vision)
        features = model.vit_trunk(
            model.vit.embed(torch.from_numpy(pixels)[None]), cells, torch.zeros_like(cells)
        )
        parts.append((prompt.frame_ids(time_s, len(cells), first=index == 0), features))
    return parts


def image_part(model: VideoLM, jpeg: bytes, cut: ImageConfig) -> Part:
    still = prepare_image(decode_jpeg(jpeg), model.cfg.vision, cut)
    features = encode_images(model, torch.from_numpy(still.pixels), torch.from_numpy(still.windows))
    return prompt_format().image_ids([still.grid]), features


def answer(
    model: VideoLM, vision: Sequence[Part], question: str, steps: int, *, one_block: bool
) -> str:
    """The greedy answer; each part is one block of its own, or all are `one_block`."""
    prompt = prompt_format()
    ids, embeds, blocks = [prompt.bos_ids], [], [-1]
    with torch.no_grad():
        embeds.append(model.llm.embed(torch.from_numpy(prompt.bos_ids)))
        for number, (part, features) in enumerate(vision):
            places = torch.from_numpy(part == prompt.patch_id).nonzero().squeeze(1)
            embeds.append(model.llm.embed(torch.from_numpy(part)).index_add(0, places, features))
            block = 0 if one_block else number
            blocks += np.where(prompt.vision_mask(part), block, -1).tolist()
            ids.append(part)
        asked = prompt.question_ids(question)
        embeds.append(model.llm.embed(torch.from_numpy(asked)))
        blocks += [-1] * len(asked)
        rows, tokens = torch.cat(embeds), list[int]()
        for _ in range(steps):
            logits, _ = read(model, rows, blocks)
            token = int(logits[-1].argmax())
            if token in prompt.eos_ids:
                break
            tokens.append(token)
            rows = torch.cat([rows, model.llm.embed(torch.tensor([token]))])
            blocks.append(-1)
    return prompt.tokenizer.decode(tokens)
