"""The losses against brute force and against the reference's recorded value."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from edge_vlm.model.selection import clip_budget
from edge_vlm.pruning.clip_budget import num_kept
from edge_vlm_training.objective.losses import (
    exact_answers,
    feature_scale_loss,
    neighbour_similarity,
    similarity_errors,
)

FIRST = torch.tensor([True, False, False, True, False])


def _patches() -> torch.Tensor:
    return torch.randn(5, 4, 9, 6, generator=torch.Generator().manual_seed(0))


def test_similarity_loss_equals_brute_force_and_skips_clip_starts() -> None:
    patches, scores = _patches(), torch.rand(5, 4, generator=torch.Generator().manual_seed(1))
    errors = []
    for frame in (1, 2, 4):  # frames 0 and 3 start clips
        for cell in range(4):
            here, before = patches[frame, cell].flatten(), patches[frame - 1, cell].flatten()
            target = 1 - F.cosine_similarity(here, before, dim=0)
            errors.append((scores[frame, cell] - target) ** 2)
    torch.testing.assert_close(
        similarity_errors(scores, patches, FIRST).mean(), torch.stack(errors).mean()
    )


def test_identical_frames_are_similar_and_a_single_frame_costs_nothing() -> None:
    patches = _patches()[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(neighbour_similarity(patches)[1:], torch.ones(2, 4))
    scores = torch.rand(1, 4, requires_grad=True)
    assert len(similarity_errors(scores, patches[:1], torch.tensor([True]))) == 0


def test_target_gradient_reaches_the_features_only_when_asked() -> None:
    scores = torch.full((5, 4), 0.3)
    for detach in (True, False):
        patches = _patches().requires_grad_()
        loss = similarity_errors(
            scores.requires_grad_(), patches, FIRST, detach_target=detach
        ).mean()
        loss.backward()
        assert (patches.grad is None) is detach


def test_an_answer_is_right_only_if_all_its_tokens_are() -> None:
    logits = F.one_hot(torch.tensor([4, 5, 6, 0]), 8).float()
    targets, question = torch.tensor([4, 5, 6, 1]), torch.tensor([0, 0, 1, 2])
    assert exact_answers(logits, targets, question, 3).tolist() == [True, True, False]


def test_clip_budget_keeps_the_exact_number_the_first_frame_and_the_best() -> None:
    scores = torch.rand(3, 4, 9, generator=torch.Generator().manual_seed(2))
    for keep_ratio, floor in ((1.0, 0), (0.7, 2), (0.5, 0), (0.1, 1)):
        mask = clip_budget(scores, keep_ratio, floor, variant="first_whole")
        kept = num_kept(4, 9, keep_ratio, floor, variant="first_whole")
        assert mask.flatten(1).sum(1).tolist() == [kept] * 3
        assert bool(mask[:, 0].all())
        assert int(mask[:, 1:].sum(-1).min()) >= floor
    later = clip_budget(scores, 0.5, variant="first_whole")[:, 1:]
    assert float(scores[:, 1:][later].min()) > 0
    for clip in range(3):
        best, dropped = scores[clip, 1:][later[clip]], scores[clip, 1:][~later[clip]]
        assert float(best.min()) >= float(dropped.max())


def test_feature_scale_loss_pulls_large_features_down_and_leaves_small_ones() -> None:
    assert feature_scale_loss(torch.full((3, 4), 3.9)).item() == 0.0
    large = torch.full((3, 4), 40.0, requires_grad=True)
    loss = feature_scale_loss(large)
    loss.backward()
    assert loss.item() > 0
    assert large.grad is not None
    assert bool((large.grad > 0).all())
