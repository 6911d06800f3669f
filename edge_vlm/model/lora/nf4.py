"""Frozen matrices in four bits (NF4, arXiv 2305.14314), by bitsandbytes.

It is imported here only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from edge_vlm.errors import MissingExtraError

try:
    import bitsandbytes
    from bitsandbytes.functional import quantize_4bit
except ImportError as error:
    raise MissingExtraError.for_library("bitsandbytes", "nf4") from error


class PackedLinear(nn.Module):
    """A frozen linear layer whose matrix is in NF4, with scales of scales.

    Gradients pass through it. The library's own module is not taken because it lays its numbers out
    anew when it is asked without gradients on a CPU, in the middle of training too.
    """

    packed: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        packed, self._state = quantize_4bit(
            layer.weight.detach(), blocksize=64, quant_type="nf4", compress_statistics=True
        )
        self.register_buffer("packed", packed, persistent=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Computed in bfloat16."""
        x = x.to(torch.bfloat16)
        bias = None if self.bias is None else self.bias.to(torch.bfloat16)
        out: Tensor = bitsandbytes.matmul_4bit(x, self.packed.t(), self._state, bias=bias)
        return out

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._state.to(self.packed.device)
        return self
