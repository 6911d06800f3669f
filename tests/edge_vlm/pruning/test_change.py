"""Scores without a scorer: how much a cell has changed since it was last kept."""

from __future__ import annotations

import numpy as np
import pytest

from edge_vlm.config import ModelConfig, ScorerConfig
from edge_vlm.presets import tiny
from edge_vlm.pruning.change import LastKept, frame_changes
from edge_vlm.pruning.policies import OverThreshold

SIDE, WIDTH = 9, 5
CELLS = (SIDE // 3) ** 2


def frame(seed: int) -> np.ndarray:
    """Hidden states [N, D]."""
    return np.random.default_rng(seed).standard_normal((SIDE**2, WIDTH)).astype(np.float32)


def patches_of(hidden: np.ndarray, cell: int) -> np.ndarray:
    """A cell's nine vectors end to end, read from the map as it lies."""
    row, column = divmod(cell, SIDE // 3)
    grid = hidden.reshape(SIDE, SIDE, WIDTH)
    return grid[3 * row : 3 * row + 3, 3 * column : 3 * column + 3].ravel().astype(np.float64)


def literal(hidden: np.ndarray, before: np.ndarray) -> np.ndarray:
    pairs = [(patches_of(hidden, i), patches_of(before, i)) for i in range(CELLS)]
    return np.array([1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs])


def test_it_is_one_minus_the_cosine_of_the_nine_patches() -> None:
    frames = np.stack([frame(i) for i in range(3)])
    scores = frame_changes(frames)
    np.testing.assert_array_equal(scores[0], np.ones(CELLS))
    for i in (1, 2):
        np.testing.assert_allclose(scores[i], literal(frames[i], frames[i - 1]), atol=1e-6)
    assert scores.dtype == np.float32


def test_what_stands_still_is_exactly_nothing_however_long_its_vectors() -> None:
    still = np.stack([1e4 * frame(0), 1e4 * frame(0), 2e-3 * frame(0)]).astype(np.float32)
    assert frame_changes(still)[1].max() == 0.0
    assert frame_changes(still)[2].max() < 1e-6  # only the length has changed


def test_a_cell_is_compared_with_what_was_last_kept_of_it() -> None:
    state, first = LastKept(CELLS), frame(0)
    np.testing.assert_array_equal(state.scores(first), np.ones(CELLS))
    state.keep(np.arange(CELLS, dtype=np.int32))
    drifting = [(first + 0.05 * step * frame(1)).astype(np.float32) for step in range(1, 5)]
    kept = np.array([4], np.int32)
    seen = []
    for hidden in drifting:
        seen.append(state.scores(hidden))
        state.keep(kept)
    np.testing.assert_allclose(seen[-1][0], literal(drifting[-1], first)[0], atol=1e-6)
    np.testing.assert_allclose(seen[-1][4], literal(drifting[-1], drifting[-2])[4], atol=1e-6)
    rising = np.array([scores[0] for scores in seen])
    assert (np.diff(rising) > 0).all()  # slow drift adds up
    assert seen[-1][4] < 0.5 * seen[-1][0]


def test_a_frame_that_came_to_nothing_is_not_what_was_kept() -> None:
    state = LastKept(CELLS)
    state.scores(frame(0))
    state.keep(np.arange(CELLS, dtype=np.int32))
    state.scores(frame(1))  # the engines failed behind the scores: nothing was kept
    np.testing.assert_allclose(state.scores(frame(2)), literal(frame(2), frame(0)), atol=1e-6)


def test_forgetting_makes_everything_new() -> None:
    state = LastKept(CELLS)
    state.scores(frame(0))
    state.keep(np.arange(CELLS, dtype=np.int32))
    state.forget()
    np.testing.assert_array_equal(state.scores(frame(0)), np.ones(CELLS))
    state.keep(np.array([2], np.int32))
    assert state.scores(frame(0)).tolist() == [1, 1, 0, 1, 1, 1, 1, 1, 1]


def test_a_threshold_keeps_what_the_scene_demands() -> None:
    policy = OverThreshold(0.1, min_cells=2)
    still, busy = np.full(CELLS, 0.02, np.float32), np.full(CELLS, 0.5, np.float32)
    one = still.copy()
    one[[3, 5, 7]] = 0.2
    assert policy.select(still, None, True).size == CELLS
    assert policy.select(still, None, False).size == 2
    assert policy.select(one, None, False).tolist() == [3, 5, 7]
    assert policy.select(busy, None, False).size == CELLS  # a cut: no budget stands in its way
    policy.reset()
    assert policy.select(still, None, False).size == CELLS
    with pytest.raises(ValueError, match="threshold"):
        OverThreshold(-0.1)


def test_a_config_says_where_it_looks_and_what_is_dropped_there() -> None:
    cfg = tiny().scored_by_change(2)
    assert (cfg.scorer_kind, cfg.scored_after, cfg.whole_blocks) == ("change", 2, 4)
    assert cfg.scorer is None
    assert cfg.has_scores
    assert ModelConfig.from_dict(cfg.to_dict()) == cfg
    assert "change" not in tiny().to_dict()  # older versions read every other model
    with pytest.raises(ValueError, match=r"0\.\.2"):
        tiny().scored_by_change(3)  # its features are read behind block 3
    with pytest.raises(ValueError, match="one scorer"):
        ModelConfig(**{**vars(cfg), "scorer": ScorerConfig(**vars(tiny().scorer))})
