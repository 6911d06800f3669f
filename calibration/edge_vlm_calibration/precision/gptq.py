"""GPTQ (arXiv 2210.17323): weights rounded one input after another, each time moving what was lost
into the inputs that are still to be rounded, by what real states do.

Shape letters: K inputs, N outputs, B blocks of inputs that share a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 7
"""Numbers go from -8 to 7; scales are made for the same on both sides."""
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Of a block's largest weight, tried as the largest one that can be written."""
DAMPING = 0.01
"""Of the mean of the second moments' diagonal, added to it (section 3.3, step 3)."""
PIECE_OUTPUTS = 4096
"""Outputs are rounded independently of each other: so many at a time keeps a head's copy small."""


def inverse_factor(moments_KK: Tensor, damping: float = DAMPING) -> Tensor:
    """Upper triangular U with U^T U = inverse of the damped moments, float64 [K, K].

    `moments`: sum or mean of x x^T over states. Inputs that were never other than zero have no
    weight in it and are left alone by the others.
    """
    moments = moments_KK.double().clone()
    diagonal = moments.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def round_weight(weight_KN: Tensor, factor_KK: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Whole numbers int8 [K, N] and scales [B, N], by `factor` of `inverse_factor`.

    A block's scale is chosen when it is its turn, of the weights as they are by then. Raises
    ValueError if `block` does not divide K.
    """
    k, n = weight_KN.shape
    if k % block:
        raise ValueError(f"{k} inputs do not divide into blocks of {block}")
    numbers = torch.empty(k, n, dtype=torch.int8)
    scale = torch.empty(k // block, n)
    factor = factor_KK.float()
    for start in range(0, n, PIECE_OUTPUTS):
        columns = slice(start, start + PIECE_OUTPUTS)
        numbers[:, columns], scale[:, columns] = _round_piece(
            weight_KN[:, columns].float().clone(), factor, block
        )
    return numbers, scale


def _round_piece(weight_Kn: Tensor, factor_KK: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Changes `weight`."""
    numbers = torch.empty_like(weight_Kn)
    scales = []
    for start in range(0, len(weight_Kn), block):
        rows = slice(start, start + block)
        own, within = weight_Kn[rows], factor_KK[rows, rows]
        diagonal = within.diagonal()
        scale = best_scale(own, diagonal**-2)
        lost = torch.empty_like(own)
        for i in range(block):
            number = (own[i] / scale).round_().clamp_(-MOST - 1, MOST)
            numbers[start + i] = number
            lost[i] = (own[i] - number * scale) / diagonal[i]
            own[i + 1 :].addr_(within[i, i + 1 :], lost[i], alpha=-1)
        weight_Kn[start + block :].addmm_(factor_KK[rows, start + block :].T, lost, alpha=-1)
        scales.append(scale)
    return numbers.to(torch.int8), torch.stack(scales)


def best_scale(weight_bn: Tensor, importance_b: Tensor) -> Tensor:
    """Of a block of inputs, [n]: that of SHARES which leaves the least error, each input's by its
    importance."""
    largest = weight_bn.abs().amax(0)
    best, chosen = torch.full_like(largest, torch.inf), torch.ones_like(largest)
    for share in SHARES:
        scale = largest * (share / MOST)
        scale = torch.where(scale > 0, scale, 1.0)
        rounded = (weight_bn / scale).round_().clamp_(-MOST - 1, MOST).mul_(scale)
        error = importance_b @ rounded.sub_(weight_bn).square_()
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, scale, chosen)
    return chosen


def round_nearest(weight_KN: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The same without looking at any states: plain rounding to the nearest of 16 numbers, the
    scale by the block's largest weight."""
    blocks = weight_KN.float().unflatten(0, (-1, block))
    scale = blocks.abs().amax(1) / MOST
    scale = torch.where(scale > 0, scale, 1.0)
    numbers = (blocks / scale[:, None]).round_().clamp_(-MOST - 1, MOST)
    return numbers.flatten(0, 1).to(torch.int8), scale


def restored(numbers_KN: Tensor, scale_BN: Tensor) -> Tensor:
    """What the rounded weights are worth, float32 [K, N]."""
    blocks = numbers_KN.float().unflatten(0, (len(scale_BN), -1))
    whole: Tensor = (blocks * scale_BN[:, None]).flatten(0, 1)
    return whole
