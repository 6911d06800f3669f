"""One pool of cells for a finished clip: how many are kept, and which."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_vlm.model import selection
from edge_vlm.pruning.clip_budget import Variant, clip_budget, num_kept

VARIANTS: tuple[Variant, ...] = ("published", "first_whole")
CELLS = 81


def reference_mask(scores: torch.Tensor, removed: float) -> torch.Tensor:
    """As the published code has it (its names): whole clip, first frame at 100, lowest go."""
    frames, num_cells = scores.shape
    rank = scores.clone()
    rank[0] = 100.0
    kept = torch.ones(frames * num_cells, dtype=torch.bool)
    kept[rank.flatten().sort(stable=True).indices[: int(num_cells * removed * frames)]] = False
    return kept.view(frames, num_cells)


@given(
    frames=st.integers(1, 40),
    percent=st.integers(0, 99),
    seed=st.integers(0, 99),
    distinct=st.sampled_from([4, 2**20]),
)
def test_published_is_the_reference_to_the_cell(
    frames: int, percent: int, seed: int, distinct: int
) -> None:
    removed = percent / 100
    rng = np.random.default_rng(seed)
    scores = (rng.integers(0, distinct, (frames, CELLS)) / distinct).astype(np.float32)
    theirs = reference_mask(torch.from_numpy(scores), removed).numpy()
    assert np.array_equal(clip_budget(scores, 1 - removed, variant="published"), theirs)
    assert np.array_equal(clip_budget(scores, (100 - percent) / 100, variant="published"), theirs)


def test_a_third_is_a_third() -> None:
    assert num_kept(3, CELLS, 1 - 1 / 3, variant="published") == 2 * CELLS
    assert num_kept(9, CELLS, 1 / 3, variant="first_whole") == 3 * CELLS


@pytest.mark.parametrize(
    ("frames", "keep_ratio", "first", "later"),
    [(1, 0.5, 41, 0), (2, 0.5, 81, 0), (4, 0.2, 65, 0), (4, 0.5, 81, 81), (3, 1.0, 81, 162)],
)
def test_published_lets_the_first_frame_go_last(
    frames: int, keep_ratio: float, first: int, later: int
) -> None:
    scores = np.random.default_rng(frames).random((frames, CELLS), np.float32)
    kept = clip_budget(scores, keep_ratio, variant="published")
    assert (int(kept[0].sum()), int(kept[1:].sum())) == (first, later)


def test_published_may_leave_a_quiet_frame_nothing_and_first_whole_does_not() -> None:
    scores = np.random.default_rng(2).random((8, 16), np.float32)
    scores[4] = 0.0
    assert not clip_budget(scores, 0.3, variant="published")[4].any()
    kept = clip_budget(scores, 0.3, 2, variant="first_whole")
    assert kept[0].all()
    assert kept[1:].sum(1).min() == kept[4].sum() == 2


@given(
    frames=st.integers(1, 12),
    keep_ratio=st.floats(0.01, 1.0),
    min_cells=st.integers(0, 100),
    seed=st.integers(0, 99),
    variant=st.sampled_from(VARIANTS),
)
def test_the_number_is_known_before_and_the_best_are_kept(
    frames: int, keep_ratio: float, min_cells: int, seed: int, variant: Variant
) -> None:
    scores = np.random.default_rng(seed).random((frames, CELLS), np.float32)
    kept = clip_budget(scores, keep_ratio, min_cells, variant=variant)
    assert kept.sum() == num_kept(frames, CELLS, keep_ratio, min_cells, variant=variant)
    for row, mask in zip(scores[1:], kept[1:], strict=True):
        assert mask.all() or not mask.any() or row[mask].min() >= row[~mask].max()
    if variant == "first_whole":
        assert kept[0].all()
        assert (kept[1:].sum(1) >= min(min_cells, CELLS)).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("keep_ratio", [0.2, 0.5, 1.0])
def test_tensors_are_chosen_from_as_arrays_are(variant: Variant, keep_ratio: float) -> None:
    scores = torch.rand(2, 3, 5, CELLS, generator=torch.Generator().manual_seed(0))
    scores.requires_grad_()
    mask = selection.clip_budget(scores.bfloat16(), keep_ratio, 1, variant=variant)
    assert mask.shape == scores.shape
    assert mask.dtype == torch.bool
    for place in np.ndindex(2, 3):
        clip = scores[place].detach().bfloat16().float().numpy()
        one = clip_budget(clip, keep_ratio, 1, variant=variant)
        assert np.array_equal(mask[place].numpy(), one)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1, float("nan")])
def test_wrong_use_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="keep_ratio"):
        clip_budget(np.zeros((2, 3), np.float32), ratio, variant="published")
    with pytest.raises(ValueError, match=r"\[F, C\]"):
        clip_budget(np.zeros(3, np.float32), 0.5, variant="published")
