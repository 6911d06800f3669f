"""Reuse drawn in training: off it changes nothing, on it computes what a session computes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from edge_vlm.config import Rescale, VisionAttention
from edge_vlm.model.reuse import reuse_clips
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import demo, tiny
from edge_vlm.pruning.reuse import ReuseRule, computed_cells
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm.world.questions import vocabulary
from edge_vlm_training.config import msgspec
from edge_vlm_training.data.sample import draw_reuse
from edge_vlm_training.data.sources.world_clips import WorldClips
from edge_vlm_training.objective.objective import Objective, totals_of
from edge_vlm_training.objective.terms import Totals
from edge_vlm_training.objective.vision import see_clips, to_pixel_values
from edge_vlm_training.recipes.base import Answers, Clips, Recipe, Rows, Similarity, Stage, Steps
from edge_vlm_training.world.curriculum import QuestionMix
from edge_vlm_training.world.vocabulary import build_tokenizer
from tests.training.trainer.batches import make_batch


def model_of(rescale: Rescale = Rescale.FRAME) -> VideoLM:
    small = tiny()
    assert small.scorer is not None
    scorer = dataclasses.replace(small.scorer, rescale=rescale)
    cfg = dataclasses.replace(small, scorer=scorer, attention=VisionAttention.FRAME)
    return VideoLM(cfg).init_weights(torch.Generator().manual_seed(1))


def gradients(model: VideoLM, reuse: tuple[float, ...]) -> tuple[float, dict[str, torch.Tensor]]:
    objective = Objective(model, (Answers(), Similarity()))
    batch = dataclasses.replace(make_batch(model.cfg.vision, ((3, 2),), 7), reuse=reuse)
    objective.zero_grad()
    loss = objective(batch, Totals(*totals_of([batch], model.cfg.vision.num_cells))).loss
    loss.backward()
    named = objective.model.named_parameters()
    return loss.item(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def test_where_everything_changes_loss_and_gradients_are_those_without() -> None:
    """Pictures of a batch are noise, so each cell changes by more than a threshold of 1."""
    model = model_of()
    loss, expected = gradients(model, ())
    reused, found = gradients(model, (1.0, 1.0))
    assert reused == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=2e-6, msg=name)


@torch.no_grad()
def test_each_clip_computes_what_a_stream_with_its_threshold_would() -> None:
    model = model_of()
    vision = model.cfg.vision
    batch = make_batch(vision, ((3, 2),), 7)
    pixels = to_pixel_values(batch.frames_FSS3, vision, torch.float32)
    pixels[1:3] = pixels[0] + 0.01
    pixels[2, 40] += 1.0
    seen = see_clips(model, pixels, (3, 2), 1.0, 0, torch.float32, selection="clip", reuse=(8, 0))
    rule = ReuseRule(threshold=8)
    still = torch.from_numpy(computed_cells([pixels[:3].numpy()], vision.num_cells, rule))
    assert still.sum(1).tolist() == [9, 1, 1]
    computed = torch.cat([still, torch.ones(2, vision.num_cells, dtype=torch.bool)])
    is_first = torch.tensor([True, False, False, True, False])
    hidden = reuse_clips(model, pixels, computed, is_first).hidden_FND
    cells = torch.arange(5 * vision.num_cells)
    torch.testing.assert_close(
        seen.features_GE, model.vit_trunk(hidden, cells, cells // vision.num_cells)
    )
    plain = see_clips(model, pixels, (3, 2), 1.0, 0, torch.float32, selection="clip")
    assert (seen.features_GE[9:18] - plain.features_GE[9:18]).abs().max() > 1e-3
    torch.testing.assert_close(seen.features_GE[27:], plain.features_GE[27:])
    assert seen.aux_sum < plain.aux_sum


def test_the_published_computation_knows_no_reuse() -> None:
    model = model_of(Rescale.ROW)
    batch = make_batch(model.cfg.vision, ((3, 2),), 7)
    pixels = to_pixel_values(batch.frames_FSS3, model.cfg.vision, torch.float32)
    with pytest.raises(ValueError, match="published"):
        see_clips(model, pixels, (3, 2), 0.5, 0, torch.float32, reuse=(8.0, 8.0))
    rows = Rows(batch=1, device_batch=1, sequence_length=64, reuse=(0.0, 8.0))
    stage = Stage(name="a", length=Steps(1), data=rows, terms=(Answers(),), train={"llm": 1e-3})
    with pytest.raises(ValueError, match="published computation"):
        Recipe(name="a", stages=(stage,), rescale=Rescale.ROW)


def test_thresholds_are_drawn_for_each_clip_and_nothing_else_is_drawn_differently() -> None:
    assert draw_reuse((0.0,), 8, 3) == ()
    drawn = draw_reuse((0.0, 4.0, 8.0), 400, 3)
    assert drawn == draw_reuse((0.0, 4.0, 8.0), 400, 3) != draw_reuse((0.0, 4.0, 8.0), 400, 4)
    assert min(drawn.count(each) for each in (0.0, 4.0, 8.0)) > 90


def test_rendered_clips_are_the_same_ones_with_reuse(tmp_path: Path) -> None:
    sizes = build_tokenizer(vocabulary(), tmp_path / "tokenizer.json")
    prompt = PromptFormat(Tokenizer.from_file(tmp_path / "tokenizer.json"))
    plain = Clips(batch=3, num_frames=2, branches=2)
    thresholds = (4.0, 8.0)
    batches = [
        WorldClips(data, demo(*sizes), prompt, QuestionMix(1), 5)
        for data in (plain, msgspec.structs.replace(plain, reuse=thresholds))
    ]
    for _ in range(2):
        off, on = (stream.next_batch() for stream in batches)
        assert torch.equal(off.frames_FSS3, on.frames_FSS3)
        assert (off.keep_ratio, off.selection, off.seed) == (on.keep_ratio, on.selection, on.seed)
        assert off.reuse == ()
        assert len(on.reuse) == 3
        assert set(on.reuse) <= set(thresholds)


def test_a_recipe_refuses_thresholds_that_are_none() -> None:
    for wrong in ((), (-1.0,), (256.0,)):
        with pytest.raises(ValueError, match="reuse"):
            Clips(batch=1, reuse=wrong)
