"""Dense supervision of the vision side: each place names what covers it.

The language loss is a weak teacher for fresh vision weights (names stay at chance for minutes), so
the ViT first learns kind, colour and centre of the thing under every patch of single frames. Later
the same probe on the connector's features keeps it from losing what the ViT knows: without it
the centre could be read from the ViT but hardly from the features (an error of 0.05 of the
picture's side against 0.12), and questions about place and direction stood still.

Shape letters: F frames, N places (patches or cells) per frame, M things per frame, K chosen places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_vlm.model.vit import VisionTransformer
from edge_vlm.world.scenes import COLOUR_NAMES, Scenes
from edge_vlm.world.sprites import KINDS

COVERED = 0.2
"""Share of a patch that a thing must cover to be its label."""
CELL_COVERED = 0.1
"""The same for a cell."""
_BACKGROUND_WEIGHT = 0.05
_CENTRE_WEIGHT = 60.0
"""A squared error of positions in 0..1 is small beside an entropy."""


@dataclasses.dataclass(frozen=True)
class DenseLabels:
    """Per place [K]: kind and colour (the last class is background), centre [K, 2] in 0..1."""

    kind: Tensor
    colour: Tensor
    centre: Tensor

    def at(self, index: Tensor) -> DenseLabels:
        """Labels of the chosen places."""
        return DenseLabels(self.kind[index], self.colour[index], self.centre[index])


def things_at(owner: Tensor, slots: int, grid: int, covered: float) -> tuple[Tensor, Tensor]:
    """The thing that covers most of each place, and whether it covers too little, both [F, N].

    `owner` i8 [B, T, H, W] is the thing at each pixel, `slots` the number of things M.
    """
    pixels = owner.flatten(0, 1)
    share = torch.stack([(pixels == m).float() for m in range(slots)], 1)
    share = F.avg_pool2d(share, pixels.shape[-1] // grid).flatten(2)  # [F, M, N]
    most, thing = share.max(1)
    return thing, most < covered


def dense_labels(scenes: Scenes, owner: Tensor, grid: int, covered: float) -> DenseLabels:
    """Labels of all places, K = B T grid^2; `owner` as in `things_at`."""
    slots, num_frames = scenes.kind.shape[1], scenes.num_frames
    thing, empty = things_at(owner, slots, grid, covered)

    def pick(values_FM: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values_FM)).gather(1, thing)

    kind = pick(np.repeat(scenes.kind, num_frames, 0)).masked_fill(empty, len(KINDS))
    colour = pick(scenes.colour.reshape(-1, slots)).masked_fill(empty, len(COLOUR_NAMES))
    centre = torch.stack([pick(v.reshape(-1, slots)) for v in (scenes.x, scenes.y)], -1)
    return DenseLabels(kind.flatten(), colour.flatten(), centre.flatten(0, 1))


def from_zero(layer: nn.Linear) -> None:
    """A fresh probe then pulls on trained features only as far as it has learned."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


class DenseHead(nn.Module):
    """A linear probe; thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = (len(KINDS) + 1, len(COLOUR_NAMES) + 1, 2)
        self.out = nn.Linear(width, sum(self.sizes))
        from_zero(self.out)

    def forward(self, x_KD: Tensor) -> tuple[Tensor, ...]:
        return torch.split(self.out(x_KD).float(), list(self.sizes), -1)


class WordHead(nn.Module):
    """A probe whose classes are the language model's own words for kinds and colours.

    It pulls a thing's feature and the embedding of its name together, so that a question's word
    finds the vision tokens that it names by likeness. Only the rest is thrown away after training.
    """

    def __init__(self, width: int, kind_ids: Sequence[int], colour_ids: Sequence[int]) -> None:
        super().__init__()
        self.words = [list(kind_ids), list(colour_ids)]
        self.rest = nn.Linear(width, len(self.words) + 2)
        """No kind, no colour, and the centre."""
        from_zero(self.rest)

    def forward(self, x_KE: Tensor, embed_VE: Tensor) -> tuple[Tensor, ...]:
        x = F.rms_norm(x_KE, x_KE.shape[-1:])
        none_kind, none_colour, centre = self.rest(x).split((1, 1, 2), -1)
        kind, colour = (x @ embed_VE[ids].T for ids in self.words)
        kind, colour = torch.cat([kind, none_kind], -1), torch.cat([colour, none_colour], -1)
        return kind.float(), colour.float(), centre.float()


def whole_vit(vit: VisionTransformer, pixels_FNP: Tensor) -> Tensor:
    """Every block on every patch: [F N, D]."""
    x = vit.embed(pixels_FNP)
    for block in vit.blocks:
        x = block(x)
    return x.flatten(0, 1)


def dense_loss(outputs: tuple[Tensor, ...], labels: DenseLabels) -> tuple[Tensor, dict[str, float]]:
    """Sum of both cross-entropies and the centre's squared error; metrics beside it."""
    kind, colour, centre = outputs
    seen = labels.kind < len(KINDS)
    weight = torch.where(seen, 1.0, _BACKGROUND_WEIGHT)
    total = weight.sum()

    def entropy(logits: Tensor, target: Tensor) -> Tensor:
        return (F.cross_entropy(logits, target, reduction="none") * weight).sum() / total

    things = seen.sum().clamp(min=1)
    error = ((centre - labels.centre).square().sum(-1) * seen).sum() / things
    loss = entropy(kind, labels.kind) + entropy(colour, labels.colour) + _CENTRE_WEIGHT * error
    right_kind = ((kind.argmax(-1) == labels.kind) & seen).sum() / things
    right_colour = ((colour.argmax(-1) == labels.colour) & seen).sum() / things
    return loss, {
        "kind": right_kind.item(),
        "colour": right_colour.item(),
        "centre_rms": error.sqrt().item(),
    }
