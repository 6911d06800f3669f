"""Prefix and rows are two forms of one batch: the same loss, probes and gradients."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from edge_vlm.config import Rescale, VisionAttention
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import tiny
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm.world.questions import vocabulary
from edge_vlm_training.config import msgspec
from edge_vlm_training.data.packing.batch import Batch, PackedBatch
from edge_vlm_training.data.packing.row_stream import PackingConfig
from edge_vlm_training.data.packing.stream import PackedStream
from edge_vlm_training.data.sources.world_clips import WorldClips
from edge_vlm_training.objective.objective import BatchSums, Objective, totals_of
from edge_vlm_training.objective.terms import Totals, make_probes
from edge_vlm_training.recipes.base import Answers, Clips, Form, Similarity, Steps, Term
from edge_vlm_training.recipes.demo import questions
from edge_vlm_training.world.curriculum import QuestionMix
from edge_vlm_training.world.vocabulary import build_tokenizer
from tests.training.data import trees

CLIPS = Clips(
    batch=3,
    num_frames=4,
    branches=5,
    keep_ratio=(0.5,),
    history_share=0.4,
    forgetful_share=0.5,
)


def sums_of(objective: Objective, batch: Batch) -> tuple[BatchSums, dict[str, torch.Tensor]]:
    objective.zero_grad()
    totals = Totals(*totals_of([batch], objective.model.cfg.vision.num_cells))
    found = objective(batch, totals)
    found.loss.backward()
    named = objective.named_parameters()
    return found, {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same(objective: Objective, prefix: Batch, rows: Batch) -> None:
    assert isinstance(prefix, PackedBatch)
    assert isinstance(rows, PackedBatch)
    assert (prefix.form, rows.form) == ("prefix", "rows")
    one, gradients = sums_of(objective, prefix)
    other, of_rows = sums_of(objective, rows)
    assert float(one.loss.detach()) == pytest.approx(float(other.loss.detach()), rel=1e-5)
    torch.testing.assert_close(one.sums, other.sums, rtol=1e-5, atol=1e-5)
    assert one.numbers == pytest.approx(other.numbers, rel=1e-4, abs=1e-6)
    assert torch.equal(one.right, other.right)
    assert one.row_tokens_R.sum() == other.row_tokens_R.sum()
    assert gradients.keys() == of_rows.keys()
    for name, gradient in gradients.items():
        # Sums of numbers as large as the largest are rounded otherwise in the other form.
        atol = max(2e-5, 1e-6 * float(gradient.abs().max()))
        torch.testing.assert_close(of_rows[name], gradient, rtol=2e-3, atol=atol, msg=name)


STREAMS = msgspec.structs.replace(CLIPS, stream_share=1.0, reuse=(0.0, 6.0))


@pytest.mark.parametrize(
    ("attention", "clips"),
    [*((attention, CLIPS) for attention in VisionAttention), (VisionAttention.FRAME, STREAMS)],
)
@pytest.mark.parametrize("seed", [1, 3])  # of the second, clips of streams forget something
def test_rendered_clips_with_every_probe(
    tmp_path: Path, attention: VisionAttention, clips: Clips, seed: int
) -> None:
    sizes = build_tokenizer(vocabulary(), tmp_path / "tokenizer.json")
    words = Tokenizer.from_file(tmp_path / "tokenizer.json")
    prompt = PromptFormat(words)
    cfg = dataclasses.replace(tiny(*sizes), attention=attention)
    model = VideoLM(cfg).init_weights(torch.Generator().manual_seed(seed))
    stage = questions("all", Steps(1), clips)
    objective = Objective(model, stage.terms, make_probes([stage], cfg, words))
    with torch.no_grad():
        for parameter in objective.probes.parameters():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    pair = []
    forms: tuple[Form, Form] = ("prefix", "rows")
    for form in forms:
        data = msgspec.structs.replace(clips, form=form)
        pair.append(WorldClips(data, cfg, prompt, QuestionMix(seed), seed).next_batch())
    assert_same(objective, *pair)


@pytest.mark.parametrize("rescale", [Rescale.FRAME, Rescale.ROW])
def test_clips_of_any_length_from_a_mixture(rescale: Rescale) -> None:
    cfg = trees.config(VisionAttention.FRAME, rescale)
    terms: tuple[Term, ...] = (Answers(z_loss=1e-2), Similarity(0.5))
    objective = Objective(trees.model(cfg).train(), terms)
    streams = [
        PackedStream(
            trees.mixture(at_end=False),
            trees.prompt(),
            cfg,
            PackingConfig(max_tokens=260, max_frames=12, window=6, keep_ratio=(1.0, 0.5)),
            lanes=(0, 1),
            num_lanes=2,
            form=form,
        )
        for form in ("prefix", "rows")
    ]
    for _ in range(3):
        assert_same(objective, *(stream.next_batch() for stream in streams))
