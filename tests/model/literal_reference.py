"""The published STTS vision side (arXiv 2603.18004), written out the way it computes: survivors
packed into rows of one frame's length under dense masks, scattered back, connector on every cell.

Shares weights with the model and nothing else. Shape letters: F frames, N patches per frame, C
cells per frame, B rows of the packing, W width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from edge_vlm.model.layers import CrossAttention
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.model.vit import ViTBlock


@dataclasses.dataclass(frozen=True)
class Literal:
    scores_FC: Tensor
    kept_FC: Tensor
    features: Tensor
    hidden: dict[int, Tensor]
    num_rows: int
    num_refilled: int


def attention(part: CrossAttention, x: Tensor, y: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """x [..., q, W] attends to y [..., k, W]; the bias broadcasts to [..., heads, q, k]."""
    q, k, v = (
        f(z).unflatten(-1, (part.num_heads, part.head_dim)).transpose(-2, -3)
        for f, z in ((part.q, x), (part.k, y), (part.v, y))
    )
    scores = q @ k.transpose(-1, -2) / math.sqrt(part.head_dim) + bias
    out: Tensor = part.o((scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2))
    return out


def block(part: ViTBlock, x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    y = part.norm1(x)
    x = x + attention(part.attn, y, y, bias)
    out: Tensor = x + part.fc2(gelu(part.fc1(part.norm2(x)), approximate="tanh"))
    return out


def windows(x_FNW: Tensor) -> Tensor:
    """[F, C, 9, W], cells and patches row-major."""
    grid = math.isqrt(x_FNW.shape[1])
    x = x_FNW.unflatten(1, (grid // 3, 3, grid // 3, 3))
    out: Tensor = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return out


def to_patches(per_cell_FC: Tensor) -> Tensor:
    """Each cell's value repeated 3x3: [F, grid, grid]."""
    side = math.isqrt(per_cell_FC.shape[1])
    cells = per_cell_FC.unflatten(1, (side, side))
    out: Tensor = cells.repeat_interleave(3, 1).repeat_interleave(3, 2)
    return out


def pool(part: CrossAttention, patches_XCxW: Tensor) -> Tensor:
    return attention(part, patches_XCxW.mean(2, keepdim=True), patches_XCxW).squeeze(2)


def first_fit_descending(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for frame in sorted(range(len(sizes)), key=lambda i: sizes[i], reverse=True):
        if sizes[frame]:
            fits = [row for row in rows if sum(sizes[i] for i in row) + sizes[frame] <= capacity]
            if fits:
                fits[0].append(frame)
            else:
                rows.append([frame])
    return rows


def encode(
    model: VideoLM,
    pixels_FNP: Tensor,
    frames_per_clip: Sequence[int],
    removed: float,
    previous_across_clips: bool = False,
) -> Literal:
    cfg, scorer = model.cfg, model.scorer
    assert cfg.scorer is not None
    assert scorer is not None
    num_frames, num_patches = pixels_FNP.shape[:2]
    num_cells, prune_at = num_patches // 9, cfg.scorer.prune_at
    starts = [sum(frames_per_clip[:i]) for i in range(len(frames_per_clip))]

    hidden: dict[int, Tensor] = {}
    x = model.vit.patch_embed(pixels_FNP) + model.vit.pos_embed
    for i in range(prune_at + 1):
        x = hidden[i] = block(model.vit.block(i), x)

    pooled = pool(scorer.pool, windows(x))
    previous = torch.cat([torch.zeros_like(pooled[:1]), pooled[:-1]])
    if not previous_across_clips:
        alone = torch.ones(num_frames, 1, 1)
        alone[starts] = 0.0
        previous = previous * alone
    y = torch.cat([previous, pooled], -1)
    scores = scorer.fc3(silu(scorer.fc2(silu(scorer.fc1(y))))).squeeze(-1).sigmoid()

    kept = torch.ones(num_frames, num_cells, dtype=torch.bool)
    for start, frames in zip(starts, frames_per_clip, strict=True):
        rank = scores.detach()[start : start + frames].clone()
        rank[0] = 100.0
        count = int(num_cells * removed * frames)
        gone = rank.flatten().argsort(stable=True)[:count]
        kept[start + gone // num_cells, gone % num_cells] = False

    rows_of_patches = to_patches(scores)
    low = rows_of_patches.min(-1, keepdim=True).values
    high = rows_of_patches.max(-1, keepdim=True).values
    least = math.exp(-2)
    weight = least + (1 - least) * (rows_of_patches - low) / (high - low + 1e-6)
    is_first = torch.zeros(num_frames, 1, 1, dtype=torch.bool)
    is_first[starts] = True
    weight = torch.where(is_first, 1.0, weight)
    bias = weight.log().flatten(1)[:, None, None]
    x = hidden[prune_at + 1] = block(model.vit.block(prune_at + 1), x, bias)

    alive = to_patches(kept.float()).flatten(1).bool()
    rows = first_fit_descending(alive.sum(1).tolist(), num_patches)
    packed = torch.zeros(len(rows), num_patches, x.shape[-1])
    owner = torch.full((len(rows), num_patches), -1)
    slots: dict[int, tuple[int, Tensor]] = {}
    for row, frames_in_row in enumerate(rows):
        start = 0
        for frame in frames_in_row:
            seen = alive[frame]
            if len(frames_in_row) == 1:
                seen = torch.ones_like(seen)  # refilled
            places = seen.nonzero().squeeze(1)
            stop = start + len(places)
            packed = packed.index_put(
                (torch.tensor(row), torch.arange(start, stop)), x[frame, places]
            )
            owner[row, start:stop] = frame
            is_alive = alive[frame, places]
            slots[frame] = (row, (torch.arange(start, stop))[is_alive])
            start = stop
    # Padding sees padding, so that no row of the softmax is empty; nobody looks at it.
    sees = owner[:, :, None] == owner[:, None, :]
    mask = torch.where(sees, 0.0, -math.inf)[:, None]
    for i in range(prune_at + 2, cfg.vision.num_layers):
        packed = block(model.vit.block(i), packed, mask)
        full = torch.zeros_like(x)
        for frame, (row, places) in slots.items():
            mine = alive[frame].nonzero().squeeze(1)
            full = full.index_put((torch.tensor(frame), mine), packed[row, places])
        hidden[i] = full

    joined = torch.cat([hidden[i] for i in cfg.vision.feature_layers], -1)
    cells = pool(model.connector.pool, windows(joined))
    project = model.connector.project
    features = project.down(silu(project.gate(cells)) * project.up(cells))[kept]
    refilled = sum(len(row) == 1 and not bool(alive[row[0]].all()) for row in rows)
    return Literal(scores, kept, features, hidden, len(rows), refilled)
