"""Whole clips: each mode's rules, and that ours gives what frame by frame gives."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edge_vlm.config import ModelConfig, Rescale
from edge_vlm.model.clips import encode_clips
from edge_vlm.model.reference import encode_reference
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import tiny
from edge_vlm.pruning.clip_budget import num_kept
from tests.model import literal_reference

CELLS = tiny().vision.num_cells


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield


def with_rescale(rescale: Rescale) -> ModelConfig:
    cfg = tiny()
    assert cfg.scorer is not None
    return dataclasses.replace(cfg, scorer=dataclasses.replace(cfg.scorer, rescale=rescale))


def random_model(cfg: ModelConfig) -> VideoLM:
    return VideoLM(cfg).init_weights(torch.Generator().manual_seed(3)).eval()


def random_pixels(frames: int, seed: int) -> Tensor:
    vision = tiny().vision
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(frames, vision.num_patches, vision.patch_dim, generator=generator)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def frame_by_frame(model: VideoLM, pixels: Tensor, kept_FC: Tensor) -> tuple[Tensor, Tensor]:
    """Features and scores of a clip whose frames come one at a time."""
    previous = torch.zeros(1, CELLS, model.cfg.vision.width)
    features, scores = [], []
    for i, keep in enumerate(kept_FC):
        hidden, previous, score = model.vit_stem(
            pixels[i : i + 1], previous, torch.tensor([i == 0])
        )
        cells = keep.nonzero().squeeze(1)
        features.append(model.vit_trunk(hidden, cells, torch.zeros_like(cells)))
        scores.append(score)
    return torch.cat(features), torch.cat(scores)


clips = st.lists(st.integers(1, 5), min_size=1, max_size=3)
shares = st.sampled_from([1.0, 0.7, 0.5, 0.2, 0.05])


@settings(max_examples=20)
@given(clips, shares, st.integers(0, 999), st.sampled_from([Rescale.FRAME, Rescale.ABSOLUTE]))
def test_a_pack_of_clips_is_each_clip_frame_by_frame(
    frames_per_clip: list[int], keep_ratio: float, seed: int, rescale: Rescale
) -> None:
    model, pixels = random_model(with_rescale(rescale)), random_pixels(sum(frames_per_clip), seed)
    run = encode_clips(model, pixels, frames_per_clip, keep_ratio=keep_ratio)
    assert run.scores_FC is not None
    sizes = [int(kept.sum()) for kept in run.kept_FC.split(frames_per_clip)]
    for clip, kept, scores, features in zip(
        pixels.split(frames_per_clip),
        run.kept_FC.split(frames_per_clip),
        run.scores_FC.split(frames_per_clip),
        run.features_GE.split(sizes),
        strict=True,
    ):
        streamed, streamed_scores = frame_by_frame(model, clip, kept)
        close(features, streamed)
        close(scores, streamed_scores)


@settings(max_examples=30)
@given(clips, shares, st.integers(0, CELLS), st.integers(0, 999))
def test_first_frames_stay_whole_and_every_frame_keeps_its_minimum(
    frames_per_clip: list[int], keep_ratio: float, least: int, seed: int
) -> None:
    """What a quiet clip loses under the published rule: its only frame, or all frames but one."""
    model = random_model(tiny())
    pixels = random_pixels(sum(frames_per_clip), seed)
    run = encode_clips(model, pixels, frames_per_clip, keep_ratio=keep_ratio, min_cells=least)
    assert run.scores_FC is not None
    for frames, kept, scores in zip(
        frames_per_clip,
        run.kept_FC.split(frames_per_clip),
        run.scores_FC.split(frames_per_clip),
        strict=True,
    ):
        assert bool(kept[0].all())
        assert bool((kept[1:].sum(1) >= least).all())
        assert int(kept.sum()) == num_kept(frames, CELLS, keep_ratio, least, variant="first_whole")
        for row, score in zip(kept[1:], scores[1:], strict=True):  # a frame keeps its best
            if 0 < row.sum() < CELLS:
                assert score[row].min() >= score[~row].max()


@pytest.mark.parametrize("rescale", Rescale)
def test_the_bias_of_each_rescaling_is_its_formula(rescale: Rescale) -> None:
    """In the published code the row is one of patches; a row of cells gives the same."""
    model = random_model(with_rescale(rescale))
    assert model.scorer is not None
    scores = torch.rand(3, CELLS, generator=torch.Generator().manual_seed(0)) * 0.1
    is_first = torch.tensor([True, False, False])
    found = model.vit.spread(model.scorer.key_bias(scores, is_first))
    maps, least = literal_reference.to_patches(scores), math.exp(-2)
    for frame, patches in enumerate(maps):
        for row in range(patches.shape[0]):
            for column in range(patches.shape[1]):
                unit = float(patches[row, column])
                if rescale is not Rescale.ABSOLUTE:
                    among = patches[row] if rescale is Rescale.ROW else patches
                    low, high = float(among.min()), float(among.max())
                    unit = (unit - low) / (high - low + 1e-6)
                expected = 0.0 if frame == 0 else math.log(least + (1 - least) * unit)
                place = row * patches.shape[1] + column
                assert float(found[frame, place]) == pytest.approx(expected, abs=1e-5)


def test_a_published_checkpoint_gets_the_published_computation() -> None:
    model, pixels = random_model(with_rescale(Rescale.ROW)), random_pixels(5, 0)
    run, theirs = (
        encode_clips(model, pixels, [3, 2], keep_ratio=0.5),
        encode_reference(model, pixels, [3, 2], keep_ratio=0.5),
    )
    assert torch.equal(run.features_GE, theirs.features_GE)
    assert torch.equal(run.kept_FC, theirs.kept_FC)


def test_a_scorer_that_likes_everything_is_no_scorer() -> None:
    """Nothing removed and no key held back: the unpruned model."""
    plain = random_model(dataclasses.replace(tiny(), scorer=None))
    scored = random_model(with_rescale(Rescale.ABSOLUTE))
    scored.load_state_dict(plain.state_dict(), strict=False)
    assert scored.scorer is not None
    scored.scorer.fc3.bias.fill_(50.0)
    pixels = random_pixels(4, 1)
    everything = encode_clips(plain, pixels, [4], keep_ratio=1.0)
    assert everything.scores_FC is None
    assert bool(everything.kept_FC.all())
    close(encode_clips(scored, pixels, [4], keep_ratio=1.0).features_GE, everything.features_GE)


def test_wrong_use_is_refused() -> None:
    pixels = random_pixels(3, 0)
    model = random_model(tiny())
    for bad in ([2], [4], [3, 0], []):
        with pytest.raises(ValueError, match="frames_per_clip"):
            encode_clips(model, pixels, bad, keep_ratio=0.5)
    for share in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="keep_ratio"):
            encode_clips(model, pixels, [3], keep_ratio=share)
    with pytest.raises(ValueError, match="without a scorer"):
        encode_clips(
            random_model(dataclasses.replace(tiny(), scorer=None)), pixels, [3], keep_ratio=0.5
        )
