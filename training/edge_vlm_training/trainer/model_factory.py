"""The model a recipe trains: its shape, its first weights, its vocabulary."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch
from torch import nn

from edge_vlm.config import ModelConfig, ScorerConfig, molmo2_4b, molmo2_8b, molmo2_o_7b, tiny
from edge_vlm.config import demo as demo_config
from edge_vlm.errors import CheckpointError, ConfigError
from edge_vlm.model.checkpoint import CONFIG, TOKENIZER, load_checkpoint, read_config
from edge_vlm.model.published.files import read_json
from edge_vlm.model.published.folder import load_published, open_published, stts_scorer
from edge_vlm.model.scorer import TokenScorer
from edge_vlm.model.video_lm import VideoLM
from edge_vlm_training.recipes.base import Recipe
from edge_vlm_training.trainer.checkpoints import WHOLE, latest
from edge_vlm_training.world.more_words import vocabulary_of, with_more_words
from edge_vlm_training.world.questions import vocabulary
from edge_vlm_training.world.vocabulary import READ_ONLY, build_tokenizer

_PUBLISHED = {"molmo2_4b": molmo2_4b, "molmo2_8b": molmo2_8b, "molmo2_o_7b": molmo2_o_7b}


def prepare_tokenizer(recipe: Recipe, folder: Path) -> Path:
    """Puts the run's tokenizer.json into its folder; the folder is made if need be.

    Raises ConfigError if the recipe names none for a published vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TOKENIZER
    source = recipe.tokenizer
    if source is None and recipe.init is not None and not recipe.world_words:
        source = weights_folder(recipe.init) / TOKENIZER
    if source is not None:
        if not source.is_file():
            raise ConfigError(
                "there is no such tokenizer", where=source, remedy="add --set tokenizer=FILE"
            )
        shutil.copyfile(source, path)
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
    if recipe.init is None or recipe.world_words:
        cfg = _named_config(recipe, tokenizer)
    elif _is_published(init := weights_folder(recipe.init)):
        cfg = open_published(init).config
    else:
        cfg = read_config(init)
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
    except (KeyError, TypeError) as error:
        raise ConfigError(f"not a tokenizer.json: {error}", where=tokenizer) from error
    # Markers that are only read come last (`build_tokenizer`): the head does not cover them.
    make = demo_config if recipe.model == "demo" else tiny
    return make(words - len(READ_ONLY), len(READ_ONLY))


def _is_published(folder: Path) -> bool:
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            "there is no checkpoint", where=folder, remedy="name a folder that holds a config.json"
        )
    return "model_type" in read_json(folder / CONFIG)


def weights_folder(init: Path) -> Path:
    """`init` itself, or the checkpoint in the folder of a run."""
    return init / WHOLE if latest(init) is not None else init


def build_model(recipe: Recipe, cfg: ModelConfig, tokenizer: Path) -> VideoLM:
    """The model on the CPU in float32, with the weights of `init` or random ones by the seed.

    A scorer that `init` lacks, or that is not wanted, is random. Every process builds the same.
    Raises as the loaders do, and CheckpointError for an `init` that is not of the shape that
    `world_words` asks for.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    if recipe.init is None:
        return VideoLM(cfg).init_weights(generator)
    init = weights_folder(recipe.init)
    if recipe.world_words:
        model = VideoLM(cfg).init_weights(generator)
        _take_over(model, init, tokenizer)
    elif _is_published(init):
        model = load_published(init)
    else:
        model = load_checkpoint(init)
    assert cfg.scorer is not None
    if model.scorer is None or recipe.new_scorer:
        model.scorer = _random_scorer(cfg.scorer, cfg.vision.width, generator)
    model.cfg, model.scorer.cfg = cfg, cfg.scorer
    for parameter in model.parameters():
        # Not the mapped file itself, which updates would write into.
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(True)
    return model


def _take_over(model: VideoLM, init: Path, tokenizer: Path) -> None:
    """The weights of `init`, embeddings by their words, into a model that may know more words."""
    weights = load_checkpoint(init).state_dict()
    try:
        known, wanted = vocabulary_of(init / TOKENIZER), vocabulary_of(tokenizer)
        weights = with_more_words(weights, known, wanted, model.cfg.language.base_vocab)
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint is not one of this recipe's models: {error}",
            where=init,
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
