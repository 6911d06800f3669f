"""The model a recipe trains: its shape, its first weights, its vocabulary."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from pathlib import Path

import torch
from torch import nn

from edge_vlm.config import ModelConfig, ScorerConfig
from edge_vlm.errors import CheckpointError, ConfigError
from edge_vlm.formats.usage import FrameRule, Usage
from edge_vlm.json_text import MALFORMED
from edge_vlm.model.checkpoint import TOKENIZER
from edge_vlm.model.published.files import read_json
from edge_vlm.model.published.folder import ModelFolder, open_folder, stts_scorer
from edge_vlm.model.scorer import TokenScorer
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import demo as demo_config
from edge_vlm.presets import (
    molmo2_4b,
    molmo2_8b,
    molmo2_o_7b,
    tiny,
)
from edge_vlm.text.prompt import PromptStyle
from edge_vlm.world.questions import vocabulary
from edge_vlm.world.scenes import WorldConfig
from edge_vlm_training.recipes.base import Clips, Recipe, Rows
from edge_vlm_training.trainer.adapters import frozen_model, with_adapters
from edge_vlm_training.trainer.checkpoints import WHOLE, latest
from edge_vlm_training.world.more_words import vocabulary_of, with_more_words
from edge_vlm_training.world.vocabulary import READ_ONLY, build_tokenizer

_PUBLISHED = {"molmo2_4b": molmo2_4b, "molmo2_8b": molmo2_8b, "molmo2_o_7b": molmo2_o_7b}


def prepare_tokenizer(recipe: Recipe, folder: Path) -> Path:
    """Puts the run's tokenizer.json into its folder; the folder is made if need be.

    Raises ConfigError if the recipe names none for a published vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TOKENIZER
    if recipe.tokenizer is None and recipe.world_words:
        build_tokenizer(vocabulary(), path)
    elif (init := open_init(recipe)) is not None:
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


def model_config(recipe: Recipe, tokenizer: Path) -> ModelConfig:
    """The shape that will be trained: that of `init` with a scorer, in the recipe's mode.

    Reads headers only. Raises CheckpointError or ConfigError for an unusable `init`.
    """
    init = None if recipe.world_words else open_init(recipe)
    cfg = _named_config(recipe, tokenizer) if init is None else init.config
    scorer = cfg.scorer or stts_scorer(cfg, cfg.vision.mlp_width)
    scorer = dataclasses.replace(scorer, rescale=recipe.rescale)
    try:
        return dataclasses.replace(cfg, scorer=scorer, attention=recipe.attention)
    except ValueError as error:
        raise ConfigError(f"no room for the scorer: {error}", where=recipe.init) from error


def _named_config(recipe: Recipe, tokenizer: Path) -> ModelConfig:
    if recipe.model in _PUBLISHED:
        return _PUBLISHED[recipe.model]()
    try:
        words = len(read_json(tokenizer)["model"]["vocab"])
    except MALFORMED as error:
        raise ConfigError(f"not a tokenizer.json: {error}", where=tokenizer) from error
    # Markers that are only read come last (`build_tokenizer`): the head does not cover them.
    make = demo_config if recipe.model == "demo" else tiny
    return make(words - len(READ_ONLY), len(READ_ONLY))


def open_init(recipe: Recipe) -> ModelFolder | None:
    """The folder a recipe starts from, or the checkpoint in that of a run.

    Raises as `open_folder`.
    """
    if recipe.init is None:
        return None
    in_run = latest(recipe.init) is not None
    return open_folder(recipe.init / WHOLE if in_run else recipe.init, recipe.tokenizer)


def init_notes(recipe: Recipe) -> list[str]:
    """What to know about the weights a recipe starts from, one line each."""
    init = open_init(recipe)
    if init is None:
        return []
    fresh = [] if init.config.scorer else [f"{recipe.init} has no scorer: it starts random"]
    return [*init.notes, *fresh]


def trained_usage(recipe: Recipe) -> Usage:
    """What the trained model will want: as `init`, with the recipe's markers, and the frames and
    share of its last stage. Of several shares it is served at the middle one.

    A model of rendered clips alone knows times up to the length of the longest, or those of the
    streams it was shown; a session stays inside.
    """
    data = recipe.stages[-1].data
    if not isinstance(data, Rows):
        clips = [stage.data for stage in recipe.stages if isinstance(stage.data, Clips)]
        longest = max(
            clip.stream_time_s if clip.stream_share else clip.num_frames / WorldConfig().fps
            for clip in clips
        )
        style = PromptStyle(own_frame_markers=recipe.frame_markers)
        return Usage(style=style, defaults={"max_time_s": longest})
    init = open_init(recipe)
    before = Usage() if init is None else init.usage
    return dataclasses.replace(
        before,
        style=dataclasses.replace(before.style, own_frame_markers=recipe.frame_markers),
        frames=FrameRule(num_frames=data.max_frames, max_fps=data.fps),
        defaults={**before.defaults, "keep_ratio": statistics.median_high(data.keep_ratio)},
        card=None,  # it was told of the weights before they were trained on
    )


def build_model(recipe: Recipe, cfg: ModelConfig, tokenizer: Path) -> VideoLM:
    """The model on the CPU in float32, with the weights of `init` or random ones by the seed.
    With `lora` what is trained is float32, and `init` is frozen as that says.

    A scorer that `init` lacks, or that is not wanted, is random. Every process builds the same.
    Raises as the loaders do, and CheckpointError for an `init` that is not of the shape that
    `world_words` asks for.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    init = open_init(recipe)
    if init is None:
        return VideoLM(cfg).init_weights(generator)
    if recipe.world_words:
        model = VideoLM(cfg).init_weights(generator)
        _take_over(model, init, tokenizer)
    elif recipe.lora is not None:
        model = frozen_model(init, recipe.lora)
    else:
        model = init.load()
    assert cfg.scorer is not None
    if model.scorer is None or recipe.new_scorer:
        model.scorer = _random_scorer(cfg.scorer, cfg.vision.width, generator)
    model.cfg, model.scorer.cfg = cfg, cfg.scorer
    if recipe.lora is not None:
        return with_adapters(model, recipe, generator)
    for parameter in model.parameters():
        # Not the mapped file itself, which updates would write into.
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(True)
    return model


def _take_over(model: VideoLM, init: ModelFolder, tokenizer: Path) -> None:
    """The weights of `init`, embeddings by their words, into a model that may know more words."""
    weights = init.load().state_dict()
    try:
        known, wanted = vocabulary_of(init.require_tokenizer()), vocabulary_of(tokenizer)
        weights = with_more_words(weights, known, wanted, model.cfg.language.base_vocab)
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint is not one of this recipe's models: {error}",
            where=init.path,
            remedy="start without --init, or from a checkpoint of this shape and world",
        ) from error


def _random_scorer(cfg: ScorerConfig, width: int, generator: torch.Generator) -> TokenScorer:
    """As the published code starts it: truncated normal by fan in, zero biases."""
    scorer = TokenScorer(cfg, width)
    for module in scorer.modules():
        if isinstance(module, nn.Linear):
            std = module.in_features**-0.5
            nn.init.trunc_normal_(module.weight, 0, std, -3 * std, 3 * std, generator)
            nn.init.zeros_(module.bias)
    return scorer
