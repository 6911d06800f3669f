"""Dense supervision of the language model: what is there now, and what no longer is.

Counts went wrong where a thing had left: one that stands still and one that is gone are both
silent, and the one cell that shows its place empty again is easily missed. So each vision token on
a bare place tells which thing was seen there last and whether that is gone from the picture, and
each frame's end marker how many things there are, of which kinds and colours. A question then needs
one look at the newest marker.

Shape letters: B clips, T shown frames, F = B T, M things, C cells, K vision tokens, D width of the
LLM, N kinds and colours.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_vlm_training.dense import things_at
from edge_vlm_training.splits import MOST_THINGS
from edge_vlm_training.sprites import KINDS
from edge_vlm_training.timeline import UNKNOWN
from edge_vlm_training.world import COLOUR_NAMES, Scenes

_BARE = 1e-6
"""A place of which a thing covers less than `covered` but more than this is neither."""
_NOTHING = len(KINDS)
_NOTHING_WEIGHT = 0.1
"""Most places never held a thing."""
_LISTED_WEIGHT = 0.25
"""The entropies of all names are summed, beside one of the count."""
_RARE = -3.0


@dataclasses.dataclass(frozen=True)
class Present:
    """What is there after each of F frames, and what was there in each of K cells."""

    count: Tensor
    """i64 [F]."""
    listed: Tensor
    """f32 [F, N]: 1 for the kinds and colours that are there."""
    last: Tensor
    """i64 [K]: the kind last seen in a cell that is bare now, one more if none was; or UNKNOWN."""
    gone: Tensor
    """i64 [K]: 1 if that thing is nowhere any more, 0 if it is elsewhere; or UNKNOWN."""

    def at(self, index_K: Tensor) -> Present:
        """Labels of the chosen cells; those of frames stay."""
        return dataclasses.replace(self, last=self.last[index_K], gone=self.gone[index_K])


def present(
    scenes: Scenes, owner: Tensor, grid: int, covered: float, shown: npt.NDArray[np.integer]
) -> Present:
    """Labels of the `shown` frames, K = B T C; `owner` i8 [B, frames, H, W] as in `things_at`."""
    owner, visible = owner[:, shown], torch.from_numpy(scenes.visible[:, shown])
    batch, num_frames, slots = visible.shape
    thing, empty = things_at(owner, slots, grid, covered)
    _, bare = things_at(owner, slots, grid, _BARE)
    held = thing.masked_fill(empty, -1).view(batch, num_frames, -1)
    seen = [held[:, 0]]
    for row_BC in held.unbind(1)[1:]:
        seen.append(torch.where(row_BC >= 0, row_BC, seen[-1]))
    last = torch.stack(seen, 1)  # [B, T, C]
    never = last < 0
    owner_of = last.clamp(min=0)
    kind = torch.from_numpy(scenes.kind)[:, None].expand(-1, num_frames, -1).gather(2, owner_of)
    gone = (~visible).gather(2, owner_of).long()
    taken = ~bare.view_as(last)
    kinds = scenes.kind[:, None].repeat(num_frames, 1)
    names = np.concatenate([kinds, scenes.colour[:, shown] + len(KINDS)], -1)
    index = torch.from_numpy(names).clamp(min=0)  # of slots without a thing, never visible
    listed = torch.zeros(batch, num_frames, len(KINDS) + len(COLOUR_NAMES))
    listed.scatter_reduce_(2, index, torch.cat([visible, visible], -1).float(), "amax")
    return Present(
        count=visible.sum(-1).flatten(),
        listed=listed.flatten(0, 1),
        last=kind.masked_fill(never, _NOTHING).masked_fill(taken, UNKNOWN).flatten(),
        gone=gone.masked_fill(never | taken, UNKNOWN).flatten(),
    )


class PresentHead(nn.Module):
    """Normed linear read-outs of frame ends and of vision tokens; thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = (MOST_THINGS + 1, len(KINDS) + len(COLOUR_NAMES))
        self.frame = nn.Linear(width, sum(self.sizes))
        self.cell = nn.Linear(width, len(KINDS) + 1 + 2)
        for out in (self.frame, self.cell):
            nn.init.zeros_(out.weight)
            nn.init.zeros_(out.bias)
        nn.init.constant_(self.frame.bias[self.sizes[0] :], _RARE)

    def forward(self, ends_FD: Tensor, tokens_KD: Tensor) -> tuple[Tensor, ...]:
        """Logits of count, names, kind last seen, and whether it is gone."""
        count, listed = self._read(self.frame, ends_FD).split(self.sizes, -1)
        last, gone = self._read(self.cell, tokens_KD).split((len(KINDS) + 1, 2), -1)
        return count, listed, last, gone

    def _read(self, out: nn.Linear, x: Tensor) -> Tensor:
        return out(F.rms_norm(x, x.shape[-1:])).float()


def present_loss(outputs: tuple[Tensor, ...], truth: Present) -> tuple[Tensor, dict[str, float]]:
    """Sum of the entropies; how much of each is right beside it."""
    count, listed, last, gone = outputs
    names = F.binary_cross_entropy_with_logits(listed, truth.listed, reduction="sum") / len(listed)
    loss = F.cross_entropy(count, truth.count) + _LISTED_WEIGHT * names
    weight = torch.ones(last.shape[-1])
    weight[_NOTHING] = _NOTHING_WEIGHT
    emptied = truth.gone != UNKNOWN
    places = emptied.sum().clamp(min=1)
    known = truth.last != UNKNOWN
    total = weight[truth.last[known]].sum().clamp(min=1)
    by_kind = F.cross_entropy(last, truth.last, weight, ignore_index=UNKNOWN, reduction="sum")
    by_gone = F.cross_entropy(gone, truth.gone, ignore_index=UNKNOWN, reduction="sum")
    loss = loss + by_kind / total + by_gone / places
    return loss, {
        "counted": (count.argmax(-1) == truth.count).float().mean().item(),
        "listed": ((listed > 0) == (truth.listed > 0)).all(-1).float().mean().item(),
        "last": (((last.argmax(-1) == truth.last) & emptied).sum() / places).item(),
        "gone": (((gone.argmax(-1) == truth.gone) & emptied).sum() / places).item(),
    }
