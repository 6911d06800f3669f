"""The loss of a packed batch against one written out clip by clip, and against recorded values."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from edge_vlm.config import ModelConfig, Rescale, VisionAttention
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import tiny
from edge_vlm_training.data.packing.batch import IGNORED, NOWHERE, PackedBatch
from edge_vlm_training.objective.losses import answer_sums, similarity_errors
from edge_vlm_training.objective.objective import Objective, totals_of
from edge_vlm_training.objective.terms import Totals
from edge_vlm_training.objective.vision import (
    aux_count,
    first_frames,
    see_clips,
    to_pixel_values,
)
from edge_vlm_training.recipes.base import Answers, Similarity
from tests.golden.compare import below, build, read
from tests.training.trainer.batches import make_batch

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "train.safetensors"
Z_LOSS, AUX = 1e-2, 0.5


def model_of(rescale: Rescale, attention: VisionAttention) -> VideoLM:
    small = tiny()
    assert small.scorer is not None
    scorer = dataclasses.replace(small.scorer, rescale=rescale)
    cfg = dataclasses.replace(small, scorer=scorer, attention=attention)
    return VideoLM(cfg).init_weights(torch.Generator().manual_seed(1))


def objective_of(model: VideoLM) -> Objective:
    return Objective(model, (Answers(z_loss=Z_LOSS), Similarity(AUX)))


def totals(cfg: ModelConfig, batches: list[PackedBatch]) -> Totals:
    return Totals(*totals_of(batches, cfg.vision.num_cells))


def run(objective: Objective, batches: list[PackedBatch]) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss over all batches as the loop adds it up, and its gradients."""
    cfg = objective.model.cfg
    objective.zero_grad()
    over = totals(cfg, batches)
    loss = 0.0
    for batch in batches:
        part = objective(batch, over).loss
        part.backward()
        loss += part.item()
    named = objective.model.named_parameters()
    return loss, {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("attention", VisionAttention)
@pytest.mark.parametrize("rescale", [Rescale.ABSOLUTE, Rescale.FRAME, Rescale.ROW])
def test_however_clips_are_packed_the_loss_and_gradients_are_the_same(
    rescale: Rescale, attention: VisionAttention
) -> None:
    """Three clips in one row with padding beside it; or each alone in a batch of its own."""
    objective = objective_of(model_of(rescale, attention))
    vision = objective.model.cfg.vision
    packed = make_batch(vision, ((3, 1), (4,)), 7)
    alone = [_only_clip(packed, number) for number in range(3)]
    loss, gradients = run(objective, [packed])
    apart, of_apart = run(objective, alone)
    assert apart == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == of_apart.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(of_apart[name], gradient, rtol=2e-3, atol=2e-6, msg=name)


def _only_clip(batch: PackedBatch, clip: int) -> PackedBatch:
    """One clip of a batch as a batch, numbers starting at 0."""
    counts = batch.frames_per_clip
    first = sum(counts[:clip])
    mine = batch.tokens.clip_RS == clip
    columns = {
        f.name: getattr(batch.tokens, f.name)[mine][None] for f in dataclasses.fields(batch.tokens)
    }
    columns["clip_RS"] = torch.zeros_like(columns["clip_RS"])
    columns["frame_RS"] = columns["frame_RS"] - first
    cells = columns["cell_RS"]
    num_cells = int(cells.max() - cells[cells != NOWHERE].min() + 1) // counts[clip]
    columns["cell_RS"] = torch.where(cells == NOWHERE, cells, cells - first * num_cells)
    branches = columns["branch_RS"]
    lowest = branches[branches != NOWHERE].min()
    columns["branch_RS"] = torch.where(branches == NOWHERE, branches, branches - lowest)
    return dataclasses.replace(
        batch,
        frames_FSS3=batch.frames_FSS3[first : first + counts[clip]],
        times_s_F=batch.times_s_F[first : first + counts[clip]],
        frames_per_clip=(counts[clip],),
        tokens=type(batch.tokens)(**columns),
    )


def test_similarity_excludes_first_frames_of_every_clip_by_brute_force() -> None:
    model = model_of(Rescale.FRAME, VisionAttention.FRAME)
    batch = make_batch(model.cfg.vision, ((3, 1, 2), (4,)), 3)
    counts = batch.frames_per_clip
    with torch.no_grad():
        pixels = to_pixel_values(batch.frames_FSS3, model.cfg.vision, torch.float32)
        seen = see_clips(model, pixels, counts, 0.5, 1, torch.float32)
        expected, number, start = torch.zeros(()), 0, 0
        for frames in counts:
            clip = pixels[start : start + frames]  # alone: nothing before its first frame
            x = model.embed_frames(clip)
            nobody = torch.zeros(1, model.cfg.vision.num_cells, model.cfg.vision.width)
            _, scores = model.score_frames(x, nobody, first_frames([frames], x.device))
            patches = model.vit.cells(x)
            for t in range(1, frames):
                for cell in range(patches.shape[1]):
                    now, before = patches[t, cell].flatten(), patches[t - 1, cell].flatten()
                    target = 1 - F.cosine_similarity(now, before, dim=0)
                    expected += (scores[t, cell] - target) ** 2
                    number += 1
            start += frames
    assert number == aux_count(counts, model.cfg.vision.num_cells) == (2 + 0 + 1 + 3) * 9
    torch.testing.assert_close(seen.aux_sum, expected, rtol=1e-4, atol=1e-5)


def test_padded_tokens_and_frames_that_do_not_exist_cost_nothing() -> None:
    objective = objective_of(model_of(Rescale.FRAME, VisionAttention.ALL))
    batch = make_batch(objective.model.cfg.vision, ((2,), (1,)), 5)
    wider = dataclasses.replace(
        batch,
        tokens=type(batch.tokens)(
            **{
                f.name: F.pad(
                    getattr(batch.tokens, f.name),
                    (0, 40),
                    value={"target_RS": IGNORED, "clip_RS": -1, "branch_RS": -1, "cell_RS": -1}.get(
                        f.name, 0
                    ),
                )
                for f in dataclasses.fields(batch.tokens)
            }
        ),
    )
    assert run(objective, [wider])[0] == pytest.approx(run(objective, [batch])[0], rel=1e-6)


def test_the_target_is_detached_in_our_mode_and_not_in_the_published_one() -> None:
    """Only there does the similarity loss reach the blocks that the scorer looks at, twice."""
    for rescale, detached in ((Rescale.FRAME, True), (Rescale.ROW, False)):
        model = model_of(rescale, VisionAttention.FRAME)
        batch = make_batch(model.cfg.vision, ((4,),), 2)
        pixels = to_pixel_values(batch.frames_FSS3, model.cfg.vision, torch.float32)
        is_first = first_frames((4,), pixels.device)
        assert model.scorer is not None

        def gradient(loss: torch.Tensor, model: VideoLM = model) -> torch.Tensor:
            (found,) = torch.autograd.grad(loss, [model.vit.patch_embed.weight])
            return found

        seen = gradient(see_clips(model, pixels, (4,), 0.5, 1, torch.float32).aux_sum)
        x = model.embed_frames(pixels)
        nobody = x.new_zeros(1, model.cfg.vision.num_cells, x.shape[-1])
        _, scores = model.score_frames(x, nobody, is_first)
        cells = model.vit.cells(x)
        errors = similarity_errors(scores, cells, is_first, detach_target=detached)
        torch.testing.assert_close(seen, gradient(errors.sum()), rtol=1e-4, atol=1e-6)
        scores = model.score_frames(x.detach(), nobody, is_first)[1]
        if detached:  # through the scores alone, which is not nothing
            assert seen.abs().max() > 0


def test_the_language_loss_reaches_the_scorer_by_the_bias_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of(Rescale.FRAME, VisionAttention.FRAME)
    objective = Objective(model, (Answers(),))
    batch = make_batch(model.cfg.vision, ((4,),), 2)
    _, gradients = run(objective, [batch])
    assert float(gradients["scorer.fc3.weight"].abs().max()) > 0
    assert model.scorer is not None
    monkeypatch.setattr(model.scorer, "key_bias", lambda scores, _: torch.zeros_like(scores))
    _, without = run(objective, [batch])
    assert "scorer.fc3.weight" not in without or not without["scorer.fc3.weight"].any()


def test_answer_sums_equal_cross_entropy_and_squared_log_partition() -> None:
    logits, targets = torch.randn(5, 7), torch.tensor([1, 2, 3, 0, 6])
    weights = torch.tensor([1.0, 0.0, 3.0, 0.1, 2.0])
    answer, squares, right = answer_sums(logits, targets, weights)
    each = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(answer, (each * weights).sum())
    torch.testing.assert_close(squares, (logits.exp().sum(-1).log() ** 2 * weights).sum())
    assert int(right) == int((logits.argmax(-1) == targets).sum())


def test_the_recorded_training_step_is_met() -> None:
    """Loss and scorer gradients of the published code, by the sums this loop uses."""
    tensors, metadata = read(GOLDEN)
    pixels = tensors["input.images"][0]
    model = build(below(tensors, "weight."), pixels.shape[1])
    counts = (len(pixels),)
    seen = see_clips(model, pixels, counts, 1 - float(metadata["topk"]), 0, torch.float32)
    aux = seen.aux_sum / aux_count(counts, model.cfg.vision.num_cells)
    recorded = tensors["output.aux_loss"]
    torch.testing.assert_close(AUX * aux, recorded.reshape(()), rtol=1e-4, atol=1e-5)
    loss = AUX * aux + seen.features_GE.square().mean()
    torch.testing.assert_close(loss, tensors["output.loss"].reshape(()), rtol=1e-4, atol=1e-5)
    loss.backward()
    assert model.scorer is not None
    bias = tensors["grad.image_vit.transformer.temporal_token_scorer.mlp.w1.bias"]
    assert model.scorer.fc1.bias.grad is not None
    torch.testing.assert_close(model.scorer.fc1.bias.grad, bias, rtol=1e-3, atol=1e-4)
