"""Dense supervision of the language model: what is there now, and what no longer is.

Counts went wrong where a thing had left: one that stands still and one that is gone are both
silent, and the one cell that shows its place empty again is easily missed. So each vision token on
a bare place tells which thing was seen there last and whether that is gone from the picture, and
each frame's end marker how many things there are and in which colours. A question then needs one
look at the newest marker. Things go by their colours, which differ within a clip: by their kinds,
five times as many, nothing was learned in ten minutes.

Shape letters: B clips, T shown frames, F = B T, M things, C cells, K vision tokens, D width of the
LLM, N colours.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_vlm.world.scenes import COLOUR_NAMES, Scenes
from edge_vlm.world.splits import MOST_THINGS
from edge_vlm_training.objective.probes.dense import from_zero, things_at
from edge_vlm_training.objective.probes.timeline import UNKNOWN

NOTHING = len(COLOUR_NAMES)
_BARE = 1e-6
"""A place of which a thing covers less than `covered` but more than this is neither."""
_NOTHING_WEIGHT = 0.1
"""Most places never held a thing."""
_SIZES = (MOST_THINGS + 1, len(COLOUR_NAMES)), (len(COLOUR_NAMES) + 1, 2)


@dataclasses.dataclass(frozen=True)
class Present:
    """What is there after each of F frames, and what was there in each of K cells."""

    count: Tensor
    """i64 [F]."""
    colours: Tensor
    """f32 [F, N]: 1 for those that are there."""
    last: Tensor
    """i64 [K]: colour of the thing last seen in a cell that is bare now, NOTHING, or UNKNOWN."""
    gone: Tensor
    """i64 [K]: 1 if that thing is nowhere any more, 0 if it is elsewhere, or UNKNOWN."""

    def at(self, index_K: Tensor) -> Present:
        """Labels of the chosen cells; those of frames stay."""
        return dataclasses.replace(self, last=self.last[index_K], gone=self.gone[index_K])


def present(
    scenes: Scenes, owner: Tensor, grid: int, covered: float, shown: npt.NDArray[np.integer]
) -> Present:
    """Labels of the `shown` frames, K = B T C; `owner` i8 [B, frames, H, W] as in `things_at`."""
    owner, visible = owner[:, shown], torch.from_numpy(scenes.visible[:, shown])
    colour = torch.from_numpy(scenes.colour[:, shown])
    batch, num_frames, slots = visible.shape
    thing, empty = things_at(owner, slots, grid, covered)
    _, bare = things_at(owner, slots, grid, _BARE)
    held = thing.masked_fill(empty, -1).view(batch, num_frames, -1)
    seen = [held[:, 0]]
    for row_BC in held.unbind(1)[1:]:
        seen.append(torch.where(row_BC >= 0, row_BC, seen[-1]))
    last = torch.stack(seen, 1)
    never, taken, last = last < 0, ~bare.view_as(last), last.clamp(min=0)
    colours = torch.zeros(batch, num_frames, len(COLOUR_NAMES))
    colours.scatter_reduce_(2, colour, visible.float(), "amax")
    return Present(
        count=visible.sum(-1).flatten(),
        colours=colours.flatten(0, 1),
        last=colour.gather(2, last)
        .masked_fill(never, NOTHING)
        .masked_fill(taken, UNKNOWN)
        .flatten(),
        gone=(~visible).gather(2, last).long().masked_fill(never | taken, UNKNOWN).flatten(),
    )


class PresentHead(nn.Module):
    """Normed linear probes of frame ends and of vision tokens; thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frame, self.cell = (nn.Linear(width, sum(sizes)) for sizes in _SIZES)
        for out in (self.frame, self.cell):
            from_zero(out)

    def forward(self, ends_FD: Tensor, tokens_KD: Tensor) -> tuple[Tensor, ...]:
        """Logits of count and colours there, of the colour last seen and whether it is gone."""
        outputs: list[Tensor] = []
        pairs = ((self.frame, ends_FD), (self.cell, tokens_KD))
        for (out, x), sizes in zip(pairs, _SIZES, strict=True):
            outputs += out(F.rms_norm(x, x.shape[-1:])).float().split(sizes, -1)
        return tuple(outputs)


def present_loss(outputs: tuple[Tensor, ...], truth: Present) -> tuple[Tensor, dict[str, float]]:
    """Sum of the entropies; how much of each is right beside it."""
    count, colours, last, gone = outputs
    emptied = truth.gone != UNKNOWN
    places = emptied.sum().clamp(min=1)
    weight = torch.ones(last.shape[-1])
    weight[NOTHING] = _NOTHING_WEIGHT
    total = weight[truth.last[truth.last != UNKNOWN]].sum().clamp(min=1)
    of_last = F.cross_entropy(last, truth.last, weight, ignore_index=UNKNOWN, reduction="sum")
    of_gone = F.cross_entropy(gone, truth.gone, ignore_index=UNKNOWN, reduction="sum")
    of_colours = F.binary_cross_entropy_with_logits(colours, truth.colours)
    loss = F.cross_entropy(count, truth.count) + of_colours + of_last / total + of_gone / places
    return loss, {
        "counted": (count.argmax(-1) == truth.count).float().mean().item(),
        "colours": ((colours > 0) == (truth.colours > 0)).all(-1).float().mean().item(),
        "last": (((last.argmax(-1) == truth.last) & emptied).sum() / places).item(),
        "gone": (((gone.argmax(-1) == truth.gone) & emptied).sum() / places).item(),
    }
