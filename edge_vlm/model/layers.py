"""Attention and normalisation pieces that the vision and language sides share.

Shape letters: B batch, S query tokens, K key tokens, H heads, d head width, D model width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_vlm.text.masks import MASKED


def additive_bias(allowed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bool of any shape -> 0 where a query may see a key, MASKED elsewhere."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, MASKED)


def attend(q_BSHd: Tensor, k_BKHd: Tensor, v_BKHd: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention, [B, S, H, d]; the additive bias broadcasts to [B, H, S, K].

    With gradients on a CPU the product is written out: the fused kernel's bf16 backward is two to
    three times slower there, and slower still with a bias that needs a gradient. Export takes
    the same plain form.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BSHd, k_BKHd, v_BKHd))
    written_out = torch.compiler.is_exporting() or (
        torch.is_grad_enabled() and q.device.type == "cpu"
    )
    if written_out:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        out = scores.softmax(-1) @ v
    else:
        mask = None if bias is None else bias.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    attended: Tensor = out.transpose(1, 2)
    return attended


class CrossAttention(nn.Module):
    """Multi-head attention with biases on all four projections, as SigLIP and the poolers use."""

    def __init__(self, in_width: int, num_heads: int, head_dim: int, out_width: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        inner = num_heads * head_dim
        self.q = nn.Linear(in_width, inner)
        self.k = nn.Linear(in_width, inner)
        self.v = nn.Linear(in_width, inner)
        self.o = nn.Linear(inner, out_width)

    def heads(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.num_heads, self.head_dim))
        return heads

    def forward(self, query_BSD: Tensor, keys_BKD: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(self.q(query_BSD)), self.heads(self.k(keys_BKD)), self.v(keys_BKD)
        out: Tensor = self.o(attend(q, k, self.heads(v), bias).flatten(-2))
        return out


class CellPooler(CrossAttention):
    """One vector per window of W patches: attention whose query is the mean of the patches."""

    def forward(  # type: ignore[override]
        self, patches_GWD: Tensor, valid_GW: Tensor | None = None
    ) -> Tensor:
        """Where `valid` (bool) is false the window has no patch: in neither mean nor keys."""
        if valid_GW is None:
            return super().forward(patches_GWD.mean(1, keepdim=True), patches_GWD).squeeze(1)
        present_GW1 = valid_GW[..., None].to(patches_GWD.dtype)
        patches_GWD = patches_GWD * present_GW1
        mean_G1D = patches_GWD.sum(1, keepdim=True) / present_GW1.sum(1, keepdim=True).clamp(min=1)
        bias = torch.where(valid_GW, 0.0, MASKED)[:, None, None]
        return super().forward(mean_G1D, patches_GWD, bias).squeeze(1)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32 and scaled in the input's dtype (as Qwen3)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` without biases."""

    def __init__(self, in_width: int, mlp_width: int, out_width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(in_width, mlp_width, bias=False)
        self.up = nn.Linear(in_width, mlp_width, bias=False)
        self.down = nn.Linear(mlp_width, out_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out
