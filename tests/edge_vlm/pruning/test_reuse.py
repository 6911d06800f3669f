"""Which cells are computed anew: every changed one, in time the others, and all after a cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_vlm.pixels.patches import cell_table
from edge_vlm.pruning.reuse import (
    MOST_CHANGED,
    CellsComputed,
    ReuseRule,
    computed_cells,
    patch_differences,
    touched,
)

GRID, VALUES = 4, 12
CELLS = GRID**2
SIZE = (48, 64)
EVERYTHING = list(range(CELLS))


def frame(seed: int = 0) -> np.ndarray:
    """Pixel values [N, P] of another scene for every seed."""
    shape = (9 * CELLS, VALUES)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def grey(levels: float) -> np.float32:
    return np.float32(levels / 127.5)


def change(pixels: np.ndarray, cell: int, place: int, levels: float) -> np.ndarray:
    """One patch of a cell (0..8, row-major) is brighter or darker by so much."""
    other = pixels.copy()
    patch = cell_table(GRID)[cell][place]
    other[patch] += np.where(other[patch] > 0, -grey(levels), grey(levels))
    return other


class Stream:
    def __init__(self, threshold: float = 4.0, refresh_frames: int = 1000) -> None:
        rule = ReuseRule(threshold=threshold, refresh_frames=refresh_frames)
        self.cells = CellsComputed(CELLS, rule)

    def show(self, pixels: np.ndarray, size: tuple[int, int] = SIZE) -> list[int]:
        cells = self.cells.next(pixels, size)
        self.cells.computed(pixels, size, cells)
        return [int(cell) for cell in cells]


def test_a_still_picture_is_computed_once_and_a_changed_patch_brings_its_cell() -> None:
    still, stream = frame(), Stream(refresh_frames=1_000_000)
    assert stream.show(still) == EVERYTHING
    assert stream.show(change(still, 5, 4, 5.0)) == [0, 5]  # 0: its turn
    assert stream.show(change(still, 5, 4, 5.0)) == []


def test_a_change_at_the_edge_of_a_cell_brings_the_cells_it_touches() -> None:
    still, stream = frame(), Stream(refresh_frames=1_000_000)
    stream.show(still)
    stream.show(still)
    assert stream.show(change(still, 5, 3, 5.0)) == [4, 5]
    assert stream.show(still) == [4, 5]
    assert stream.show(change(still, 5, 0, 5.0)) == [0, 1, 4, 5]
    corner = np.zeros(9 * CELLS, np.bool_)
    corner[0] = True
    assert np.flatnonzero(touched(corner)).tolist() == [0, 1, 12, 13]


def test_drift_adds_up_because_the_kept_pixels_are_compared() -> None:
    still, stream = frame(), Stream(threshold=4.0, refresh_frames=1_000_000)
    stream.show(still)
    stream.show(still)
    drifts = [stream.show(change(still, 10, 4, 1.5 * step)) for step in range(1, 7)]
    assert drifts == [[], [], [10], [], [], [10]]


def test_differences_are_in_grey_levels() -> None:
    still = frame()
    changed = change(still, 3, 2, 7.0)
    expected = np.zeros(9 * CELLS)
    expected[cell_table(GRID)[3][2]] = 7.0
    np.testing.assert_allclose(patch_differences(changed, still), expected, atol=1e-4)


@given(
    refresh=st.integers(1, 40),
    moving=st.sets(st.integers(0, CELLS - 1), max_size=6),
    seed=st.integers(0, 3),
)
def test_every_cell_is_computed_in_time_and_no_frame_pays_for_all(
    refresh: int, moving: set[int], seed: int
) -> None:
    rng, stream = np.random.default_rng(seed), Stream(refresh_frames=refresh)
    pixels, ages = frame(), np.zeros(CELLS, int)
    stream.show(pixels)
    turns = []
    for _ in range(3 * refresh):
        changed = [cell for cell in sorted(moving) if rng.random() < 0.5]
        for cell in changed:
            pixels = change(pixels, cell, 4, 20.0)
        computed = stream.show(pixels)
        ages += 1
        ages[computed] = 0
        assert set(changed) <= set(computed)
        assert ages.max() < refresh
        turns.append(len(set(computed) - set(changed)))
    if not moving:
        assert max(turns) <= -(-CELLS // refresh)
        assert sum(turns) == 3 * CELLS


@given(share=st.floats(0.3, 1.0), seed=st.integers(0, 100))
def test_nothing_is_kept_across_a_cut_even_where_the_scenes_look_alike(
    share: float, seed: int
) -> None:
    before, after = frame(1), frame(2)
    alike = np.random.default_rng(seed).permutation(CELLS)[: int((1 - share) * CELLS)]
    after[cell_table(GRID)[alike].ravel()] = before[cell_table(GRID)[alike].ravel()]
    stream = Stream()
    for _ in range(10):
        stream.show(before)
    assert stream.show(after) == EVERYTHING
    assert len(stream.show(after)) <= 1


@pytest.mark.parametrize("threshold", [0.5, 30.0, 255.0])
def test_a_cut_is_one_at_any_threshold(threshold: float) -> None:
    stream = Stream(threshold=threshold)
    for _ in range(10):
        stream.show(frame(1))
    assert stream.show(frame(2)) == EVERYTHING


def test_a_slow_fade_leaves_no_cell_of_the_old_scene() -> None:
    """One part of the picture after the other becomes another scene; the last cells never change,
    and are computed anew all the same."""
    before, after = frame(1), frame(2)
    stream, pixels = Stream(), before.copy()
    for _ in range(10):
        stream.show(before)
    computed: set[int] = set()
    for cell in range(int(MOST_CHANGED * CELLS) + 1):
        pixels = pixels.copy()
        pixels[cell_table(GRID)[cell]] = after[cell_table(GRID)[cell]]
        computed |= set(stream.show(pixels))
    assert computed == set(EVERYTHING)


def test_another_size_and_what_is_forgotten_are_computed_whole() -> None:
    still, stream = frame(), Stream()
    stream.show(still)
    assert len(stream.show(still)) < CELLS
    assert stream.show(still, size=(64, 48)) == EVERYTHING
    assert len(stream.show(still, size=(64, 48))) < CELLS
    stream.cells.forget()
    assert stream.show(still, size=(64, 48)) == EVERYTHING


def test_threshold_0_computes_everything() -> None:
    still, stream = frame(), Stream(threshold=0.0)
    assert [stream.show(still) for _ in range(3)] == [EVERYTHING] * 3


def test_a_threshold_that_changes_holds_from_the_next_frame_on() -> None:
    still, stream = frame(), Stream(refresh_frames=1_000_000)
    stream.show(still)
    stream.show(still)
    brighter = change(still, 7, 4, 3.0)
    assert stream.show(brighter) == []
    stream.cells.rule = ReuseRule(threshold=2.0, refresh_frames=1_000_000)
    assert stream.show(brighter) == [7]
    stream.cells.rule = ReuseRule(threshold=2.0, refresh_frames=1)
    assert stream.show(brighter) == EVERYTHING


def test_a_frame_that_fails_changes_nothing() -> None:
    still, stream = frame(), Stream()
    stream.show(still)
    changed = change(still, 9, 4, 50.0)
    first = stream.cells.next(changed, SIZE).tolist()
    assert stream.cells.next(changed, SIZE).tolist() == first
    assert 9 in stream.show(changed)
    assert 9 not in stream.show(changed)


def test_streams_of_a_batch_do_not_know_each_other() -> None:
    one = np.stack([frame(1)] * 3)
    two = np.stack([frame(2), change(frame(2), 6, 4, 9.0)])
    rule = ReuseRule(threshold=4.0)
    mask = computed_cells([one, two], CELLS, rule)
    assert mask.shape == (5, CELLS)
    assert mask[[0, 3]].all()
    assert not mask[[1, 2, 4]].all()
    np.testing.assert_array_equal(mask[3:], computed_cells([two], CELLS, rule))


def test_rules_out_of_range_are_refused() -> None:
    for wrong in (-1.0, 256.0, float("nan")):
        with pytest.raises(ValueError, match=r"threshold must be in 0\.\.255"):
            ReuseRule(threshold=wrong)
    with pytest.raises(ValueError, match="refresh_frames"):
        ReuseRule(threshold=1.0, refresh_frames=0)


def test_another_grid_is_refused() -> None:
    stream = Stream()
    with pytest.raises(ValueError, match=r"pixels must be \[144, P\]"):
        stream.show(np.zeros((9, VALUES), np.float32))
