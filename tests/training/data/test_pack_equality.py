"""A packed row gives every annotation the loss it has alone behind its own video."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edge_vlm.config import Rescale, VisionAttention
from edge_vlm.model.clips import encode_clips
from edge_vlm.model.llm import rope_tables
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.text.masks import MASKED
from edge_vlm.text.prompt import PLAIN, RELEASED, PromptFormat, PromptStyle
from edge_vlm_training.data.packing.assemble import assemble
from edge_vlm_training.data.packing.batch import IGNORED, PackedBatch
from edge_vlm_training.data.packing.budget import CellBudget
from edge_vlm_training.data.packing.masks import additive_mask
from edge_vlm_training.data.packing.trees import TokenWeights, TreeBuilder
from edge_vlm_training.data.sample import Sample
from edge_vlm_training.objective.vision import to_pixel_values
from tests.training.data.trees import PUBLISHED, clip, config, model, prompt

WEIGHTS = TokenWeights()


def branch_losses(lm: VideoLM, batch: PackedBatch) -> torch.Tensor:
    """Weighted loss of each branch of a packed batch."""
    cfg = lm.cfg
    pixels = to_pixel_values(batch.frames_FSS3, cfg.vision, torch.float32)
    # Clip by clip: which frames the published rule gives all their patches as context depends on
    # all clips of a call.
    seen = [
        encode_clips(
            lm,
            clip_pixels,
            [len(clip_pixels)],
            keep_ratio=batch.keep_ratio,
            min_cells=batch.min_cells,
        )
        for clip_pixels in pixels.split(batch.frames_per_clip)
    ]
    features = torch.cat([encoded.features_GE for encoded in seen])
    tokens = batch.pruned(torch.cat([encoded.kept_FC for encoded in seen]))
    embeds = lm.llm.embed(tokens.ids_RS)
    flat = embeds.flatten(0, 1).index_add(0, tokens.patch_places(), features)
    tables = rope_tables(lm.llm.cfg, tokens.positions_RS)
    mask = additive_mask(tokens, cfg.attention, torch.float32)
    hidden, _ = lm.llm(flat.view_as(embeds), *tables, mask)
    targets = tokens.target_RS.flatten()
    losses = F.cross_entropy(
        lm.llm.head(hidden).flatten(0, 1), targets, reduction="none", ignore_index=IGNORED
    )
    trained = targets != IGNORED
    out = torch.zeros(len(batch.branch_kinds))
    weighted = (losses * tokens.weight_RS.flatten())[trained]
    return out.index_add(0, tokens.branch_RS.flatten()[trained], weighted)


def losses_alone(
    lm: VideoLM, fmt: PromptFormat, sample: Sample, keep_ratio: float, min_cells: int
) -> list[float]:
    """The same, each annotation in a sequence of its own, written out from the prompt's pieces."""
    cfg = lm.cfg
    pixels = to_pixel_values(
        torch.from_numpy(sample.load(cfg.vision.image_size)), cfg.vision, torch.float32
    )
    seen = encode_clips(lm, pixels, [len(pixels)], keep_ratio=keep_ratio, min_cells=min_cells)
    counts = seen.kept_FC.sum(1).tolist()
    found = []
    for branch in sample.branches:
        last = len(counts) - 1 if branch.frame == -1 else branch.frame
        stamps = [
            fmt.frame_ids(float(sample.times_s[i]), counts[i], i == 0) for i in range(last + 1)
        ]
        turns = [fmt.turn_ids(*turn) for turn in branch.history]
        answer = fmt.answer_ids(branch.answer)
        text = np.concatenate([*turns, fmt.question_ids(branch.question), answer[:-1]])
        ids = torch.from_numpy(np.concatenate([fmt.bos_ids, *stamps, text])).long()
        frame = torch.full((len(ids),), -1)
        start = 1
        for i, stamp in enumerate(stamps):
            inside = torch.from_numpy(fmt.vision_mask(stamp))
            frame[start : start + len(stamp)] = torch.where(inside, i, -1)
            start += len(stamp)
        index = torch.arange(len(ids))
        both = (frame[:, None] >= 0) & (frame[None] >= 0)
        if cfg.attention is VisionAttention.FRAME:
            both &= frame[:, None] == frame[None]
        allowed = (index[None] <= index[:, None]) | both
        bias = torch.zeros(allowed.shape).masked_fill(~allowed, MASKED)[None]
        embeds = lm.llm.embed(ids)
        shown = seen.features_GE[: sum(counts[: last + 1])]
        embeds = embeds.index_add(0, (ids == fmt.patch_id).nonzero().squeeze(1), shown)
        hidden, _ = lm.llm(embeds[None], *rope_tables(lm.llm.cfg, index[None]), bias)
        logits = lm.llm.head(hidden[0, -len(answer) :])
        loss = F.cross_entropy(logits, torch.from_numpy(answer).long(), reduction="sum")
        weight = WEIGHTS.weight(branch.kind, len(answer), len(sample.branches))
        found.append(weight * float(loss))
    return found


