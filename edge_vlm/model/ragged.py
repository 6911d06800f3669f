"""Attention inside frames of unequal length that lie end to end, so that dropped patches cost
nothing.

`lay_out` decides how, `Layout.attend` does it; all ways give the same result. The published STTS
code instead packs frames into rows of one whole frame and computes the rows densely (arXiv
2603.18004), which saves nothing as long as no two frames fit into one row.

Shape letters: G kept cells over all frames, P tokens over all frames, H heads, d head width.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.util
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from edge_vlm.model.layers import attend
from edge_vlm.text.masks import MASKED


class Method(str, enum.Enum):
    """How frames are kept apart."""

    GROUPED = "grouped"
    """Frames of equal length side by side as one dense batch; lengths are read on the host."""
    VARLEN = "varlen"
    """The flash kernel for sequences of unequal length: CUDA, fp16 or bf16, torch >= 2.10."""
    MASK = "mask"
    """One sequence under a block-diagonal mask. P^2 scores, but nothing depends on the lengths:
    the form that is exported."""


class Layout(ABC):
    """Where the tokens of each frame lie."""

    def arrange(self, x_G: Tensor) -> Tensor:
        """Cells [G, ...], in the order of `lay_out`'s frames, into the order computed in."""
        return x_G

    def restore(self, x_G: Tensor) -> Tensor:
        """The inverse of `arrange`."""
        return x_G

    @abstractmethod
    def attend(self, q_PHd: Tensor, k_PHd: Tensor, v_PHd: Tensor) -> Tensor:
        """Every token's attention over the tokens of its own frame: [P, H, d]."""


@dataclasses.dataclass(frozen=True)
class Grouped(Layout):
    order_G: Tensor
    groups: tuple[tuple[int, int], ...]
    """(number of frames, tokens per frame), one after the other."""

    def arrange(self, x_G: Tensor) -> Tensor:
        return x_G[self.order_G]

    def restore(self, x_G: Tensor) -> Tensor:
        return torch.empty_like(x_G).index_copy(0, self.order_G, x_G)

    def attend(self, q_PHd: Tensor, k_PHd: Tensor, v_PHd: Tensor) -> Tensor:
        if not self.groups:
            return v_PHd
        sizes = [frames * length for frames, length in self.groups]
        parts = [
            attend(*(x.view(frames, length, *x.shape[1:]) for x in qkv)).flatten(0, 1)
            for (frames, length), *qkv in zip(
                self.groups,
                q_PHd.split(sizes),
                k_PHd.split(sizes),
                v_PHd.split(sizes),
                strict=True,
            )
        ]
        return torch.cat(parts)


@dataclasses.dataclass(frozen=True)
class Varlen(Layout):
    ends: Tensor
    """i32 [frames + 1]: 0 and the token after each frame; an empty frame repeats its neighbour."""
    longest: int
    """Tokens that a frame has at most. A bound is enough, so nothing is read from the device."""

    def attend(self, q_PHd: Tensor, k_PHd: Tensor, v_PHd: Tensor) -> Tensor:
        from torch.nn.attention import varlen

        if len(q_PHd) == 0:
            return v_PHd
        out = varlen.varlen_attn(
            q_PHd, k_PHd, v_PHd, self.ends, self.ends, self.longest, self.longest
        )
        assert isinstance(out, Tensor)
        return out


@dataclasses.dataclass(frozen=True)
class Masked(Layout):
    bias_PP: Tensor

    def attend(self, q_PHd: Tensor, k_PHd: Tensor, v_PHd: Tensor) -> Tensor:
        return attend(q_PHd[None], k_PHd[None], v_PHd[None], self.bias_PP)[0]


def best_method(device: torch.device, dtype: torch.dtype) -> Method:
    """VARLEN where its kernel exists, else GROUPED."""
    flash = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    if flash and importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        return Method.VARLEN
    return Method.GROUPED


def lay_out(
    frame_id_G: Tensor,
    *,
    num_frames: int,
    num_cells: int,
    tokens_per_cell: int,
    dtype: torch.dtype,
    method: Method | None = None,
) -> Layout:
    """The layout of cells [G], given each one's frame (integers, ascending, below `num_frames`).

    A cell brings `tokens_per_cell` tokens of `dtype`, a frame has at most `num_cells` cells.
    `method` is by default the fastest one there is for the device.
    """
    method = method or best_method(frame_id_G.device, dtype)
    if method is Method.MASK:
        owner_P = frame_id_G.repeat_interleave(tokens_per_cell)
        same_PP = owner_P[:, None] == owner_P[None, :]
        return Masked(torch.where(same_PP, 0.0, MASKED).to(dtype))
    counts_F = torch.bincount(frame_id_G, minlength=num_frames)
    if method is Method.VARLEN:
        ends = torch.nn.functional.pad(counts_F.cumsum(0) * tokens_per_cell, (1, 0))
        return Varlen(ends.to(torch.int32), num_cells * tokens_per_cell)
    frames_with = torch.bincount(counts_F).tolist()
    return Grouped(
        counts_F[frame_id_G].argsort(stable=True),
        tuple((n, k * tokens_per_cell) for k, n in enumerate(frames_with) if n and k),
    )
