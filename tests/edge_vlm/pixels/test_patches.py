"""Pictures become the same numbers as in the published processors (torch's bilinear resize)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_vlm.pixels.patches import (
    patch_indices_of_cells,
    resize_bilinear,
    to_pixel_values,
)
from edge_vlm.presets import demo, molmo2_4b, tiny
from tests.preprocessing_record import FRAMES_OF_EACH, digest, load, picture


def _picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(48, 64, 36), (17, 5, 96), (1, 1, 36), (300, 200, 378), (36, 36, 36)],
)
def test_resize_equals_torch(height: int, width: int, size: int) -> None:
    torch = pytest.importorskip("torch")
    rgb = _picture(height, width)
    planes = torch.from_numpy(rgb).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(
        planes, (size, size), mode="bilinear", align_corners=False, antialias=False
    )
    expected = expected[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(resize_bilinear(rgb.astype(np.float32), size), expected, atol=1e-4)
    # What lies exactly between two integers may fall to either side on another processor than the
    # one whose order of sums is followed; the recorded frames below are met to the last bit.
    difference = np.abs(resize_bilinear(rgb, size) - expected.round().clip(0, 255))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.005


@pytest.mark.parametrize("case", load()["frames"], ids=lambda case: str(case["size"]))
def test_frames_equal_the_recorded_ones_to_the_last_bit(case: dict[str, Any]) -> None:
    cfg = molmo2_4b().vision
    height, width = case["size"]
    frames = [picture(height, width, seed) for seed in range(FRAMES_OF_EACH)]
    pixels = np.stack([to_pixel_values(frame, cfg) for frame in frames])
    assert digest(pixels) == case["pixels"]
    cells = patch_indices_of_cells(np.arange(cfg.num_cells), cfg)
    windows = [cells + i * cfg.num_patches for i in range(len(frames))]
    assert digest(np.concatenate(windows).astype(np.int32)) == case["windows"]


def test_float_input_is_not_rounded() -> None:
    plane = np.array([[[0.0], [1.0]]], np.float32)
    assert resize_bilinear(plane, (1, 4))[0, :, 0].tolist() == [0.0, 0.25, 0.75, 1.0]


def test_a_flat_picture_stays_flat_at_any_size() -> None:
    rgb = np.full((31, 77, 3), 255, np.uint8)
    values = to_pixel_values(rgb, molmo2_4b().vision)
    assert values.shape == (729, 588)
    assert values.dtype == np.float32
    assert (values == 1.0).all()


def test_patches_are_row_major_and_channels_last() -> None:
    cfg = demo(100, 3).vision
    rgb = _picture(cfg.image_size, cfg.image_size)
    values = to_pixel_values(rgb, cfg)
    row, column = 7, 4
    side = cfg.patch_size
    block = rgb[row * side : (row + 1) * side, column * side : (column + 1) * side]
    expected = (block.reshape(-1).astype(np.float64) / 255 - 0.5) / 0.5
    np.testing.assert_allclose(values[row * cfg.patch_grid + column], expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (0, 4, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rgb must be"):
        to_pixel_values(np.zeros(shape, np.uint8), tiny().vision)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        to_pixel_values(np.zeros((4, 4, 3), np.float32), tiny().vision)


def test_cells_and_patches_are_inverse() -> None:
    cfg = molmo2_4b().vision
    every = patch_indices_of_cells(np.arange(cfg.num_cells), cfg)
    owner = np.empty(cfg.num_patches, np.int64)
    owner[every] = np.arange(cfg.num_cells)[:, None]
    assert sorted(every.ravel()) == list(range(cfg.num_patches))
    for cell in (0, 8, 9, 40, 80):
        patches = patch_indices_of_cells(np.array([cell]), cfg)[0]
        assert (owner[patches] == cell).all()
        assert (np.diff(patches) > 0).all()
    assert patch_indices_of_cells(np.array([10]), cfg)[0].tolist() == [
        84, 85, 86, 111, 112, 113, 138, 139, 140,
    ]  # fmt: skip
    everything = patch_indices_of_cells(np.arange(cfg.num_cells), cfg)
    assert sorted(everything.ravel().tolist()) == list(range(cfg.num_patches))


def test_cells_agree_with_the_model() -> None:
    pytest.importorskip("torch")
    from edge_vlm.model.vit import cell_patch_table

    cfg = molmo2_4b().vision
    table = patch_indices_of_cells(np.arange(cfg.num_cells), cfg)
    assert (table == cell_patch_table(cfg.patch_grid).numpy()).all()


@pytest.mark.parametrize("cell", [-1, 9])
def test_a_cell_outside_the_grid_is_refused(cell: int) -> None:
    with pytest.raises(ValueError, match="cells must lie in"):
        patch_indices_of_cells(np.array([0, cell]), tiny().vision)
