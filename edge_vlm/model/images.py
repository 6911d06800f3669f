"""Features of still images at full detail (`edge_vlm.pixels.stills` makes what goes in).

Shape letters: C crops, N patches per crop, T image tokens, W patches per pooling window, D ViT
width, E language width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edge_vlm.model.video_lm import VideoLM


def encode_images(model: VideoLM, pixels_CNP: Tensor, windows_TW: Tensor) -> Tensor:
    """One feature per image token, [T, E], to be added to the embeddings of the patch tokens.

    `windows` numbers the patches of each token through all crops; negative numbers are padding.
    Every block sees whole crops without the scorer's bias, also in a model with a scorer: the
    published STTS code prunes and biases video only.
    """
    x_CND = model.vit.embed(pixels_CNP)
    taps = {}
    for i in range(model.cfg.vision.num_layers):
        x_CND = taps[i] = model.vit.block(i)(x_CND)
    joined = torch.cat([taps[i] for i in model.cfg.vision.feature_layers], -1)
    patches_TWD = joined.flatten(0, 1)[windows_TW.clamp(min=0)]
    out: Tensor = model.connector(patches_TWD, windows_TW >= 0)
    return out
