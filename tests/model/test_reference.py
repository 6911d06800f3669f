"""The published code's rules for what is dropped and which frames keep all patches as context."""

from __future__ import annotations

import pytest
import torch

from edge_vlm.config import tiny
from edge_vlm.model.reference import encode_reference, frames_alone, keep_by_clip
from edge_vlm.model.video_lm import VideoLM

CELLS = 81


@pytest.mark.parametrize(
    ("frames", "removed", "first", "later"),
    [(1, 0.5, 41, 0), (2, 0.5, 81, 0), (4, 0.8, 65, 0), (4, 0.5, 81, 81), (3, 0.0, 81, 162)],
)
def test_the_count_is_exact_and_the_first_frame_goes_last(
    frames: int, removed: float, first: int, later: int
) -> None:
    scores = torch.rand(frames, CELLS, generator=torch.Generator().manual_seed(frames))
    kept = keep_by_clip(scores, [frames], removed)
    assert (int(kept[0].sum()), int(kept[1:].sum())) == (first, later)
    if later:
        dropped = scores[1:][~kept[1:]]
        assert dropped.numel() == 0 or scores[1:][kept[1:]].min() >= dropped.max()


def test_every_clip_of_a_pack_has_its_own_budget() -> None:
    scores = torch.rand(5, CELLS, generator=torch.Generator().manual_seed(0))
    scores[3:] *= 0.01
    kept = keep_by_clip(scores, [3, 2], 0.5)
    assert torch.equal(kept[:3], keep_by_clip(scores[:3], [3], 0.5))
    assert torch.equal(kept[3:], keep_by_clip(scores[3:], [2], 0.5))


@pytest.mark.parametrize(
    ("counts", "alone"),
    [
        ([81, 30, 31, 33, 37, 31], [0, 1]),  # 37+33, 31+31, 30
        ([40, 41], []),  # fill one row exactly
        ([41, 41], [0, 1]),
        ([81, 0, 40], [0, 2]),  # an empty frame is not packed
        ([20, 20, 20, 20, 20], [4]),  # four of them fill the first row
        ([0, 0], []),
    ],
)
def test_frames_left_alone_by_first_fit_descending(counts: list[int], alone: list[int]) -> None:
    assert frames_alone(counts, CELLS) == alone


def test_wrong_use_is_refused() -> None:
    model = VideoLM(tiny())
    pixels = torch.zeros(3, model.cfg.vision.num_patches, model.cfg.vision.patch_dim)
    with pytest.raises(ValueError, match="frames_per_clip"):
        encode_reference(model, pixels, [2], 0.5)
    with pytest.raises(ValueError, match="rescale"):
        encode_reference(model, pixels, [3], 0.5)
