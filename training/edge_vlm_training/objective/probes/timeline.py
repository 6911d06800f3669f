"""Dense supervision of the language model: each vision token tells its thing's story so far.

Which way a thing moves and when it appeared lie in no single frame: the first blocks have to match
a token with the thing's earlier ones and with its frame's stamp. One answer token per question is a
weak teacher for that (both kinds stood still at 70 % for half an hour), a label on every vision
token a strong one. Behind it a question needs one look at any token of its thing.

Shape letters: B clips, T frames, M things, C cells, K vision tokens, D width of the LLM.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_vlm.world.paths import DIRECTIONS
from edge_vlm.world.scenes import UNCLEAR, Scenes
from edge_vlm_training.objective.probes.dense import from_zero, things_at

UNKNOWN = -100
"""A label that cannot be told from what was shown; cross-entropy leaves it out."""
_NO_TENS = 10
_SIZES = (len(DIRECTIONS), 11, 10, 10)
"""Heading; tens (or none), ones and tenths of the second in which the thing appeared."""
_TRAVEL_WEIGHT = 60.0
"""A squared error of positions in 0..1 is small beside an entropy."""


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What each of K cells' things have done so far."""

    classes: Tensor
    """i64 [K, 4] in the order of `_SIZES`, UNKNOWN where nothing is to be told."""
    travel: Tensor
    """f32 [K, 2]: the way from where the thing appeared to where it is, of the picture's side.

    A target that is linear in two places the model can look up; from headings alone it learned
    nothing in ten minutes.
    """

    def at(self, index_K: Tensor) -> Timeline:
        """Labels of the chosen cells."""
        return Timeline(self.classes[index_K], self.travel[index_K])


def timeline(scenes: Scenes, owner: Tensor, grid: int, covered: float, forgotten: int) -> Timeline:
    """Labels of every cell, K = B T C; `owner` i8 [B, T, H, W] is the thing at each pixel.

    Frames 1 to `forgotten` are not shown: what happened in them cannot be told.
    """
    num_frames = scenes.num_frames
    now = np.arange(num_frames)[:, None]
    enter = scenes.enter[:, None]
    shown_before = (now > enter) & ((enter > forgotten) | (now > forgotten + 1) | (forgotten == 0))
    is_clear = scenes.direction != UNCLEAR
    heading = np.where(shown_before & is_clear, scenes.direction, UNKNOWN)
    known = ((enter == 0) | (enter > forgotten)) & scenes.told[:, None]
    times = scenes.times_s
    first = np.take_along_axis(times, np.minimum(scenes.enter, num_frames - 1), 1)
    tenths = np.rint(first * 10).astype(np.int64)[:, None]
    tens = np.where(tenths < 100, _NO_TENS, tenths // 100)
    digits = [np.where(known, d, UNKNOWN) for d in (tens, tenths // 10 % 10, tenths % 10)]
    classes = np.stack(np.broadcast_arrays(heading, *digits), -1)  # [B, T, M, 4]
    places = np.stack([scenes.x, scenes.y], -1)  # [B, T, M, 2]
    at_first = np.minimum(scenes.enter, num_frames - 1)[:, None, :, None]
    travel = places - np.take_along_axis(places, at_first, 1)
    thing, empty = things_at(owner, classes.shape[2], grid, covered)  # [F, C]

    def pick(values_BTM_: np.ndarray) -> Tensor:
        flat = torch.from_numpy(np.ascontiguousarray(values_BTM_)).flatten(0, 1)
        return flat.gather(1, thing[..., None].expand(-1, -1, flat.shape[-1])).flatten(0, 1)

    return Timeline(pick(classes).masked_fill(empty.flatten()[:, None], UNKNOWN), pick(travel))


class TimelineHead(nn.Module):
    """A normed linear probe; thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, sum(_SIZES) + 2)
        from_zero(self.out)

    def forward(self, x_KD: Tensor) -> tuple[Tensor, ...]:
        told = self.out(F.rms_norm(x_KD, x_KD.shape[-1:]))
        return torch.split(told.float(), [*_SIZES, 2], -1)


def timeline_loss(outputs: tuple[Tensor, ...], truth: Timeline) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropies and the travel's squared error; how much of each is right beside it."""
    *parts, travel = outputs
    moving = truth.classes[:, 0] != UNKNOWN
    error = ((travel - truth.travel).square().sum(-1) * moving).sum() / moving.sum().clamp(min=1)
    loss = _TRAVEL_WEIGHT * error
    right = []
    for part, label in zip(parts, truth.classes.unbind(-1), strict=True):
        told = label != UNKNOWN
        count = told.sum().clamp(min=1)
        loss = loss + F.cross_entropy(part, label, ignore_index=UNKNOWN, reduction="sum") / count
        right.append((part.argmax(-1) == label) | ~told)
    timed = truth.classes[:, 1] != UNKNOWN

    def share(right: Tensor, of: Tensor) -> float:
        return ((right & of).sum() / of.sum().clamp(min=1)).item()

    return loss, {
        "heading": share(right[0], moving),
        "appeared": share(right[1] & right[2] & right[3], timed),
        "travel_rms": error.sqrt().item(),
    }
