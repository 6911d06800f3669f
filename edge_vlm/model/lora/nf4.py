"""Frozen matrices in four bits (NF4, arXiv 2305.14314), by bitsandbytes, which is imported here only."""

from __future__ import annotations

import torch
from torch import nn

from edge_vlm.errors import MissingExtraError

try:
    import bitsandbytes
except ImportError as error:
    raise MissingExtraError.for_library("bitsandbytes", "nf4") from error

BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Four bits, an 8-bit scale for 64 of them and a float32 scale for 256 of those."""


def packed(layer: nn.Linear) -> nn.Module:
    """The same layer with its matrix in NF4 and scales of scales; gradients pass through it, the
    matrix itself has none. Products are bfloat16."""
    settings = {"quant_type": "nf4", "compress_statistics": True}
    four_bit = bitsandbytes.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=torch.bfloat16,
        device="meta",
        **settings,
    )
    four_bit.weight = bitsandbytes.nn.Params4bit(
        layer.weight.detach(), requires_grad=False, module=four_bit, **settings
    )
    four_bit.bias = layer.bias
    result: nn.Module = four_bit.to(layer.weight.device)  # here it is packed
    return result
