"""Images are cut, pooled and numbered as the published processors do it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_vlm.pixels.patches import cell_table, resize_bilinear
from edge_vlm.pixels.stills import (
    PADDING,
    ImageConfig,
    canvas_patches,
    choose_tiling,
    image_grid,
    join_images,
    pooling_windows,
    prepare_image,
)
from edge_vlm.presets import demo, molmo2_4b, tiny
from tests.preprocessing_record import digest, load, picture

RECORD = load()
FULL = molmo2_4b().vision
SMALL = dataclasses.replace(tiny().vision, image_size=36, patch_size=4)
SMALL_CUT = ImageConfig(overlap=(2, 3))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "case", RECORD["images"], ids=lambda case: "x".join(map(str, case["size"]))
)
def test_images_equal_the_recorded_ones_to_the_last_bit(case: dict[str, Any]) -> None:
    made = prepare_image(picture(*case["size"]), FULL, ImageConfig(max_crops=case["max_crops"]))
    assert list(made.grid) == case["grid"]
    assert made.pixels.dtype == np.float32
    assert made.pixels.shape == (case["crops"], FULL.num_patches, FULL.patch_dim)
    assert made.windows.dtype == np.int32
    assert digest(made.windows) == case["windows"]
    np.testing.assert_array_equal(made.pixels[-1, 100, :6], np.float32(case["some_pixels"]))
    assert digest(made.pixels) == case["pixels"]


@settings(max_examples=60)
@given(st.integers(1, 260), st.integers(1, 260), st.integers(1, 9), st.integers(0, 1000))
def test_any_size_equals_the_published_processor(
    height: int, width: int, max_crops: int, seed: int
) -> None:
    pytest.importorskip("transformers", reason="compares with transformers' own processor")
    from tests.published_processors import published_images

    sizes = [(height, width), (width, height)]
    pictures = [noise(*size, seed + i) for i, size in enumerate(sizes)]
    theirs = published_images(
        pictures,
        max_crops=max_crops,
        size={"height": SMALL.image_size, "width": SMALL.image_size},
        patch_size=SMALL.patch_size,
        overlap_margins=list(SMALL_CUT.overlap),
    )
    cfg = dataclasses.replace(SMALL_CUT, max_crops=max_crops)
    ours = [prepare_image(rgb, SMALL, cfg) for rgb in pictures]
    pixels, windows = join_images(ours)
    assert [list(image.grid) for image in ours] == theirs["image_grids"].tolist()
    assert [len(image.pixels) for image in ours] == theirs["image_num_crops"].tolist()
    np.testing.assert_array_equal(windows, theirs["image_token_pooling"])
    # A value that lies between two levels falls to either side by the order of the sums, which
    # differs between processors: one level apart, and rarely.
    assert np.abs(pixels - theirs["pixel_values"]).max() <= 2 / 255 + 1e-6
    assert (pixels != theirs["pixel_values"]).mean() < 2e-3


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 24))
def test_the_grid_is_known_from_the_size(height: int, width: int, max_crops: int) -> None:
    cfg = ImageConfig(max_crops=max_crops)
    grid = image_grid(height, width, FULL, cfg)
    rows, columns = choose_tiling(height - 112, width - 112, 19 * 14, max_crops)
    assert 1 <= rows * columns <= max_crops
    assert grid == (14, 14, -(-(rows * 19 + 8) // 2), -(-(columns * 19 + 8) // 2))
    assert grid.num_tokens == 196 + grid.rows * grid.columns


def test_the_grid_is_that_of_the_prepared_image() -> None:
    for height, width in ((40, 200), (200, 40), (7, 7), (123, 98)):
        made = prepare_image(noise(height, width), SMALL, SMALL_CUT)
        assert made.grid == image_grid(height, width, SMALL, SMALL_CUT)
        assert len(made.windows) == made.grid.num_tokens


@pytest.mark.parametrize(
    ("height", "width", "crops", "expected"),
    [
        (266, 266, 8, (1, 1)),
        (300, 266, 8, (2, 1)),
        (2000, 3000, 8, (2, 3)),  # all shrink it: 2x4 shrinks the height as much, with more crops
        (100, 5000, 8, (1, 8)),
        (0, 500, 8, (1, 2)),
        (0, 0, 8, (1, 1)),
        (-50, -20, 8, (1, 1)),
    ],
)
def test_tiling(height: int, width: int, crops: int, expected: tuple[int, int]) -> None:
    assert choose_tiling(height, width, 266, crops) == expected


@pytest.mark.parametrize("overlap", [(0, 0), (2, 3), (3, 0), (4, 4)])
@pytest.mark.parametrize("tiling", [(1, 1), (2, 3), (4, 1)])
def test_every_patch_of_the_canvas_stands_for_its_own_pixels(
    overlap: tuple[int, int], tiling: tuple[int, int]
) -> None:
    cfg, (rows, columns) = ImageConfig(overlap=overlap, max_crops=12), tiling
    step = cfg.window_patches(SMALL)
    height, width = ((n * step + sum(overlap)) * SMALL.patch_size for n in tiling)
    rgb = noise(height, width)
    made = prepare_image(rgb, SMALL, cfg)
    numbers = canvas_patches(rows, columns, SMALL, cfg)
    assert len(np.unique(numbers)) == numbers.size
    crops = made.pixels[1:].reshape(-1, SMALL.patch_dim)
    side = SMALL.patch_size
    blocks = resize_bilinear(rgb, (height, width)).reshape(
        height // side, side, width // side, side, 3
    )
    expected = (blocks.transpose(0, 2, 1, 3, 4).reshape(*numbers.shape, -1) - 127.5) / 127.5
    np.testing.assert_allclose(crops[numbers], expected, atol=1e-6)


def test_windows_are_padded_on_both_sides() -> None:
    windows, rows, columns = pooling_windows(np.arange(6).reshape(3, 2), 4)
    assert (rows, columns) == (1, 1)
    inside = windows.reshape(4, 4)
    assert inside[:3, 1:3].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert (inside == PADDING).sum() == 10
    even, rows, columns = pooling_windows(np.arange(16).reshape(4, 4), 2)
    assert (rows, columns, even[1].tolist()) == (2, 2, [2, 3, 6, 7])


def test_frames_pool_as_cells() -> None:
    """Video is the same pooling with windows of 3x3 and nothing to pad."""
    grid = FULL.patch_grid
    windows, rows, columns = pooling_windows(np.arange(grid * grid).reshape(grid, grid), 3)
    assert (rows, columns) == (FULL.cell_grid, FULL.cell_grid)
    np.testing.assert_array_equal(windows, cell_table(FULL.cell_grid))


def test_images_are_numbered_one_after_the_other() -> None:
    first, second = (prepare_image(noise(60, 90, i), SMALL, SMALL_CUT) for i in range(2))
    pixels, windows = join_images([first, second])
    per_token = pixels.reshape(-1, SMALL.patch_dim)[windows]
    for image, part in zip((first, second), np.split(per_token, 2), strict=True):
        alone = image.pixels.reshape(-1, SMALL.patch_dim)[image.windows]
        valid = image.windows != PADDING
        np.testing.assert_array_equal(part[valid], alone[valid])
    padded = np.concatenate([first.windows, second.windows]) == PADDING
    np.testing.assert_array_equal(windows == PADDING, padded)


def test_a_model_of_another_size_is_cut_by_its_own_patches() -> None:
    vision = demo(100, 3).vision
    made = prepare_image(noise(200, 300), vision, ImageConfig())
    assert made.pixels.shape[1:] == (vision.num_patches, vision.patch_dim)
    assert made.windows.max() == made.pixels.shape[0] * vision.num_patches - 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_crops", 0), ("overlap", (1,)), ("overlap", (-1, 2)), ("pool", 0)],
)
def test_wrong_settings_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"ImageConfig.{field}"):
        ImageConfig(**{field: value})  # type: ignore[arg-type]


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="a crop has only 9 patches"):
        prepare_image(noise(40, 40), SMALL, ImageConfig(overlap=(4, 5)))
    with pytest.raises(ValueError, match="uint8"):
        prepare_image(np.zeros((8, 8, 3), np.float32), SMALL, SMALL_CUT)
