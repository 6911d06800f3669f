"""The counted operations are the computed ones: nothing more, so dropped cells cost nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from edge_vlm.flops import language_flops, scorer_flops, vision_flops
from edge_vlm.model.ragged import Method
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import tiny
from tests.model.prompts import read

CELLS = tiny().vision.num_cells


def counted(model: VideoLM, cells_per_frame: list[int], method: Method | None = None) -> int:
    """Operations that torch counts while it computes this many cells of each frame."""
    cfg = model.cfg.vision
    frames = len(cells_per_frame)
    keep = torch.arange(CELLS)[None] < torch.tensor(cells_per_frame)[:, None]
    cells = keep.flatten().nonzero().squeeze(1)
    pixels = torch.randn(frames, cfg.num_patches, cfg.patch_dim)
    # With gradients every product is written out, where the counter sees it.
    with FlopCounterMode(display=False) as counter:
        if model.scorer is None:
            hidden = model.vit.embed(pixels)
        else:
            nobody = torch.zeros(1, CELLS, cfg.width)
            hidden = model.vit_stem(pixels, nobody, torch.arange(frames) == 0)[0]
        model.vit_trunk(hidden, cells, cells // CELLS, method=method)
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    "kept", [[CELLS] * 3, [CELLS, 4, 4], [CELLS, 0, 1, 7], [5], [0, 0, 1]], ids=str
)
def test_vision_computes_what_is_kept_and_no_more(kept: list[int]) -> None:
    model = VideoLM(tiny())
    assert counted(model, kept) == vision_flops(model.cfg, kept)


def test_the_mask_computes_pairs_in_vain() -> None:
    """What the count above would miss if frames of unequal length were not kept apart."""
    model, kept = VideoLM(tiny()), [CELLS, 4, 4]
    assert counted(model, kept, Method.MASK) > vision_flops(model.cfg, kept)


def test_without_a_scorer_whole_frames_are_counted() -> None:
    model = VideoLM(dataclasses.replace(tiny(), scorer=None))
    assert counted(model, [CELLS] * 2) == vision_flops(model.cfg, [CELLS] * 2)
    assert scorer_flops(model.cfg) == 0
    with pytest.raises(ValueError, match="keeps every cell"):
        vision_flops(model.cfg, [CELLS, 1])


def test_language_operations_are_those_computed() -> None:
    model = VideoLM(tiny())
    cfg = model.cfg.language
    with FlopCounterMode(display=False) as counter:
        _, past = read(model, torch.randn(7, cfg.width), [-1] * 7)
        read(model, torch.randn(2, cfg.width), [-1] * 9, 7, past)
    head = 2 * 9 * cfg.width * cfg.base_vocab
    expected = language_flops(cfg, 7) + language_flops(cfg, 2, 7) + head
    assert counter.get_total_flops() == expected
