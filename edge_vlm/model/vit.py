"""The vision transformer, cut where the cells are dropped, and its ragged attention.

Shape letters: F frames, N patches per frame, C cells per frame, G kept cells over all frames,
P = 9 G kept patches, D width.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_vlm.config import CELL, VisionConfig
from edge_vlm.model.layers import CrossAttention, attend

MASKED = -30_000.0
"""Additive bias of a pair that must not attend: finite, so fp16-safe and never a NaN row."""


def cell_patch_table(grid: int) -> Tensor:
    """Patch indices of every cell, [C, 9], both row-major, for a `grid` x `grid` patch map."""
    patches = torch.arange(grid * grid).view(grid // CELL, CELL, grid // CELL, CELL)
    return patches.permute(0, 2, 1, 3).reshape(-1, CELL * CELL)


@dataclasses.dataclass(frozen=True)
class Ragged:
    """How the tokens [P, ...] of several frames, laid end to end, attend only inside their frame.

    Either `groups` of (number of frames, tokens per frame) that follow each other, which computes
    nothing in vain, or a block-diagonal additive `bias` [P, P], which needs no host-side sizes and
    so can be exported.
    """

    groups: tuple[tuple[int, int], ...] | None = None
    bias: Tensor | None = None

    def attend(self, q_PHd: Tensor, k_PHd: Tensor, v_PHd: Tensor) -> Tensor:
        """Returns [P, H, d]."""
        if self.groups is None:
            return attend(q_PHd[None], k_PHd[None], v_PHd[None], self.bias)[0]
        sizes = [n * length for n, length in self.groups]
        parts = [
            attend(*(x.view(n, length, *x.shape[1:]) for x in qkv)).flatten(0, 1)
            for (n, length), *qkv in zip(
                self.groups,
                q_PHd.split(sizes),
                k_PHd.split(sizes),
                v_PHd.split(sizes),
                strict=True,
            )
        ]
        return torch.cat(parts)


class ViTBlock(nn.Module):
    """Pre-LayerNorm block with a tanh-GELU MLP."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.width, eps=cfg.norm_eps)
        self.attn = CrossAttention(cfg.width, cfg.num_heads, cfg.head_dim, cfg.width)
        self.norm2 = nn.LayerNorm(cfg.width, eps=cfg.norm_eps)
        self.fc1 = nn.Linear(cfg.width, cfg.mlp_width)
        self.fc2 = nn.Linear(cfg.mlp_width, cfg.width)

    def mlp(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))

    def forward(self, x_FND: Tensor, key_bias_FN: Tensor | None = None) -> Tensor:
        """Whole frames; the bias is added to every query's score of that key."""
        y = self.norm1(x_FND)
        bias = None if key_bias_FN is None else key_bias_FN[:, None, None, :]
        x_FND = x_FND + self.attn(y, y, bias)
        return x_FND + self.mlp(x_FND)

    def forward_ragged(self, x_PD: Tensor, layout: Ragged) -> Tensor:
        """Frames of unequal length, laid end to end."""
        attn, y = self.attn, self.norm1(x_PD)
        q, k, v = (attn.heads(f(y)) for f in (attn.q, attn.k, attn.v))
        x_PD = x_PD + attn.o(layout.attend(q, k, v).flatten(-2))
        return x_PD + self.mlp(x_PD)


class VisionTransformer(nn.Module):
    """Patch embedding, learned positions and the blocks; the callers choose which blocks run."""

    cell_patches_C9: Tensor

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(cfg.patch_dim, cfg.width)
        self.pos_embed = nn.Parameter(torch.zeros(cfg.num_patches, cfg.width))
        self.blocks = nn.ModuleList(ViTBlock(cfg) for _ in range(cfg.num_layers))
        self.register_buffer("cell_patches_C9", cell_patch_table(cfg.patch_grid), persistent=False)

    def block(self, i: int) -> ViTBlock:
        block = self.blocks[i]
        assert isinstance(block, ViTBlock)
        return block

    def embed(self, pixels_FNP: Tensor) -> Tensor:
        return self.patch_embed(pixels_FNP) + self.pos_embed

    def cells(self, hidden_FND: Tensor) -> Tensor:
        """Groups patches by cell: [F, C, 9, D]."""
        return hidden_FND[:, self.cell_patches_C9]

    def spread(self, per_cell_FC: Tensor) -> Tensor:
        """Gives each patch the value of its cell: [F, N]."""
        num_patches = self.pos_embed.shape[0]
        owner = per_cell_FC.new_zeros(num_patches, dtype=torch.long)
        cells = torch.arange(per_cell_FC.shape[1], device=per_cell_FC.device)
        owner[self.cell_patches_C9.flatten()] = cells.repeat_interleave(CELL * CELL)
        return per_cell_FC[:, owner]
