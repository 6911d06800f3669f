"""Ablations change what they name and nothing else; the curves show the log."""

from __future__ import annotations

import dataclasses
import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch

from benchmarks.harness import CHECKPOINT
from benchmarks.training import ablations, mean_weights, training_curves
from edge_vlm.errors import CheckpointError, ConfigError
from edge_vlm.formats.qa_set import write_question_set
from edge_vlm.model.checkpoint import TOKENIZER, load_checkpoint, read_own, save_checkpoint
from edge_vlm_training.config import plain
from edge_vlm_training.recipes.base import Recipe
from edge_vlm_training.recipes.overrides import leaves, override
from edge_vlm_training.world.heldout import heldout_clips


@pytest.mark.parametrize("name", ablations.VARIANTS)
def test_a_variant_differs_from_the_full_recipe_in_one_thing(name: str) -> None:
    full = ablations.recipe_of(ablations.VARIANTS["stts"], 9)
    recipe = ablations.recipe_of(ablations.VARIANTS[name], 9)

    def values(recipe: Recipe) -> dict[str, object]:
        return {".".join(path): holder[key] for path, holder, key in leaves(plain(recipe))}

    old, new = values(full), values(recipe)
    changed = [key for key in old if old[key] != new[key]]
    assert len(changed) == (name != "stts") + name.startswith("new_scorer_")


def test_a_variant_is_trained_once_for_each_seed_and_asked(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe_of, variant = ablations.recipe_of, ablations.VARIANTS["random_cells"]
    once = dataclasses.replace(variant, runs=variant.runs[:1])

    def small(variant: ablations.Variant, steps: int, seed: int) -> Recipe:
        recipe = recipe_of(variant, steps, seed)
        return override(recipe, ["batch=1", "branches=2", "num_frames=4"])

    monkeypatch.setattr(ablations, "recipe_of", small)
    monkeypatch.setitem(ablations.VARIANTS, "random_cells", once)
    questions, out = tmp_path / "questions", tmp_path / "result.json"
    clips = heldout_clips(1, 100, num_frames=4, kinds=["count"])
    write_question_set(questions, islice(clips, 1))
    argv = [str(CHECKPOINT), str(questions), "--runs", str(tmp_path / "runs"), "--steps", "1"]
    argv += ["--only", "random_cells", "--seeds", "3,4", "--set", "harder_share=1"]
    assert ablations.main([*argv, "--out", str(out)]) == 0
    trained = [tmp_path / f"runs/random_cells-{n}/checkpoint/model.safetensors" for n in (3, 4)]
    assert trained[0].read_bytes() != trained[1].read_bytes()
    assert '"harder_share": 1.0' in (tmp_path / "runs/random_cells-3/recipe.json").read_text()
    written = [file.stat().st_mtime_ns for file in trained]
    entries = json.loads(out.read_text())["variants"]
    assert [(entry["variant"], entry["seed"], entry["steps"]) for entry in entries] == [
        ("random_cells", 3, 1),
        ("random_cells", 4, 1),
    ]
    for entry in entries:
        assert [row["policy"] for row in entry["rows"]] == ["random"]
        assert all(row["clips"] == 1 and row["questions"] > 0 for row in entry["rows"])
    argv[argv.index("3,4")] = "4"  # one is enough to see what is done again
    assert ablations.main(argv) == 0
    assert [file.stat().st_mtime_ns for file in trained] == written
    assert "random_cells             random:0.5:frame" in capsys.readouterr().out
    (tmp_path / "runs/random_cells-4" / ablations.FINISHED).unlink()
    weights = trained[1].read_bytes()
    assert ablations.main(argv) == 0  # goes on where it was interrupted: behind its last step
    assert trained[1].read_bytes() == weights
    minutes = json.loads((tmp_path / "runs/random_cells-4" / ablations.FINISHED).read_text())
    assert minutes["minutes"] >= 0
    longer, averaged = [*argv, "--steps", "2"], [*argv, "--set", "average_last=2"]
    for other, told in (
        *[(longer, "started with another recipe"), (argv[:-2], "trained with other --set")],
        (averaged, "trained with other --set"),
    ):
        with pytest.raises(ConfigError, match=told):
            ablations.main(other)


def test_an_unknown_variant_or_seed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        ablations.main([str(CHECKPOINT), str(tmp_path), "--runs", str(tmp_path), "--only", "luck"])
    assert "'luck' is none of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ablations.main([str(CHECKPOINT), str(tmp_path), "--runs", str(tmp_path), "--seeds", "5,x"])
    assert "'5,x' must be whole numbers" in capsys.readouterr().err


@pytest.fixture
def log(tmp_path: Path) -> Path:
    line = {
        "minutes": 1.0,
        "stage": "a",
        "answer_loss": 2.0,
        "kind": 0.1,
        "heading": 0.2,
        "appeared": 0.3,
    }
    lines = [
        line,
        *({**line, "minutes": m, "stage": "b", "accuracy": {"when": 0.4}} for m in (2, 3)),
    ]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_log_is_read_where_it_has_accuracies(log: Path) -> None:
    assert [line["minutes"] for line in training_curves.read_log(log)] == [2, 3]
    log.write_text('{"minutes": 1}\n')
    with pytest.raises(ConfigError, match="no line"):
        training_curves.read_log(log)
    with pytest.raises(ConfigError, match="not a training's log"):
        training_curves.read_log(log.parent / "absent.jsonl")


def test_curves_are_a_picture(log: Path, tmp_path: Path) -> None:
    out = tmp_path / "curves.png"
    assert training_curves.main([str(log), str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_the_mean_of_checkpoints_is_theirs_by_shares(tmp_path: Path) -> None:
    model = load_checkpoint(CHECKPOINT)
    other, out = tmp_path / "other", tmp_path / "mean"
    moved = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    save_checkpoint(other, model.cfg, moved, CHECKPOINT / TOKENIZER)
    argv = [str(CHECKPOINT), str(other), "-o", str(out)]
    assert mean_weights.main([*argv, "--shares", "0.75,0.25"]) == 0
    for name, tensor in load_checkpoint(out).state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name] + 0.25)
    assert read_own(out) == read_own(CHECKPOINT)
    with pytest.raises(CheckpointError, match="is there already"):
        mean_weights.main([*argv[:2], "-o", str(other)])
    (other / TOKENIZER).write_text("{}")
    shutil.rmtree(out)
    with pytest.raises(CheckpointError, match=rf"another model or {TOKENIZER}"):
        mean_weights.main(argv)
    with pytest.raises(SystemExit):
        mean_weights.main([*argv, "--shares", "0.75,0.5"])
