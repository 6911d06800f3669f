"""What each term of a stage's loss computes; a term's weight is applied by the objective.

A term that is a mean over a batch counts as one share of the update's batches, one that is a sum is
divided by what the whole update has: so the loss does not depend on how clips are shared out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edge_vlm.config import ModelConfig
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm.world.scenes import COLOUR_NAMES
from edge_vlm.world.sprites import KINDS
from edge_vlm_training.data.packing.batch import Batch
from edge_vlm_training.objective.language import STORY_BLOCKS, Answered
from edge_vlm_training.objective.losses import answer_sums, feature_scale_loss
from edge_vlm_training.objective.probes.dense import (
    CELL_COVERED,
    COVERED,
    DenseHead,
    WordHead,
    dense_labels,
    dense_loss,
    whole_vit,
)
from edge_vlm_training.objective.probes.presence import PresentHead, present, present_loss
from edge_vlm_training.objective.probes.timeline import TimelineHead, timeline, timeline_loss
from edge_vlm_training.objective.vision import SeenClips
from edge_vlm_training.recipes.base import (
    NEED_TRUTH,
    Answers,
    DenseProbe,
    FeatureScale,
    PresenceProbe,
    Similarity,
    Stage,
    Term,
    TimelineProbe,
)
from edge_vlm_training.world.truth import Truth


@dataclasses.dataclass(frozen=True)
class Totals:
    """What the sums of an update are divided by, over all its batches and processes."""

    weight: Tensor
    """Sum of the token weights, f32 scalar."""
    aux_cells: Tensor
    """Cells of the similarity loss, f32 scalar."""
    batches: float = 1.0


@dataclasses.dataclass
class Forward:
    """A batch on its way through the model: what the terms of a loss may look at."""

    model: VideoLM
    probes: nn.ModuleDict
    batch: Batch
    totals: Totals
    pixels_FNP: Tensor
    seen: SeenClips | None = None
    answered: Answered | None = None
    sums: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """Of terms that add up over batches, undivided."""
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)
    """What probes got right."""

    @property
    def clips(self) -> SeenClips:
        assert self.seen is not None
        return self.seen

    @property
    def words(self) -> Answered:
        assert self.answered is not None
        return self.answered

    @property
    def truth(self) -> Truth:
        assert self.batch.truth is not None
        return self.batch.truth

    def kept_cells(self) -> Tensor:
        """int64 [G]: frame * C + cell of each feature, frames counted as the language model sees
        them."""
        return self.clips.kept_FC[~self.batch.evicted_F()].flatten().nonzero().squeeze(1)

    def true_cells(self) -> Tensor:
        """The same with frames counted as the truth does, those not shown among them."""
        truth, num_cells = self.truth, self.model.cfg.vision.num_cells
        cells = torch.arange(len(truth.scenes) * truth.scenes.num_frames * num_cells)
        shown = cells.view(len(truth.scenes), -1, num_cells)[:, truth.shown].flatten()
        return shown[self.kept_cells()]


def make_probes(stages: Sequence[Stage], cfg: ModelConfig, words: Tokenizer) -> nn.ModuleDict:
    """The probes of all stages; weights and biases start at zero."""
    terms = {type(t): t for stage in stages for t in stage.terms if isinstance(t, NEED_TRUTH)}
    width = cfg.language.width
    probes = nn.ModuleDict()
    if DenseProbe in terms:
        probes["patches"] = DenseHead(cfg.vision.width)
        names = [words.id_of(f" {name}") for name in KINDS]
        colours = [words.id_of(f" {name}") for name in COLOUR_NAMES]
        probes["features"] = WordHead(width, names, colours)
    for name, kind, head in (
        ("timeline", TimelineProbe, TimelineHead),
        ("presence", PresenceProbe, PresentHead),
    ):
        if kind in terms:
            probes[name] = nn.ModuleList(head(width) for _ in range(STORY_BLOCKS))
    return probes


def probe_of(term: Term) -> str | None:
    """The name of the probe that a term trains."""
    names = {TimelineProbe: "timeline", PresenceProbe: "presence"}
    return term.on if isinstance(term, DenseProbe) else names.get(type(term))


def reads(term: Term) -> int:
    """How far a batch has to go for a term: 0 its pixels, 1 the vision side, 2 all of it."""
    if isinstance(term, DenseProbe):
        return 0 if term.on == "patches" else 1
    return 1 if isinstance(term, Similarity | FeatureScale) else 2


def _answers(term: Answers, at: Forward) -> Tensor:
    answer, squares, right = answer_sums(*at.words.answers[:3])
    at.sums |= {"answer": answer, "z": squares, "right": right}
    return (answer + term.z_loss * squares) / at.totals.weight


def _similarity(_term: Similarity, at: Forward) -> Tensor:
    return at.clips.aux_sum / at.totals.aux_cells.clamp(min=1)


def _feature_scale(_term: FeatureScale, at: Forward) -> Tensor:
    return feature_scale_loss(at.clips.features_GE) / at.totals.batches


def _dense(term: DenseProbe, at: Forward) -> Tensor:
    truth, cfg, head = at.truth, at.model.cfg.vision, at.probes[term.on]
    if term.on == "patches":
        labels = dense_labels(truth.scenes, truth.owner, cfg.patch_grid, COVERED)
        outputs = head(whole_vit(at.model.vit, at.pixels_FNP))
    else:
        labels = dense_labels(truth.scenes, truth.owner, cfg.cell_grid, CELL_COVERED)
        labels = labels.at(at.true_cells())
        outputs = head(at.clips.features_GE, at.model.llm.embed.weight)
    loss, found = dense_loss(outputs, labels)
    at.numbers |= found
    return loss / at.totals.batches


def _timeline(_term: TimelineProbe, at: Forward) -> Tensor:
    truth, grid = at.truth, at.model.cfg.vision.cell_grid
    labels = timeline(truth.scenes, truth.owner, grid, CELL_COVERED, truth.forgotten)
    labels = labels.at(at.true_cells())
    loss = torch.zeros(())
    for number, hidden in enumerate(at.words.hidden):
        head = at.probes.get_submodule(f"timeline.{number}")
        part, found = timeline_loss(head(hidden), labels)
        loss = loss + part
        at.numbers |= found
    return loss / at.totals.batches


def _presence(_term: PresenceProbe, at: Forward) -> Tensor:
    truth, grid = at.truth, at.model.cfg.vision.cell_grid
    labels = present(truth.scenes, truth.owner, grid, CELL_COVERED, truth.shown)
    labels = labels.at(at.kept_cells())
    seen_F = ~at.batch.evicted_F()
    loss = torch.zeros(())
    for number, (hidden, ends) in enumerate(zip(at.words.hidden, at.words.ends, strict=True)):
        head = at.probes.get_submodule(f"presence.{number}")
        part, found = present_loss(head(ends[seen_F], hidden), labels)
        loss = loss + part
        at.numbers |= found
    return loss / at.totals.batches


_COMPUTED: dict[type[Term], Callable[[Any, Forward], Tensor]] = {
    Answers: _answers,
    Similarity: _similarity,
    FeatureScale: _feature_scale,
    DenseProbe: _dense,
    TimelineProbe: _timeline,
    PresenceProbe: _presence,
}


def compute(term: Term, at: Forward) -> Tensor:
    """A batch's share of the update's term, unweighted; sums and numbers are added to `at`."""
    return _COMPUTED[type(term)](term, at)
