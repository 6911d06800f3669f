"""The training loop end to end at its smallest: every stage kind, state, resume, checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_vlm.config import Rescale, VisionAttention
from edge_vlm.errors import CheckpointError
from edge_vlm.model.checkpoint import load_checkpoint
from edge_vlm_training.objective.step import keep_mask
from edge_vlm_training.recipes.stages import Recipe, Stage
from edge_vlm_training.trainer.stages import Trainer

STEP = 1e-4  # minutes: one step a stage
RECIPE = Recipe(
    name="test",
    forgetful_share=1.0,
    stages=(
        Stage(name="dense", minutes=STEP, batch=2, dense=True),
        Stage(name="one", minutes=STEP, batch=2, branches=2),
        Stage(name="clips", minutes=STEP, batch=2, num_frames=3, branches=2, removed=(0.5,)),
        Stage(
            name="frozen",
            minutes=STEP,
            batch=2,
            num_frames=3,
            branches=2,
            removed=(0.5,),
            freeze_vision=True,
        ),
    ),
)


def _vision(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in trainer.masters.items() if n.startswith(("vit", "scorer"))}


def test_a_run_learns_saves_and_resumes(tmp_path: Path) -> None:
    trainer = Trainer(RECIPE, tmp_path, dtype=torch.float32, report=lambda line: None)
    start = dict(trainer.masters)
    checkpoint = trainer.run()
    moved = {n for n, t in trainer.masters.items() if not torch.equal(t, start[n])}
    assert {"vit.patch_embed.weight", "scorer.fc1.weight", "llm.head.weight"} <= moved

    model = load_checkpoint(checkpoint)
    torch.testing.assert_close(model.llm.head.weight.data, trainer.masters["llm.head.weight"])

    again = Trainer(RECIPE, tmp_path, dtype=torch.float32, report=lambda line: None)
    again.resume()
    assert again.total_steps == trainer.total_steps == 4
    assert all(torch.equal(again.masters[n], t) for n, t in trainer.masters.items())
    assert again.run() == checkpoint  # nothing is left to do
    assert again.total_steps == 4


def test_a_run_starts_from_a_checkpoint_of_its_own_kind(tmp_path: Path) -> None:
    first = Trainer(RECIPE, tmp_path / "first", dtype=torch.float32, report=lambda line: None)
    first.save()
    checkpoint = tmp_path / "first" / "checkpoint"
    other = replace(RECIPE, seed=5)
    second = Trainer(other, tmp_path / "second", init=checkpoint, report=lambda line: None)
    assert torch.equal(second.masters["llm.head.weight"], first.masters["llm.head.weight"])
    (checkpoint / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not one of this recipe's"):
        Trainer(other, tmp_path / "third", init=checkpoint, report=lambda line: None)


def test_the_read_outs_of_a_run_go_on(tmp_path: Path) -> None:
    first = Trainer(RECIPE, tmp_path / "first", dtype=torch.float32, report=lambda line: None)
    name = "heads.connector.rest.weight"
    first.masters[name] += 0.5
    first.save()
    second = Trainer(RECIPE, tmp_path / "second", init=tmp_path / "first", report=lambda line: None)
    assert torch.equal(second.masters[name], first.masters[name])
    third = Trainer(
        RECIPE, tmp_path / "third", init=tmp_path / "first" / "checkpoint", report=lambda line: None
    )
    assert not torch.equal(third.masters[name], first.masters[name])


def test_a_scorer_can_be_learned_anew(tmp_path: Path) -> None:
    first = Trainer(RECIPE, tmp_path / "first", dtype=torch.float32, report=lambda line: None)
    first.save()
    other = replace(RECIPE, seed=5, new_scorer=True)
    init = tmp_path / "first" / "checkpoint"
    second = Trainer(other, tmp_path / "second", init=init, report=lambda line: None)
    name = "scorer.fc1.weight"
    assert not torch.equal(second.masters[name], first.masters[name])
    name = "vit.patch_embed.weight"
    assert torch.equal(second.masters[name], first.masters[name])


@pytest.mark.parametrize(
    "changes",
    [
        {"selection": ("random",)},
        {"selection": ("stream",)},
        {"rescale": Rescale.ROW},
        {"attention": VisionAttention.ALL},
    ],
    ids=str,
)
def test_variants_of_a_recipe_train_their_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    stage = replace(RECIPE.stages[2], steps=2)
    recipe = replace(RECIPE, stages=(stage,), **changes)
    trainer = Trainer(recipe, tmp_path, dtype=torch.float32, report=lambda line: None)
    model = load_checkpoint(trainer.run())
    assert trainer.total_steps == 2
    assert model.cfg.attention is recipe.attention
    assert model.cfg.scorer is not None
    assert model.cfg.scorer.rescale is recipe.rescale


def test_an_unknown_choice_of_cells_is_named() -> None:
    with pytest.raises(ValueError, match=r"Recipe.selection: .* guess"):
        replace(RECIPE, selection=("guess",))


@pytest.mark.parametrize("selection", ["clip", "stream", "random"])
def test_cells_are_kept_within_the_budget(selection: str) -> None:
    scores = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))
    mask = keep_mask(scores, selection, removed=0.5, floor=1, seed=7)
    assert mask[:, 0].all()
    assert (mask.sum(-1) >= 1).all()
    assert (mask.sum((1, 2)) <= 128).all()
    assert (mask.sum((1, 2)) > 100).all()
    top = (scores[:, 1:] * mask[:, 1:]).sum() / mask[:, 1:].sum()
    assert (top > 0.6) == (selection != "random")
    assert keep_mask(scores, selection, removed=0.0, floor=0, seed=7).all()


def test_a_frozen_stage_leaves_the_vision_side_alone(tmp_path: Path) -> None:
    trainer = Trainer(RECIPE, tmp_path, dtype=torch.float32, report=lambda line: None)
    before, head = _vision(trainer), trainer.masters["llm.head.weight"].clone()
    trainer.stage_index = 3
    trainer.run()
    assert all(torch.equal(before[n], t) for n, t in _vision(trainer).items())
    assert not torch.equal(head, trainer.masters["llm.head.weight"])


def test_resume_without_a_state_is_a_clear_error(tmp_path: Path) -> None:
    trainer = Trainer(RECIPE, tmp_path, report=lambda line: None)
    with pytest.raises(CheckpointError, match="nothing to resume"):
        trainer.resume()


@pytest.mark.parametrize(
    "field", [{"minutes": 0.0}, {"batch": 0}, {"removed": (1.0,)}], ids=lambda f: next(iter(f))
)
def test_a_bad_stage_names_its_field(field: dict[str, float]) -> None:
    good: dict[str, object] = {"name": "x", "minutes": 1.0, "batch": 1}
    with pytest.raises(ValueError, match=f"Stage.{next(iter(field))}"):
        Stage(**(good | field))  # type: ignore[arg-type]
