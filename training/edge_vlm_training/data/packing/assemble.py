"""Chosen trees and their pictures as one `PackedBatch`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_vlm.text.prompt import PromptFormat
from edge_vlm_training.data.packing.batch import (
    NOWHERE,
    PADDING,
    PackedBatch,
    PackedTokens,
    positions_of,
)
from edge_vlm_training.data.packing.budget import CellBudget
from edge_vlm_training.data.packing.trees import TokenWeights, Tree
from edge_vlm_training.data.sample import Pictures

Columns = dict[str, npt.NDArray[np.generic]]

_DTYPES: dict[str, type[np.generic]] = {"weight_RS": np.float32, "vision_RS": np.bool_}


def assemble(
    rows: Sequence[Sequence[Tree]],
    pictures: Iterable[Pictures],
    prompt: PromptFormat,
    weights: TokenWeights,
    budget: CellBudget,
    **fields: Any,
) -> PackedBatch:
    """`pictures` u8 [T, S, S, 3] of each tree, in the order of the rows; `fields` are further ones
    of `PackedBatch`."""
    num_cells = budget.cfg.vision.num_cells
    lines: list[Columns] = []
    clip = frame = branch = 0
    for row in rows:
        parts: list[Columns] = []
        for tree in row:
            parts += _prefix(tree, prompt, num_cells, clip, frame)
            parts += _branches(tree, weights, clip, frame, branch)
            clip, frame = clip + 1, frame + tree.num_frames
            branch += len(tree.branches)
        lines.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    tokens = _padded(lines)
    trees = [tree for row in rows for tree in row]
    frames_per_clip = tuple(tree.num_frames for tree in trees)
    return PackedBatch(
        frames_FSS3=torch.from_numpy(np.concatenate(list(pictures))),
        times_s_F=torch.from_numpy(np.concatenate([t.times_s for t in trees])).float(),
        frames_per_clip=frames_per_clip,
        tokens=dataclasses.replace(tokens, positions_RS=positions_of(tokens, frames_per_clip)),
        keep_ratio=budget.keep_ratio,
        min_cells=budget.min_cells,
        clip_names=tuple(tree.name for tree in trees),
        branch_kinds=tuple(branch.kind for tree in trees for branch in tree.branches),
        **fields,
    )


def _prefix(
    tree: Tree, prompt: PromptFormat, num_cells: int, clip: int, frame: int
) -> Iterable[Columns]:
    yield _columns(prompt.bos_ids, clip=clip, frame=frame)
    for i, stamp in enumerate(tree.stamps, start=frame):
        patches = np.full(num_cells, prompt.patch_id, np.int32)
        cells = np.arange(num_cells) + i * num_cells
        at = len(stamp) - 1
        ids = np.insert(stamp, at, patches)
        columns = _columns(ids, clip=clip, frame=i)
        columns["vision_RS"] = prompt.vision_mask(ids)
        columns["cell_RS"] = np.insert(np.full(len(stamp), NOWHERE), at, cells)
        yield columns


def _branches(
    tree: Tree, weights: TokenWeights, clip: int, frame: int, number: int
) -> Iterable[Columns]:
    for i, branch in enumerate(tree.branches, start=number):
        ids = np.concatenate([branch.text, branch.answer[:-1]])
        columns = _columns(ids, clip=clip, frame=frame + branch.frame, branch=i)
        # The token before an answer's token is the one that predicts it.
        predicts = slice(len(branch.text) - 1, None)
        columns["target_RS"][predicts] = branch.answer
        columns["weight_RS"][predicts] = weights.weight(
            *(branch.kind, len(branch.answer), len(tree.branches))
        )
        columns["offset_RS"] = np.arange(len(ids))
        yield columns


def _columns(ids: npt.NDArray[np.int32], **same: int) -> Columns:
    """Columns of plain tokens; `same` is what all of them share."""
    columns: Columns = {}
    for field in dataclasses.fields(PackedTokens):
        fill = same.get(field.name.removesuffix("_RS"), PADDING.get(field.name, 0))
        columns[field.name] = np.full(len(ids), fill, _DTYPES.get(field.name, np.int64))
    columns["ids_RS"] = ids
    return columns


def _padded(lines: Sequence[Columns]) -> PackedTokens:
    longest = max(len(line["ids_RS"]) for line in lines)
    tensors = {}
    for field in dataclasses.fields(PackedTokens):
        fill = PADDING.get(field.name, 0)
        dtype = _DTYPES.get(field.name, np.int64)
        table = np.full((len(lines), longest), fill, dtype)
        for row, line in zip(table, lines, strict=True):
            row[: len(line[field.name])] = line[field.name]
        tensors[field.name] = torch.from_numpy(table)
    return PackedTokens(**tensors)
