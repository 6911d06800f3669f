"""The vision transformer, cut where the cells are dropped.

Shape letters: F frames, N patches per frame, C cells per frame, P kept patches over all frames, D
width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_vlm.config import CELL, VisionConfig
from edge_vlm.model.layers import CrossAttention
from edge_vlm.model.ragged import Layout


def cell_patch_table(grid: int) -> Tensor:
    """Patch indices of every cell, [C, 9], both row-major, for a `grid` x `grid` patch map."""
    patches = torch.arange(grid * grid).view(grid // CELL, CELL, grid // CELL, CELL)
    return patches.permute(0, 2, 1, 3).reshape(-1, CELL * CELL)


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
        out: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))
        return out

    def forward(self, x_FND: Tensor, key_bias_FN: Tensor | None = None) -> Tensor:
        """Whole frames; the bias is added to every query's score of that key."""
        y = self.norm1(x_FND)
        bias = None if key_bias_FN is None else key_bias_FN[:, None, None, :]
        x_FND = x_FND + self.attn(y, y, bias)
        return x_FND + self.mlp(x_FND)

    def forward_ragged(self, x_PD: Tensor, layout: Layout) -> Tensor:
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
        out: Tensor = self.patch_embed(pixels_FNP) + self.pos_embed
        return out

    def cells(self, hidden_FND: Tensor) -> Tensor:
        """Groups patches by cell: [F, C, 9, D]."""
        return hidden_FND[:, self.cell_patches_C9]

    def spread(self, per_cell_FC: Tensor) -> Tensor:
        """Gives each patch the value of its cell: [F, N]."""
        side = math.isqrt(per_cell_FC.shape[1])
        rows = per_cell_FC.reshape(-1, side, 1, side, 1).expand(-1, side, CELL, side, CELL)
        return rows.reshape(-1, self.pos_embed.shape[0])
