"""Dense pre-training of the vision transformer: each patch names what covers it.

The language loss is a weak teacher for fresh vision weights (names stay at chance for minutes), so
the ViT first learns kind, colour and centre of the thing under every patch of single frames.

Shape letters: F frames, N patches per frame, M things per frame.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_vlm.config import VisionConfig
from edge_vlm.model.vit import VisionTransformer
from edge_vlm_training.sprites import KINDS
from edge_vlm_training.world import COLOUR_NAMES, Scenes

COVERED = 0.2
"""Share of a patch that a thing must cover to be its label."""
_BACKGROUND_WEIGHT = 0.05


@dataclasses.dataclass(frozen=True)
class DenseLabels:
    """Per patch [F, N]: kind and colour (last class: background), centre [F, N, 2] in 0..1."""

    kind: Tensor
    colour: Tensor
    centre: Tensor


def dense_labels(scenes: Scenes, owner: Tensor, cfg: VisionConfig) -> DenseLabels:
    """Labels of clips of one frame; `owner` i8 [F, 1, H, W] is the thing at each pixel, -1 none."""
    slots = scenes.kind.shape[1]
    pixels = owner[:, 0]
    share = torch.stack([(pixels == m).float() for m in range(slots)], 1)
    share = F.avg_pool2d(share, pixels.shape[-1] // cfg.patch_grid).flatten(2)  # [F, M, N]
    most, thing = share.max(1)
    empty = most < COVERED

    def pick(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).gather(1, thing)

    kind = pick(scenes.kind).masked_fill(empty, len(KINDS))
    colour = pick(scenes.colour[:, 0]).masked_fill(empty, len(COLOUR_NAMES))
    centre = torch.stack([pick(scenes.x[:, 0]), pick(scenes.y[:, 0])], -1)
    return DenseLabels(kind, colour, centre)


class DenseHead(nn.Module):
    """A linear read-out on the last block; thrown away afterwards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = (len(KINDS) + 1, len(COLOUR_NAMES) + 1, 2)
        self.out = nn.Linear(width, sum(self.sizes))

    def forward(self, vit: VisionTransformer, pixels_FNP: Tensor) -> tuple[Tensor, ...]:
        x = vit.embed(pixels_FNP)
        for block in vit.blocks:
            x = block(x)
        return self.out(x).float().split(self.sizes, -1)


def dense_loss(outputs: tuple[Tensor, ...], labels: DenseLabels) -> tuple[Tensor, dict[str, float]]:
    """Sum of both cross-entropies and the centre's squared error; metrics beside it."""
    kind, colour, centre = outputs
    seen = labels.kind < len(KINDS)
    weight = torch.where(seen, 1.0, _BACKGROUND_WEIGHT)
    total = weight.sum()

    def entropy(logits: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        return (losses * weight.flatten()).sum() / total

    error = (centre - labels.centre).square().sum(-1)[seen].mean()
    loss = entropy(kind, labels.kind) + entropy(colour, labels.colour) + 10 * error
    right_kind = (kind.argmax(-1) == labels.kind)[seen].float().mean()
    right_colour = (colour.argmax(-1) == labels.colour)[seen].float().mean()
    return loss, {
        "loss": loss.item(),
        "kind": right_kind.item(),
        "colour": right_colour.item(),
        "centre_rms": error.sqrt().item(),
    }
