"""The published code's rules for what is dropped and which frames keep all patches as context."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_vlm.config import Rescale
from edge_vlm.model.reference import encode_reference
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import tiny
from edge_vlm.pruning.clip_budget import frames_alone
from tests.model import literal_reference

CELLS = 81
CELLS_OF_TINY = tiny().vision.num_cells


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
        encode_reference(model, pixels, [2], keep_ratio=0.5)
    with pytest.raises(ValueError, match="rescale"):
        encode_reference(model, pixels, [3], keep_ratio=0.5)


# ---- against the published computation, written out ------------------------------------------

BY_ROW = dataclasses.replace(
    tiny(),
    scorer=dataclasses.replace(tiny().scorer, rescale=Rescale.ROW),  # type: ignore[type-var]
)


def random_model() -> VideoLM:
    return VideoLM(BY_ROW).init_weights(torch.Generator().manual_seed(7)).eval()


def random_pixels(frames: int, seed: int) -> torch.Tensor:
    vision = BY_ROW.vision
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(frames, vision.num_patches, vision.patch_dim, generator=generator)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Scores are stretched from nearly equal ones, which stretches their rounding, too.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=5e-5)


@settings(max_examples=25)
@given(
    frames_per_clip=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    removed=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.65, 0.8, 0.95]),
    seed=st.integers(0, 999),
    leak=st.booleans(),
)
def test_packs_of_clips_are_encoded_as_the_published_code_packs_them(
    frames_per_clip: list[int], removed: float, seed: int, leak: bool
) -> None:
    model, pixels = random_model(), random_pixels(sum(frames_per_clip), seed)
    with torch.no_grad():
        theirs = literal_reference.encode(model, pixels, frames_per_clip, removed, leak)
        ours = encode_reference(
            model, pixels, frames_per_clip, keep_ratio=1 - removed, previous_across_clips=leak
        )
    close(ours.scores_FC, theirs.scores_FC)
    assert torch.equal(ours.kept_FC, theirs.kept_FC)
    close(ours.features_GE, theirs.features)
    for i, hidden in ours.hidden_FND.items():
        close(hidden, theirs.hidden[i])


def test_the_cases_above_pack_and_refill() -> None:
    """A frame alone in its row sees its dropped patches, and it shows; frames in a pair do not."""
    model, pixels = random_model(), random_pixels(8, 0)
    found = {}
    for removed in (0.3, 0.7):
        theirs = literal_reference.encode(model, pixels, [8], removed)
        found[removed] = (theirs.num_rows, theirs.num_refilled)
    assert found[0.3][1] > 0
    assert found[0.7][0] < 8
    theirs = literal_reference.encode(model, pixels, [8], 0.3)
    run = encode_reference(model, pixels, [8], keep_ratio=0.7)
    cells = run.kept_FC.flatten().nonzero().squeeze(1)
    not_refilled = model.vit_trunk(run.hidden_FND[2], cells, cells // CELLS_OF_TINY)
    assert (not_refilled - theirs.features).abs().max() > 1e-2


def test_gradients_are_those_of_the_published_packing() -> None:
    model, pixels = random_model(), random_pixels(7, 1)
    vision = {name: p for name, p in model.named_parameters() if not name.startswith("llm.")}
    found = [
        torch.autograd.grad(features.square().sum(), list(vision.values()))
        for features in (
            literal_reference.encode(model, pixels, [4, 3], 0.5).features,
            encode_reference(model, pixels, [4, 3], keep_ratio=0.5).features_GE,
        )
    ]
    assert any(name.startswith("scorer.") for name in vision)
    largest = max(float(gradient.abs().max()) for gradient in found[0])
    for name, theirs, ours in zip(vision, *found, strict=True):
        # The softmax cancels what a bias of the keys adds.
        assert name.endswith("k.bias") or theirs.abs().max() > 1e-5 * largest, name
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6 * largest)
