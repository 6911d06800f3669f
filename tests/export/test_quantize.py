"""Weights as small integers: how far off they are, and the layouts they are stored in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_vlm.formats.precision import BLOCK_SIZES, block_size
from edge_vlm_export.quantize.rounding import (
    activation_scale,
    pack_nbits,
    quantize_blocks,
    quantize_outputs,
    smoothing,
)


def dequantize(numbers_KN: NDArray[np.int8], scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The inverse of both quantisers, up to rounding: `scale` is [N] or [K / block, N]."""
    if scale.ndim == 1:
        return numbers_KN.astype(np.float32) * scale
    block = len(numbers_KN) // len(scale)
    return numbers_KN.astype(np.float32) * np.repeat(scale, block, 0)


def _weights(k: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((k, n)).astype(np.float32)


@pytest.mark.parametrize(
    ("num_inputs", "block"), [(2560, 128), (192, 64), (96, 32), (48, 16), (588, None)]
)
def test_the_largest_block_that_divides(num_inputs: int, block: int | None) -> None:
    assert block_size(num_inputs) == block


@given(st.integers(0, 100), st.sampled_from([4, 8]), st.sampled_from(BLOCK_SIZES[1:]))
def test_blocks_come_back_within_the_step(seed: int, bits: int, block: int) -> None:
    weight = _weights(2 * block, 3, seed)
    numbers, scale = quantize_blocks(weight, bits, block)
    assert numbers.dtype == np.int8
    assert np.abs(numbers.astype(int)).max() <= 2 ** (bits - 1)
    error = np.abs(dequantize(numbers, scale) - weight)
    step = np.repeat(scale, block, 0)
    inside = np.abs(weight) <= step * (2 ** (bits - 1) - 1)
    assert (error[inside] <= step[inside] * 0.501).all()


def test_a_smaller_scale_is_taken_where_it_leaves_less_error() -> None:
    weight = np.full((128, 1), 0.35, np.float32)
    weight[0] = 0.75  # at its full scale all others would be 0.321
    numbers, scale = quantize_blocks(weight, 4, 128)
    full = np.float32(0.75 / 7)
    plain = np.rint(weight / full) * full - weight
    chosen = dequantize(numbers, scale) - weight
    assert (chosen**2).sum() < (plain**2).sum() / 2
    assert scale[0, 0] < full


def test_outputs_have_a_scale_each() -> None:
    weight = _weights(20, 4) * np.array([1, 10, 100, 1000], np.float32)
    numbers, scale = quantize_outputs(weight)
    assert scale.shape == (4,)
    assert np.abs(numbers.astype(int)).max(0).tolist() == [127] * 4
    assert (np.abs(dequantize(numbers, scale) - weight) <= scale * 0.501).all()


def test_zeros_stay_zeros_and_finite() -> None:
    for numbers, scale in (
        quantize_blocks(np.zeros((32, 2), np.float32), 4, 16),
        quantize_outputs(np.zeros((32, 2), np.float32)),
    ):
        assert not numbers.any()
        assert np.isfinite(scale).all()
        assert (scale > 0).all()
    assert activation_scale(0.0) > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_numbers_can_be_read_back_as_documented(bits: int) -> None:
    numbers, _ = quantize_blocks(_weights(64, 5), bits, 32)
    packed = pack_nbits(numbers, bits, 32)
    assert packed.shape == (5, 2, 32 * bits // 8)
    assert packed.dtype == np.uint8
    if bits == 4:
        values = np.stack([packed & 15, packed >> 4], -1).reshape(5, 64)
    else:
        values = packed.reshape(5, 64)
    assert (values.T.astype(int) - 2 ** (bits - 1) == numbers).all()


def test_smoothing_evens_out_an_outlier_and_changes_no_product() -> None:
    x, weight = _weights(50, 8, 1), _weights(8, 6, 2)
    x[:, 3] *= 60
    factor = smoothing(np.abs(x).max(0), np.abs(weight).max(1))
    np.testing.assert_allclose((x / factor) @ (weight * factor[:, None]), x @ weight, rtol=1e-3)
    spread = np.abs(x).max(0)
    smoothed = np.abs(x / factor).max(0)
    assert smoothed.max() / smoothed.min() < spread.max() / spread.min() / 5
