"""Who sees whom: one rule, by hand and against itself."""

from __future__ import annotations

import numpy as np
import pytest

from edge_vlm.text.masks import (
    CAUSAL,
    MASKED,
    block_bias,
    block_rule,
    branch_bias,
    branch_rule,
    rule_bias,
)


def seen(bias: np.ndarray) -> list[str]:
    assert set(np.unique(bias)) <= {0.0, MASKED}
    assert bias.dtype == np.float32
    return ["".join(".#"[int(value == 0)] for value in row) for row in bias]


def test_tokens_of_a_block_see_each_other_both_ways() -> None:
    blocks = np.array([CAUSAL, 0, 0, CAUSAL, 1, 1])
    assert seen(block_bias(blocks)) == ["#.....", "###...", "###...", "####..", "######", "######"]
    assert seen(block_bias(blocks[1:3], past=2)) == ["####", "####"]


def test_branches_see_the_past_and_themselves() -> None:
    assert seen(branch_bias(np.array([0, 0, 1, 1, 1]), past=1)) == [
        "##....",
        "###...",
        "#..#..",
        "#..##.",
        "#..###",
    ]


@pytest.mark.parametrize("bias_of", [block_bias, branch_bias])
def test_a_batch_is_its_rows(bias_of: object) -> None:
    ids = np.random.default_rng(0).integers(-1, 3, (2, 3, 7))
    whole = bias_of(ids, 2)  # type: ignore[operator]
    assert whole.shape == (2, 3, 7, 9)
    for i, j in np.ndindex(2, 3):
        assert np.array_equal(whole[i, j], bias_of(ids[i, j], 2))  # type: ignore[operator]


@pytest.mark.parametrize("past", [0, 3])
def test_a_rule_is_the_same_mask_in_two_numbers_a_token(past: int) -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        blocks = rng.integers(CAUSAL, 3, rng.integers(1, 12))
        rule = block_rule(blocks)
        assert rule.shape == (2, len(blocks))
        np.testing.assert_array_equal(rule_bias(rule, past), block_bias(blocks, past))
        branches = np.sort(rng.integers(0, 4, rng.integers(1, 12)))
        bias = rule_bias(branch_rule(branches), past)
        np.testing.assert_array_equal(bias, branch_bias(branches, past))
