"""Weights as small integers: symmetric, without zero points, rounded to nearest.

A matrix is [K, N] here, as a MatMul takes it: K inputs, N outputs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
I8 = npt.NDArray[np.int8]

PIECE_COLUMNS = 1024
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Shares of a block's largest value that are tried as the largest one that can be written."""


def quantize_blocks(weight_KN: F32, bits: int, block: int) -> tuple[I8, F32]:
    """Whole numbers [K, N] and scales [K / block, N] of blocks of `block` inputs of one output.

    The scale of a block is the one of `SHRINK` that leaves the smallest squared error. At 8 bits
    that is nearly always the largest value, so only that one is used.
    """
    k, n = weight_KN.shape
    numbers = np.empty((k, n), np.int8)
    scale = np.empty((k // block, n), np.float32)
    for group in range(k // block):
        rows = slice(group * block, (group + 1) * block)
        for column in range(0, n, PIECE_COLUMNS):  # pieces that stay in a processor's cache
            columns = slice(column, column + PIECE_COLUMNS)
            piece = np.ascontiguousarray(weight_KN[rows, columns])
            numbers[rows, columns], scale[group, columns] = _quantize_piece(piece, bits)
    return numbers, scale


def _quantize_piece(weight: F32, bits: int) -> tuple[F32, F32]:
    """One block of each of some outputs, [block, n] -> numbers and scales [n]."""
    most = 2 ** (bits - 1) - 1
    largest = np.abs(weight).max(0)
    best = np.full_like(largest, np.inf)
    scale = np.empty_like(largest)
    rounded = np.empty_like(weight)
    for share in SHRINK if bits < 8 else SHRINK[:1]:
        tried = _nonzero(largest * np.float32(share / most))
        _round_to(weight, tried, most, rounded)
        rounded *= tried
        rounded -= weight
        error = np.einsum("bn,bn->n", rounded, rounded)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, tried, scale)
    _round_to(weight, scale, most, rounded)
    return rounded, scale


def _round_to(weight: F32, scale: F32, most: int, out: F32) -> None:
    np.multiply(weight, 1 / scale, out=out)
    np.rint(out, out=out)
    np.clip(out, -most - 1, most, out=out)


def quantize_outputs(weight_KN: F32) -> tuple[I8, F32]:
    """int8 [K, N] and one scale per output, [N]."""
    scale = _nonzero(np.abs(weight_KN).max(0) / np.float32(127))
    return np.clip(np.rint(weight_KN / scale), -127, 127).astype(np.int8), scale


def activation_scale(largest: float) -> float:
    """Of a whole tensor whose values reach `largest`."""
    return max(largest, 1e-6) / 127


def smoothing(inputs_K: F32, weights_K: F32, strength: float = 0.5) -> F32:
    """SmoothQuant (arXiv 2211.10438, eq. 4): what each input channel is divided by, [K].

    `inputs` and `weights` are the largest absolute values of each channel. Outliers move from the
    activations, of which a whole tensor shares one scale, into the weights.
    """
    low = np.float32(1e-5)
    factor = np.maximum(inputs_K, low) ** strength / np.maximum(weights_K, low) ** (1 - strength)
    return factor.astype(np.float32)


def pack_nbits(numbers_KN: I8, bits: int, block: int) -> npt.NDArray[np.uint8]:
    """The layout of ONNX Runtime's MatMulNBits, [N, K / block, block * bits / 8].

    Numbers are stored unsigned around 2^(bits - 1), the lower half of a byte first.
    """
    k, n = numbers_KN.shape
    unsigned = (numbers_KN.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    rows = np.ascontiguousarray(unsigned.T).reshape(n, k // block, block)
    return rows if bits == 8 else rows[..., ::2] | (rows[..., 1::2] << 4)


def _nonzero(scale: F32) -> F32:
    """A block of zeros gets any scale: its numbers are zero."""
    return np.where(scale > 0, scale, np.float32(1)).astype(np.float32)
