"""From a recipe to a finished checkpoint: the run's folder, what it needs, the loop, the result."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from edge_vlm.errors import CheckpointError, ConfigError
from edge_vlm.model.checkpoint import TOKENIZER
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm_training.config import plain, read_json
from edge_vlm_training.data.packing.batch import BatchStream
from edge_vlm_training.data.packing.stream import PackedStream
from edge_vlm_training.data.prefetch import Prefetch
from edge_vlm_training.data.sources.open import open_mixture, require_sources
from edge_vlm_training.data.sources.world_clips import WorldClips
from edge_vlm_training.recipes.base import OPERATIONAL, Clips, Recipe
from edge_vlm_training.recipes.overrides import leaves
from edge_vlm_training.trainer import checkpoints
from edge_vlm_training.trainer.adapters import check_lora, claim_base
from edge_vlm_training.trainer.checkpoints import Progress
from edge_vlm_training.trainer.distributed import Ranks
from edge_vlm_training.trainer.loop import Run
from edge_vlm_training.trainer.memory import check_fits
from edge_vlm_training.trainer.model_factory import (
    build_model,
    init_notes,
    model_config,
    open_init,
    prepare_tokenizer,
    trained_usage,
)
from edge_vlm_training.trainer.progress import Reporter, terminal
from edge_vlm_training.world.curriculum import QuestionMix

RECIPE = "recipe.json"


def stored_recipe(folder: Path, name: str) -> Recipe:
    """The recipe a run's folder was started with, for `--resume`.

    Raises CheckpointError if there is none, ConfigError if it is not the one called `name` or its
    file is damaged.
    """
    path = folder / RECIPE
    if not path.exists():
        raise CheckpointError(
            "nothing to resume", where=folder, remedy="leave out --resume to start a new run"
        )
    recipe = read_json(path, Recipe)
    if recipe.name != name:
        raise ConfigError(
            f"the run was started with the recipe {recipe.name}",
            where=path,
            remedy=f"resume with `edge-vlm train {recipe.name}`",
        )
    return recipe


def begin(recipe: Recipe, folder: Path, ranks: Ranks, *, resume: bool) -> None:
    """Claims the run's folder, or checks that it is this recipe's. Every process has to call this.

    Raises ConfigError: the folder holds a run already, or (resuming) one whose recipe differs in a
    field that changes what is learned. CheckpointError: there is nothing to resume.
    """
    path = folder / RECIPE
    # All look before one writes; all fail alike.
    stored = read_json(path, Recipe) if resume and path.exists() else None
    ranks.wait()
    if resume:
        if stored is None or checkpoints.latest(folder) is None:
            raise CheckpointError(
                "nothing to resume", where=folder, remedy="leave out --resume to start a new run"
            )
        before, now = _values(stored), _values(recipe)
        changed = [k for k in before | now if before.get(k) != now.get(k)]
        # What adapters are on may lie elsewhere by now: it is known by its fingerprint.
        free = OPERATIONAL | {"init"} if recipe.lora is not None else OPERATIONAL
        if changed := [k for k in changed if k.rpartition(".")[2] not in free]:
            told = ", ".join(f"{k} ({before.get(k)!r} before, now {now.get(k)!r})" for k in changed)
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
    if ranks.leads:
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(plain(recipe), indent=1) + "\n")
        os.replace(partial, path)
    ranks.wait()


def _values(recipe: Recipe) -> dict[str, object]:
    """Everything that can be set, by its path."""
    return {".".join(path): holder[key] for path, holder, key in leaves(plain(recipe))}


def train(
    recipe: Recipe,
    folder: Path,
    ranks: Ranks,
    *,
    resume: bool = False,
    watched: bool = False,
) -> Path:
    """Runs what is left of a recipe; returns the checkpoint folder that other commands read.

    If it is `watched` the leading process shows its progress on the terminal.

    Raises what `begin`, the data and the loaders raise, RecipeTooLarge before anything is loaded,
    and NonFinite if the loss is no number any more. The last checkpoint is intact in any case.
    """
    for stage in recipe.stages:
        if not isinstance(stage.data, Clips):
            require_sources(stage.data)
    check_lora(recipe, ranks)
    begin(recipe, folder, ranks, resume=resume)
    if ranks.leads:
        prepare_tokenizer(recipe, folder)
    ranks.wait()
    tokenizer_path = folder / TOKENIZER
    cfg = model_config(recipe, tokenizer_path)
    need = check_fits(recipe, cfg, ranks)
    base = None
    if recipe.lora is not None and (init := open_init(recipe)) is not None:
        base = claim_base(folder, init, recipe.lora, resume=resume)
    usage = trained_usage(recipe)
    try:
        prompt = PromptFormat(Tokenizer.from_file(tokenizer_path), usage.style)
    except KeyError as error:
        raise ConfigError(
            f"{error.args[0]}, which the recipe's prompts need",
            where=tokenizer_path,
            remedy="take the tokenizer of a Molmo2 checkpoint, or --set frame_markers=false",
        ) from error
    opened: dict[int, PackedStream] = {}

    def open_stream(at: Progress, mix: QuestionMix) -> BatchStream:
        data = recipe.stages[at.stage].data
        if isinstance(data, Clips):
            # Other clips in every stage, whatever its number of steps was.
            seed = hash((recipe.seed, at.stage, at.step)) % 2**31
            mix.rng.seed(seed + 1)
            return WorldClips(data, cfg, prompt, mix, seed)
        share = {"rank": ranks.rank, "num_ranks": ranks.size}
        stream = open_mixture(data, cfg, prompt, seed=recipe.seed + at.stage, **share)
        opened[at.stage] = stream
        # With threads of its own, decoding goes on while a step is computed.
        return Prefetch(stream) if data.decode_threads else stream

    model = build_model(recipe, cfg, tokenizer_path)
    run = Run(recipe, cfg, model, open_stream, ranks, folder, prompt, usage, base)
    if resume:
        run.resume()
    reporter = None
    if ranks.leads:
        reporter = Reporter(folder, run.at.step, console=terminal() if watched else None)
        reporter.say(f"{recipe.name} on {ranks.size} x {ranks.device}: about {need}")
        if base is not None:
            trained = sum(weight.numel() for weight in run.weights().values())
            reporter.say(f"{trained:,} numbers are trained, in adapters and scorer")
        for note in init_notes(recipe):
            reporter.say(note)
    run.go(reporter)
    skipped = sum((Counter(stream.skipped) for stream in opened.values()), Counter[str]())
    if skipped:
        met = skipped.total()
        print(f"process {ranks.rank} left {len(skipped)} bad records out, {met} times in all")
    return run.save_whole()
