"""Pruning, raggedness, streaming and caching change nothing that they must not change."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from edge_vlm.config import ModelConfig, Rescale
from edge_vlm.model.ragged import Method
from edge_vlm.model.reference import encode_reference
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import tiny
from tests.model.prompts import cut, read

FRAMES = 4


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> VideoLM:
    return VideoLM(tiny()).init_weights(torch.Generator().manual_seed(1)).eval()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    cfg = tiny().vision
    generator = torch.Generator().manual_seed(2)
    return torch.randn(FRAMES, cfg.num_patches, cfg.patch_dim, generator=generator)


def stem(model: VideoLM, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    cfg = model.cfg.vision
    first = torch.arange(len(pixels)) == 0
    return model.vit_stem(pixels, torch.zeros(1, cfg.num_cells, cfg.width), first)


def trunk(model: VideoLM, hidden: Tensor, keep_FC: Tensor, method: Method | None = None) -> Tensor:
    cells = keep_FC.flatten().nonzero().squeeze(1)
    return model.vit_trunk(hidden, cells, cells // keep_FC.shape[1], method=method)


def uneven_keep(model: VideoLM) -> Tensor:
    """A whole frame, an empty one, and two of different size."""
    keep = torch.rand(FRAMES, model.cfg.vision.num_cells, generator=torch.manual_seed(3)) < 0.4
    keep[0], keep[2] = True, False
    keep[1], keep[3, :2] = False, True
    keep[1, 4] = True
    return keep


def test_keeping_every_cell_is_the_unpruned_model(model: VideoLM, pixels: Tensor) -> None:
    hidden, _, _ = stem(model, pixels)
    everything = torch.ones(FRAMES, model.cfg.vision.num_cells, dtype=torch.bool)
    x, taps = hidden, {}
    for i in range(model.trunk_start, model.cfg.vision.num_layers):
        x = taps[i] = model.vit.blocks[i](x)
    joined = torch.cat([taps[i] for i in model.cfg.vision.feature_layers], -1)
    whole = model.connector(model.vit.cells(joined).flatten(0, 1))
    close(trunk(model, hidden, everything), whole)


def test_grouped_attention_is_the_block_mask(model: VideoLM, pixels: Tensor) -> None:
    hidden, _, _ = stem(model, pixels)
    keep = uneven_keep(model)
    masked = trunk(model, hidden, keep, Method.MASK)
    assert len(masked) == int(keep.sum())
    close(trunk(model, hidden, keep, Method.GROUPED), masked)


def test_gradients_of_grouped_attention_are_those_of_the_block_mask(
    model: VideoLM, pixels: Tensor
) -> None:
    keep = uneven_keep(model)
    found = []
    with torch.enable_grad():
        for method in (Method.MASK, Method.GROUPED):
            x = pixels.clone().requires_grad_()
            hidden, _, _ = stem(model, x)
            trunk(model, hidden, keep, method).square().sum().backward()
            assert x.grad is not None
            found.append(x.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


def test_dropped_cells_leave_no_trace_behind_the_drop(model: VideoLM, pixels: Tensor) -> None:
    hidden, _, _ = stem(model, pixels)
    keep = uneven_keep(model)
    changed = hidden + torch.randn_like(hidden) * model.vit.spread((~keep).float())[..., None]
    assert not torch.equal(hidden, changed)
    before, after = (trunk(model, x, keep) for x in (hidden, changed))
    assert torch.equal(before, after)


def test_frames_one_by_one_score_as_the_clip_does(model: VideoLM, pixels: Tensor) -> None:
    whole = stem(model, pixels)
    previous = torch.zeros(1, model.cfg.vision.num_cells, model.cfg.vision.width)
    for i in range(FRAMES):
        one = model.vit_stem(pixels[i : i + 1], previous, torch.tensor([i == 0]))
        for mine, clip in zip(one, whole, strict=True):
            close(mine[0], clip[i])
        previous = one[1]


def test_a_clip_behind_another_is_as_if_alone(model: VideoLM, pixels: Tensor) -> None:
    previous = torch.zeros(1, model.cfg.vision.num_cells, model.cfg.vision.width)
    starts = torch.tensor([True, False, True, False])
    together = model.vit_stem(pixels, previous, starts)
    alone = stem(model, pixels[2:])
    for mine, clip in zip(together, alone, strict=True):
        close(mine[2:], clip)


def clip_prompt(model: VideoLM) -> tuple[Tensor, list[int], list[int]]:
    """Embeddings, block numbers and frame ends: a begin token, three stamped frames, text."""
    blocks, ends = [-1], []
    for frame in range(3):
        blocks += [-1, -1] + [frame] * (3 + frame)
        ends.append(len(blocks))
    blocks += [-1] * 4
    generator = torch.Generator().manual_seed(4)
    return torch.randn(len(blocks), model.cfg.language.width, generator=generator), blocks, ends


def read_in_parts(model: VideoLM, embeds: Tensor, blocks: list[int], ends: list[int]) -> Tensor:
    logits, past, start = [], None, 0
    for stop in [*ends, *range(ends[-1] + 1, len(blocks) + 1)]:
        part, past = read(model, embeds[start:stop], blocks, start, past)
        logits.append(part)
        start = stop
    return torch.cat(logits)


def test_frame_by_frame_reading_is_reading_the_clip(model: VideoLM) -> None:
    embeds, blocks, ends = clip_prompt(model)
    whole, _ = read(model, embeds, blocks)
    close(read_in_parts(model, embeds, blocks, ends), whole)


def test_with_all_vision_tokens_in_one_block_it_is_not(model: VideoLM) -> None:
    """The published mask shows early frames the later ones, so their cache cannot be kept."""
    embeds, blocks, ends = clip_prompt(model)
    blocks = [min(block, 0) for block in blocks]
    whole, _ = read(model, embeds, blocks)
    assert (read_in_parts(model, embeds, blocks, ends) - whole).abs().max() > 1e-2


def test_a_truncated_question_was_never_asked(model: VideoLM) -> None:
    embeds, blocks, ends = clip_prompt(model)
    mark = ends[-1]
    _, past = read(model, embeds[:mark], blocks)
    asked, again = embeds[mark:], embeds[mark:].flip(0)
    never, _ = read(model, again, blocks, mark, past)
    _, longer = read(model, asked, blocks, mark, past)
    after, _ = read(model, again, blocks, mark, cut(longer, mark))
    assert torch.equal(after, never)


def test_reference_mode_without_removal_is_the_streaming_one(pixels: Tensor) -> None:
    cfg = tiny()
    assert cfg.scorer is not None
    by_row = dataclasses.replace(cfg, scorer=dataclasses.replace(cfg.scorer, rescale=Rescale.ROW))
    model = random_model(by_row)
    hidden, _, scores = stem(model, pixels)
    run = encode_reference(model, pixels, [FRAMES], keep_ratio=1.0)
    close(run.scores_FC, scores)
    streamed = trunk(model, hidden, run.kept_FC)
    close(run.features_GE, streamed)


def random_model(cfg: ModelConfig) -> VideoLM:
    return VideoLM(cfg).init_weights(torch.Generator().manual_seed(5)).eval()
