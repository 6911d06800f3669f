"""The language model: a Qwen3- or OLMo-style decoder that reads its past from outside.

Positions, masks and past keys and values are arguments, so that prefill, decoding, packed training
and the exported graph are one computation.

Shape letters: B batch, s new tokens, p past tokens, D width, H heads, h key-value heads, d head
width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from edge_vlm.config import LanguageConfig
from edge_vlm.model.layers import RMSNorm, SwiGLU, attend
from edge_vlm.text.rope import rope_frequencies

KeyValue = tuple[Tensor, Tensor]
PastAttention = Callable[
    [Tensor, Tensor, Tensor, Tensor, "KeyValue | None"], tuple[Tensor, KeyValue]
]
"""As `attend_past`: the same sums for whoever keeps the past in another way."""


def rope_tables(cfg: LanguageConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine, fp32 [..., cfg.rope_width], of integer positions [...]."""
    angles, factors = (torch.from_numpy(t).to(positions.device) for t in rope_frequencies(cfg))
    turned = positions[..., None].float() * angles
    return turned.cos() * factors, turned.sin() * factors


def rotate(x_BsHd: Tensor, cos_Bsd: Tensor, sin_Bsd: Tensor) -> Tensor:
    """Rotary embedding, first half of the head against the second."""
    cos, sin = (t.unsqueeze(-2).to(x_BsHd.dtype) for t in (cos_Bsd, sin_Bsd))
    a, b = x_BsHd.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attend_past(
    q_BsHd: Tensor, k_Bshd: Tensor, v_Bshd: Tensor, bias_Bst: Tensor, past: KeyValue | None
) -> tuple[Tensor, KeyValue]:
    """Attention over past and new tokens, [B, s, H, d], and what the next call needs of the new."""
    k, v = k_Bshd, v_Bshd
    if past is not None:
        k, v = torch.cat([past[0], k], 1), torch.cat([past[1], v], 1)
    group = q_BsHd.shape[2] // k.shape[2]
    if group > 1:
        k, v = (t.repeat_interleave(group, 2) for t in (k, v))
    return attend(q_BsHd, k, v, bias_Bst[:, None]), (k_Bshd, v_Bshd)


class SelfAttention(nn.Module):
    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.q = nn.Linear(cfg.width, cfg.num_heads * cfg.head_dim, bias=False)
        self.k = nn.Linear(cfg.width, cfg.num_kv_heads * cfg.head_dim, bias=False)
        self.v = nn.Linear(cfg.width, cfg.num_kv_heads * cfg.head_dim, bias=False)
        self.o = nn.Linear(cfg.num_heads * cfg.head_dim, cfg.width, bias=False)
        q_heads, k_heads = (cfg.num_heads, cfg.num_kv_heads) if cfg.full_qk_norm else (1, 1)
        self.q_norm = RMSNorm(q_heads * cfg.head_dim, cfg.norm_eps)
        self.k_norm = RMSNorm(k_heads * cfg.head_dim, cfg.norm_eps)

    def forward(
        self,
        x_BsD: Tensor,
        cos: Tensor,
        sin: Tensor,
        bias_Bst: Tensor,
        past: KeyValue | None,
        attention: PastAttention = attend_past,
    ) -> tuple[Tensor, KeyValue]:
        cfg = self.cfg
        q, k, v = self.q(x_BsD), self.k(x_BsD), self.v(x_BsD)
        if cfg.full_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, cfg.head_dim)) for t in (q, k, v))
        if not cfg.full_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out, new = attention(q, k, v, bias_Bst, past)
        return self.o(out.flatten(-2)), new


class DecoderBlock(nn.Module):
    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        self.post_norm = cfg.post_norm
        self.attn_norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.attn = SelfAttention(cfg)
        self.mlp_norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.mlp = SwiGLU(cfg.width, cfg.mlp_width, cfg.width)

    def forward(
        self,
        x_BsD: Tensor,
        cos: Tensor,
        sin: Tensor,
        bias_Bst: Tensor,
        past: KeyValue | None,
        attention: PastAttention = attend_past,
    ) -> tuple[Tensor, KeyValue]:
        if self.post_norm:
            y, new = self.attn(x_BsD, cos, sin, bias_Bst, past, attention)
            x_BsD = x_BsD + self.attn_norm(y)
            return x_BsD + self.mlp_norm(self.mlp(x_BsD)), new
        y, new = self.attn(self.attn_norm(x_BsD), cos, sin, bias_Bst, past, attention)
        x_BsD = x_BsD + y
        return x_BsD + self.mlp(self.mlp_norm(x_BsD)), new


class LanguageModel(nn.Module):
    def __init__(self, cfg: LanguageConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab, cfg.width)
        self.blocks = nn.ModuleList(DecoderBlock(cfg) for _ in range(cfg.num_layers))
        self.norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.head = nn.Linear(cfg.width, cfg.base_vocab, bias=False)

    def forward(
        self,
        embeds_BsD: Tensor,
        cos_Bsd: Tensor,
        sin_Bsd: Tensor,
        bias_Bst: Tensor,
        past: Sequence[KeyValue] | None = None,
        attention: PastAttention = attend_past,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Returns the normed hidden state [B, s, D] and each layer's new keys and values.

        `cos` and `sin` are those of `rope_tables`. `bias` is additive [B, s, p + s], past first;
        `past` holds per layer keys (already rotated) and values [B, p, h, d]; what is returned are
        only the s new rows [B, s, h, d].
        """
        tables = [(cos_Bsd, sin_Bsd)]
        if self.cfg.num_rope_tables > 1:
            tables = list(zip(cos_Bsd.chunk(2, -1), sin_Bsd.chunk(2, -1), strict=True))
        x, new = embeds_BsD, []
        for i, block in enumerate(self.blocks):
            cos, sin = tables[self.cfg.rope_table_of(i)]
            x, kv = block(x, cos, sin, bias_Bst, None if past is None else past[i], attention)
            new.append(kv)
        return self.norm(x), new