@pytest.mark.parametrize(("keep_ratio", "min_cells"), [(1.0, 0), (0.5, 2), (0.2, 0)])
@pytest.mark.parametrize(
    ("attention", "rescale", "style"),
    [
        (VisionAttention.FRAME, Rescale.ABSOLUTE, PLAIN),
        (VisionAttention.ALL, Rescale.FRAME, RELEASED),
        (VisionAttention.ALL, Rescale.ROW, PUBLISHED),
    ],
)
@torch.no_grad()
def test_pack_equals_every_sample_alone(
    attention: VisionAttention,
    rescale: Rescale,
    style: PromptStyle,
    keep_ratio: float,
    min_cells: int,
) -> None:
    cfg = config(attention, rescale)
    lm, fmt = model(cfg), prompt(style)
    at_end = attention is VisionAttention.ALL
    samples = [
        clip(str(i), frames, branches, at_end=at_end)
        for i, (frames, branches) in enumerate([(4, 3), (1, 1), (3, 4), (6, 2)])
    ]
    trees = [TreeBuilder(fmt, attention).build(sample) for sample in samples]
    budget = CellBudget(cfg=cfg, keep_ratio=keep_ratio, min_cells=min_cells)
    rows = [trees[:3], trees[3:]]
    pictures = [tree.load(cfg.vision.image_size) for tree in trees]
    packed = branch_losses(lm, assemble(rows, pictures, fmt, WEIGHTS, budget))
    alone = [loss for s in samples for loss in losses_alone(lm, fmt, s, keep_ratio, min_cells)]
    assert min(alone) > 0
    torch.testing.assert_close(packed, torch.tensor(alone), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_have_the_length_that_was_counted_on() -> None:
    for rescale in (Rescale.FRAME, Rescale.ROW):
        cfg = config(VisionAttention.ALL, rescale)
        lm = model(cfg)
        for keep_ratio in (1.0, 0.7, 0.5, 0.2):
            budget = CellBudget(cfg=cfg, keep_ratio=keep_ratio, min_cells=1)
            trees = [
                TreeBuilder(prompt(), cfg.attention).build(clip(str(i), frames, 2))
                for i, frames in enumerate((5, 1, 4))
            ]
            pictures = [tree.load(cfg.vision.image_size) for tree in trees]
            batch = assemble([trees], pictures, prompt(), WEIGHTS, budget)
            pixels = to_pixel_values(batch.frames_FSS3, cfg.vision, torch.float32)
            kept = encode_clips(
                lm, pixels, batch.frames_per_clip, keep_ratio=keep_ratio, min_cells=1
            ).kept_FC
            counted = sum(tree.length(budget.kept(tree.num_frames)) for tree in trees)
            assert batch.pruned(kept).lengths_R.tolist() == [counted]
