"""From a recipe to a finished checkpoint: the run's folder, what it needs, the loop, the result."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from edge_vlm.errors import CheckpointError, ConfigError
from edge_vlm.model.checkpoint import TOKENIZER
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm_training.data.prefetch import Prefetch
from edge_vlm_training.recipes.base import OPERATIONAL, StepRecipe
from edge_vlm_training.trainer import checkpoints
from edge_vlm_training.trainer.distributed import Ranks
from edge_vlm_training.trainer.loop import Run
from edge_vlm_training.trainer.memory import check_fits
from edge_vlm_training.trainer.model_factory import (
    build_model,
    init_notes,
    model_config,
    prepare_tokenizer,
    trained_usage,
)
from edge_vlm_training.trainer.progress import Reporter, terminal
from edge_vlm_training.trainer.sources import open_stream

RECIPE = "recipe.json"


def stored_recipe(folder: Path, name: str) -> StepRecipe:
    """The recipe a run's folder was started with, for `--resume`.

    Raises CheckpointError if there is none, ConfigError if it is not the one called `name` or its
    file is damaged.
    """
    path = folder / RECIPE
    if not path.exists():
        raise CheckpointError(
            "nothing to resume", where=folder, remedy="leave out --resume to start a new run"
        )
    try:
        recipe = StepRecipe(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"not a recipe: {error}", where=path) from error
    if recipe.name != name:
        raise ConfigError(
            f"the run was started with the recipe {recipe.name}",
            where=path,
            remedy=f"resume with `edge-vlm train {recipe.name}`",
        )
    return recipe


def begin(recipe: StepRecipe, folder: Path, world: Ranks, *, resume: bool) -> None:
    """Claims the run's folder, or checks that it is this recipe's. Every process has to call this.

    Raises ConfigError: the folder holds a run already, or (resuming) one whose recipe differs in a
    field that changes what is learned. CheckpointError: there is nothing to resume.
    """
    path = folder / RECIPE
    # All look before one writes; all fail alike.
    stored = path.read_text() if path.exists() else None
    world.wait()
    if resume:
        if stored is None or checkpoints.latest(folder) is None:
            raise CheckpointError(
                "nothing to resume", where=folder, remedy="leave out --resume to start a new run"
            )
        before, now = json.loads(stored), json.loads(json.dumps(recipe.to_dict()))
        changed = [k for k in now if k not in OPERATIONAL and now[k] != before.get(k)]
        if changed:
            told = ", ".join(f"{k} ({before.get(k)!r} before, now {now[k]!r})" for k in changed)
            raise ConfigError(
                f"the run was started with another recipe: {told}",
                where=path,
                remedy="resume with the same recipe and --set, or start a new folder",
            )
    elif checkpoints.latest(folder) is not None:
        raise ConfigError(
            "the folder holds a run already",
            where=folder,
            remedy="add --resume to go on with it, or name another folder",
        )
    if world.leads:
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(recipe.to_dict(), indent=1) + "\n")
        os.replace(partial, path)
    world.wait()


def train(
    recipe: StepRecipe,
    folder: Path,
    world: Ranks,
    *,
    resume: bool = False,
    watched: bool = False,
) -> Path:
    """Runs what is left of a recipe; returns the checkpoint folder that other commands read.

    If it is `watched` the leading process shows its progress on the terminal.

    Raises what `begin`, the data and the loaders raise, RecipeTooLarge before anything is loaded,
    and NonFinite if the loss is no number any more. The last checkpoint is intact in any case.
    """
    begin(recipe, folder, world, resume=resume)
    if world.leads:
        prepare_tokenizer(recipe, folder)
    world.wait()
    tokenizer_path = folder / TOKENIZER
    cfg = model_config(recipe, tokenizer_path)
    need = check_fits(recipe, cfg, world)
    usage = trained_usage(recipe)
    try:
        prompt = PromptFormat(Tokenizer.from_file(tokenizer_path), usage.style)
    except KeyError as error:
        raise ConfigError(
            f"{error.args[0]}, which the recipe's prompts need",
            where=tokenizer_path,
            remedy="take the tokenizer of a Molmo2 checkpoint, or --set frame_markers=false",
        ) from error
    stream = open_stream(recipe, cfg, prompt, world)
    # With threads of its own, decoding goes on while a step is computed.
    ahead = Prefetch(stream) if recipe.decode_threads else None
    with ahead or contextlib.nullcontext():
        model = build_model(recipe, cfg)
        run = Run(recipe, cfg, model, ahead or stream, world, folder, prompt, usage)
        if resume:
            run.resume()
        reporter = None
        if world.leads:
            reporter = Reporter(
                folder, recipe.steps, run.step, console=terminal() if watched else None
            )
            reporter.say(f"{recipe.name} on {world.size} x {world.device}: about {need}")
            for note in init_notes(recipe):
                reporter.say(note)
        run.go(reporter)
    if stream.skipped:
        met = sum(stream.skipped.values())
        print(
            f"process {world.rank} left {len(stream.skipped)} bad records out, {met} times in all"
        )
    return run.save_whole()
