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

from edge_vlm_training.dense import things_at
from edge_vlm_training.paths import DIRECTIONS
from edge_vlm_training.world import Scenes

UNKNOWN = -100
"""A label that cannot be told from what was shown; cross-entropy leaves it out."""
_NO_TENS = 10
_SIZES = (len(DIRECTIONS), 11, 10, 10)
"""Heading; tens (or none), ones and tenths of the second in which the thing appeared."""


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Labels i64 [..., 4] in the order of `_SIZES`, UNKNOWN where nothing is to be told."""

    labels: Tensor

    def at(self, index_K: Tensor) -> Tensor:
        """Labels [K, 4] of the chosen cells, counted over all frames and clips."""
        return self.labels.flatten(0, -2)[index_K]


def timeline(scenes: Scenes, owner: Tensor, grid: int, covered: float, forgotten: int) -> Timeline:
    """Labels of every cell, [B T C, 4]; `owner` i8 [B, T, H, W] is the thing at each pixel.

    Frames 1 to `forgotten` are not shown: what happened in them cannot be told.
    """
    num_frames = scenes.num_frames
    now = np.arange(num_frames)[:, None]
    enter = scenes.enter[:, None]
    shown_before = (now > enter) & ((enter > forgotten) | (now > forgotten + 1) | (forgotten == 0))
    heading = np.where(shown_before, scenes.direction[:, None], UNKNOWN)
    known = (enter == 0) | (enter > forgotten)
    times = scenes.times_s()
    first = np.take_along_axis(times, np.minimum(scenes.enter, num_frames - 1), 1)
    tenths = np.rint(first * 10).astype(np.int64)[:, None]
    tens = np.where(tenths < 100, _NO_TENS, tenths // 100)
    digits = [np.where(known, d, UNKNOWN) for d in (tens, tenths // 10 % 10, tenths % 10)]
    labels = np.stack(np.broadcast_arrays(heading, *digits), -1)  # [B, T, M, 4]
    thing, empty = things_at(owner, labels.shape[2], grid, covered)  # [F, C]
    flat = torch.from_numpy(np.ascontiguousarray(labels)).flatten(0, 1)  # [F, M, 4]
    picked = flat.gather(1, thing[..., None].expand(-1, -1, flat.shape[-1]))
    return Timeline(picked.masked_fill(empty[..., None], UNKNOWN))


class TimelineHead(nn.Module):
    """A normed linear read-out; thrown away after training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, sum(_SIZES))
        nn.init.zeros_(self.out.weight)

    def forward(self, x_KD: Tensor) -> Tensor:
        return self.out(F.rms_norm(x_KD, x_KD.shape[-1:])).float()


def timeline_loss(logits: Tensor, labels_K4: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Sum of the cross-entropies; share of headings and of whole times that are right."""
    parts = logits.split(_SIZES, -1)
    loss = logits.sum() * 0.0
    right = []
    for part, label in zip(parts, labels_K4.unbind(-1), strict=True):
        told = label != UNKNOWN
        count = told.sum().clamp(min=1)
        loss = loss + F.cross_entropy(part, label, ignore_index=UNKNOWN, reduction="sum") / count
        right.append((part.argmax(-1) == label) | ~told)
    told, timed = labels_K4[:, 0] != UNKNOWN, labels_K4[:, 1] != UNKNOWN

    def share(right: Tensor, of: Tensor) -> float:
        return ((right & of).sum() / of.sum().clamp(min=1)).item()

    return loss, {
        "heading": share(right[0], told),
        "appeared": share(right[1] & right[2] & right[3], timed),
    }
