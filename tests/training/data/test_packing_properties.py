"""Whatever the clips: no token lost, rows within their limits, masks block by block."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from edge_vlm.config import VisionAttention
from edge_vlm_training.data.packing.assemble import assemble
from edge_vlm_training.data.packing.batch import IGNORED, NOWHERE, PackedBatch, PackedTokens
from edge_vlm_training.data.packing.budget import CellBudget
from edge_vlm_training.data.packing.knapsack import TOKEN_UNIT, fill_row
from edge_vlm_training.data.packing.masks import additive_mask, allowed_mask, mask_rule
from edge_vlm_training.data.packing.trees import TokenWeights, Tree, TreeBuilder, split_tree
from tests.training.data.trees import clip, config, prompt

CFG = config()
CELLS = CFG.vision.num_cells
SHAPES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3)
ROWS = st.lists(SHAPES, min_size=1, max_size=2)


def batch_of(shapes: list[list[tuple[int, int]]]) -> tuple[PackedBatch, list[list[Tree]]]:
    builder = TreeBuilder(prompt(), VisionAttention.FRAME)
    rows = [
        [
            builder.build(clip(f"{r} {i}", frames, branches, at_end=False))
            for i, (frames, branches) in enumerate(row)
        ]
        for r, row in enumerate(shapes)
    ]
    pictures = [tree.load(6) for row in rows for tree in row]
    budget = CellBudget(cfg=CFG, keep_ratio=0.5, min_cells=0)
    return assemble(rows, pictures, prompt(), TokenWeights(), budget), rows


def kept_cells(batch: PackedBatch, seed: int) -> torch.Tensor:
    frames = sum(batch.frames_per_clip)
    return torch.from_numpy(np.random.default_rng(seed).random((frames, CELLS)) < 0.5)


def sees(tokens: PackedTokens, row: int, query: int, key: int, attention: VisionAttention) -> bool:
    """The rule of the module, in words, for one pair."""

    def at(name: str, place: int) -> int:
        return int(getattr(tokens, f"{name}_RS")[row, place])

    if at("clip", query) == NOWHERE or at("clip", query) != at("clip", key):
        return False
    if at("branch", query) != at("branch", key):
        in_prefix = at("branch", key) == NOWHERE
        return in_prefix and at("frame", key) <= at("frame", query)
    if key <= query:
        return True
    near = attention is VisionAttention.ALL or at("frame", query) == at("frame", key)
    return bool(at("vision", query) and at("vision", key)) and near


@settings(max_examples=12, deadline=None)
@given(ROWS, st.integers(0, 5), st.sampled_from(list(VisionAttention)))
def test_masks_are_right_pair_by_pair(
    shapes: list[list[tuple[int, int]]], seed: int, attention: VisionAttention
) -> None:
    batch, _ = batch_of(shapes)
    tokens = batch.pruned(kept_cells(batch, seed))
    allowed = allowed_mask(tokens, attention)
    rng = np.random.default_rng(seed)
    rows, size = tokens.ids_RS.shape
    pairs = rng.integers(0, [rows, size, size], (400, 3)).tolist()
    assert [bool(allowed[r, q, k]) for r, q, k in pairs] == [
        sees(tokens, r, q, k, attention) for r, q, k in pairs
    ]
    assert torch.equal(additive_mask(tokens, attention, torch.float32) == 0, allowed)
    real = tokens.clip_RS != NOWHERE
    assert bool(allowed.diagonal(dim1=1, dim2=2)[real].all())
    assert not bool(allowed[~real].any())


@pytest.mark.parametrize("attention", list(VisionAttention))
def test_rule_is_one_that_flex_attention_takes(attention: VisionAttention) -> None:
    batch, _ = batch_of([[(2, 2), (1, 1)], [(3, 1)]])
    tokens = batch.pruned(kept_cells(batch, 0))
    rows, size = tokens.ids_RS.shape
    mask = create_mask(mask_rule(tokens, attention), rows, 1, size, size, device="cpu")
    assert torch.equal(mask[:, 0], allowed_mask(tokens, attention))


@settings(max_examples=12, deadline=None)
@given(ROWS, st.integers(0, 5), st.integers(0, 9))
def test_pruning_loses_patch_tokens_only(
    shapes: list[list[tuple[int, int]]], seed: int, longer: int
) -> None:
    batch, rows = batch_of(shapes)
    kept = kept_cells(batch, seed)
    longest = int(batch.pruned(kept).lengths_R.max())
    tokens = batch.pruned(kept, longest + longer)
    assert tokens.ids_RS.shape == (len(rows), longest + longer)
    cells = tokens.cell_RS[tokens.cell_RS != NOWHERE]
    assert cells.tolist() == kept.flatten().nonzero().squeeze(1).tolist()
    assert bool((tokens.ids_RS.flatten()[tokens.patch_places()] == prompt().patch_id).all())
    first = 0
    numbered = 0
    for row, trees in enumerate(rows):
        expected: list[int] = []
        positions: list[int] = []
        for tree in trees:
            count = kept[first : first + tree.num_frames].sum(1).tolist()
            first += tree.num_frames
            ends, end = [], 1
            expected += prompt().bos_ids.tolist()
            for stamp, k in zip(tree.stamps, count, strict=True):
                expected += [*stamp[:-1].tolist(), *[prompt().patch_id] * k, int(stamp[-1])]
                end += len(stamp) + k
                ends.append(end)
            positions += range(end)
            for branch in tree.branches:
                expected += [*branch.text.tolist(), *branch.answer[:-1].tolist()]
                positions += range(ends[branch.frame], ends[branch.frame] + len(branch))
                mine = tokens.branch_RS[row] == numbered
                trained = mine & (tokens.target_RS[row] != IGNORED)
                assert tokens.target_RS[row][trained].tolist() == branch.answer.tolist()
                assert bool((tokens.weight_RS[row][trained] > 0).all())
                assert not bool(tokens.weight_RS[row][mine & ~trained].any())
                numbered += 1
        length = len(expected)
        assert tokens.ids_RS[row, :length].tolist() == expected
        assert tokens.positions_RS[row, :length].tolist() == positions
        assert bool((tokens.clip_RS[row, length:] == NOWHERE).all())
        assert bool((tokens.target_RS[row, length:] == IGNORED).all())


def test_a_row_too_short_is_refused() -> None:
    batch, _ = batch_of([[(2, 1)]])
    kept = torch.ones(2, CELLS, dtype=torch.bool)
    with pytest.raises(ValueError, match="pad_to = 3"):
        batch.pruned(kept, 3)


ITEMS = st.lists(st.tuples(st.integers(1, 400), st.integers(1, 6)), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(ITEMS)
def test_rows_fill_up_within_both_limits(items: list[tuple[int, int]]) -> None:
    tokens, frames = [t for t, _ in items], [f for _, f in items]
    chosen = fill_row(tokens, frames, 640, 8)
    assert chosen[0] == 0
    assert sorted(set(chosen)) == chosen
    assert sum(tokens[i] for i in chosen) <= 640
    assert sum(frames[i] for i in chosen) <= 8

    def fits(numbers: list[int]) -> bool:
        units = sum(-(-tokens[i] // TOKEN_UNIT) for i in numbers if i)
        room = (640 - tokens[0]) // TOKEN_UNIT
        return units <= room and sum(frames[i] for i in numbers) <= 8

    def value(numbers: list[int]) -> int:
        return sum(tokens[i] + 30 * frames[i] for i in numbers)

    others = range(1, len(items))
    every = ([0, *(i for i in others if bits >> i & 1)] for bits in range(0, 2 ** len(items), 2))
    assert value(chosen) == max(value(numbers) for numbers in every if fits(numbers))


def test_an_example_too_large_for_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="700 tokens"):
        fill_row([700], [1], 640, 8)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 60), st.integers(1, 5))
def test_splitting_keeps_every_branch(
    frames: int, branches: int, spare: int, max_branches: int
) -> None:
    tree = TreeBuilder(prompt(), VisionAttention.FRAME).build(clip("x", frames, branches))
    kept = frames * CELLS
    max_tokens = tree.prefix_length(kept) + max(map(len, tree.branches)) + spare
    parts = list(
        split_tree(tree, kept_cells=kept, max_tokens=max_tokens, max_branches=max_branches)
    )
    assert [branch for part in parts for branch in part.branches] == list(tree.branches)
    assert all(part.length(kept) <= max_tokens for part in parts)
    assert all(1 <= len(part.branches) <= max_branches for part in parts)
