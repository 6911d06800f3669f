"""The model a recipe trains: its shape, its first weights, its vocabulary."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from pathlib import Path

import torch
from torch import nn

from edge_vlm.config import ModelConfig, ScorerConfig, molmo2_4b, molmo2_8b, molmo2_o_7b, tiny
from edge_vlm.config import demo as demo_config
from edge_vlm.errors import ConfigError
from edge_vlm.formats.usage import FrameRule, Usage
from edge_vlm.model.checkpoint import TOKENIZER
from edge_vlm.model.published.files import read_json
from edge_vlm.model.published.folder import ModelFolder, open_folder, stts_scorer
from edge_vlm.model.scorer import TokenScorer
from edge_vlm.model.video_lm import VideoLM
from edge_vlm_training.recipes.base import StepRecipe
from edge_vlm_training.world.questions import vocabulary
from edge_vlm_training.world.vocabulary import READ_ONLY, build_tokenizer

_PUBLISHED = {"molmo2_4b": molmo2_4b, "molmo2_8b": molmo2_8b, "molmo2_o_7b": molmo2_o_7b}


def prepare_tokenizer(recipe: StepRecipe, folder: Path) -> Path:
    """Puts the run's tokenizer.json into its folder; the folder is made if need be.

    Raises ConfigError if the recipe names none for a published vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TOKENIZER
    if (init := open_init(recipe)) is not None:
        shutil.copyfile(init.require_tokenizer(), path)
    elif recipe.tokenizer is not None:
        if not recipe.tokenizer.is_file():
            raise ConfigError(
                "there is no such tokenizer",
                where=recipe.tokenizer,
                remedy="add --set tokenizer=FILE",
            )
        shutil.copyfile(recipe.tokenizer, path)
    elif recipe.model in _PUBLISHED:
        raise ConfigError(
            f"{recipe.name} has no vocabulary of its own",
            remedy="add --init FOLDER (a published checkpoint) or --set tokenizer=FILE",
        )
    else:
        build_tokenizer(vocabulary(), path)
    return path


def model_config(recipe: StepRecipe, tokenizer: Path) -> ModelConfig:
    """The shape that will be trained: that of `init` with a scorer, in the recipe's mode.

    Reads headers only. Raises CheckpointError or ConfigError for an unusable `init`.
    """
    init = open_init(recipe)
    cfg = _named_config(recipe, tokenizer) if init is None else init.config
    scorer = cfg.scorer or stts_scorer(cfg, cfg.vision.mlp_width)
    scorer = dataclasses.replace(scorer, rescale=recipe.rescale)
    try:
        return dataclasses.replace(cfg, scorer=scorer, attention=recipe.attention)
    except ValueError as error:
        raise ConfigError(f"no room for the scorer: {error}", where=recipe.init) from error


def _named_config(recipe: StepRecipe, tokenizer: Path) -> ModelConfig:
    if recipe.model in _PUBLISHED:
        return _PUBLISHED[recipe.model]()
    try:
        words = len(read_json(tokenizer)["model"]["vocab"])
    except (KeyError, TypeError) as error:
        raise ConfigError(f"not a tokenizer.json: {error}", where=tokenizer) from error
    # Markers that are only read come last (`build_tokenizer`): the head does not cover them.
    make = demo_config if recipe.model == "demo" else tiny
    return make(words - len(READ_ONLY), len(READ_ONLY))


def open_init(recipe: StepRecipe) -> ModelFolder | None:
    """The folder a recipe starts from. Raises as `open_folder`."""
    return None if recipe.init is None else open_folder(recipe.init, recipe.tokenizer)


def init_notes(recipe: StepRecipe) -> list[str]:
    """What to know about the weights a recipe starts from, one line each."""
    init = open_init(recipe)
    if init is None:
        return []
    fresh = [] if init.config.scorer else [f"{recipe.init} has no scorer: it starts random"]
    return [*init.notes, *fresh]


def trained_usage(recipe: StepRecipe) -> Usage:
    """What the trained model will want: as `init`, with the recipe's markers, frames and share.

    Of several shares it is served at the middle one.
    """
    init = open_init(recipe)
    before = Usage() if init is None else init.usage
    return dataclasses.replace(
        before,
        style=dataclasses.replace(before.style, own_frame_markers=recipe.frame_markers),
        frames=FrameRule(num_frames=recipe.max_frames, max_fps=recipe.fps),
        defaults={
            **before.defaults,
            "keep_ratio": round(1 - statistics.median_low(recipe.removed), 6),
        },
    )


def build_model(recipe: StepRecipe, cfg: ModelConfig) -> VideoLM:
    """The model on the CPU in float32, with the weights of `init` or random ones by the seed.

    A scorer that `init` lacks is random. Every process builds the same. Raises as the loaders do.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    init = open_init(recipe)
    if init is None:
        return VideoLM(cfg).init_weights(generator)
    model = init.load()
    assert cfg.scorer is not None
    if model.scorer is None:
        model.scorer = _random_scorer(cfg.scorer, cfg.vision.width, generator)
    model.cfg, model.scorer.cfg = cfg, cfg.scorer
    for parameter in model.parameters():
        # Not the mapped file itself, which updates would write into.
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(True)
    return model


def _random_scorer(cfg: ScorerConfig, width: int, generator: torch.Generator) -> TokenScorer:
    """As the published code starts it: truncated normal by fan in, zero biases."""
    scorer = TokenScorer(cfg, width)
    for module in scorer.modules():
        if isinstance(module, nn.Linear):
            std = module.in_features**-0.5
            nn.init.trunc_normal_(module.weight, 0, std, -3 * std, 3 * std, generator)
            nn.init.zeros_(module.bias)
    return scorer
