"""SmoothQuant (arXiv 2211.10438) for products with int8 inputs and weights, as strong as measured.

Shape letters: S states, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edge_vlm_calibration.precision.states import lost_share

STRENGTHS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of the outliers' size that move into the weights; 0 moves nothing."""
REACHES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Of the largest |x|, tried as the largest one that int8 can write; what is beyond is cut off."""
LEAST = 1e-5


@dataclass(frozen=True, eq=False)
class Smoothed:
    """How the input of one or more products becomes int8."""

    factor_K: Tensor | None
    """What its channels are divided by, and the weights' rows multiplied by; None for nothing."""
    range: float
    """The |x| after that which 127 stands for."""
    strength: float
    error: float
    """Of the products' outputs together, on the states it was chosen by."""


def choose(
    states_SK: Tensor, channels_K: Tensor, weights_KN: Sequence[Tensor], *, foldable: bool
) -> Smoothed:
    """The strength and range that leave the least error in the products' outputs.

    `channels`: the largest |x| of each channel, in all that was seen. `foldable`: whether something
    before it can take up the factor.
    """
    rows_K = torch.stack([weight.abs().amax(1) for weight in weights_KN]).amax(0)
    exact = torch.cat([states_SK @ weight for weight in weights_KN], 1)
    best: Smoothed | None = None
    for strength in STRENGTHS if foldable else STRENGTHS[:1]:
        factor = smoothing(channels_K, rows_K, strength) if strength else None
        rounded = torch.cat([smoothed_int8(weight, factor) for weight in weights_KN], 1)
        largest = float((channels_K if factor is None else channels_K / factor).amax())
        for reach in REACHES:
            inputs = int8_inputs(states_SK, factor, largest * reach)
            error = lost_share(inputs @ rounded, exact)
            if best is None or error < best.error:
                best = Smoothed(factor, largest * reach, strength, error)
    assert best is not None
    return best


def smoothing(channels_K: Tensor, rows_K: Tensor, strength: float) -> Tensor:
    """Equation 4 of the paper, [K]."""
    factor = channels_K.clamp(min=LEAST) ** strength / rows_K.clamp(min=LEAST) ** (1 - strength)
    # What is common to all channels changes no product: without it the norm keeps its size.
    return factor / factor.log().mean().exp()


def output_error(
    states_SK: Tensor, weight_KN: Tensor, factor_K: Tensor | None, reach: float
) -> float:
    """`lost_share` of a product's output with int8 inputs and weights."""
    got = int8_inputs(states_SK, factor_K, reach) @ smoothed_int8(weight_KN, factor_K)
    return lost_share(got, states_SK @ weight_KN)


def int8_inputs(states_SK: Tensor, factor_K: Tensor | None, reach: float) -> Tensor:
    """Smoothed and as int8 with one scale, back in float32; what is past `reach` is cut off."""
    moved = states_SK if factor_K is None else states_SK / factor_K
    step = max(reach, 1e-6) / 127
    return (moved / step).round_().clamp_(-127, 127).mul_(step)


def smoothed_int8(weight_KN: Tensor, factor_K: Tensor | None) -> Tensor:
    """As int8 with a scale for each output, back in float32."""
    weight = weight_KN if factor_K is None else weight_KN * factor_K[:, None]
    scale = weight.abs().amax(0) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight / scale).round_().clamp_(-127, 127).mul_(scale)
