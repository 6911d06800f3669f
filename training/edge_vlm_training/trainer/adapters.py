"""What a recipe with `lora` trains: adapters on frozen weights, and on which ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from edge_vlm.errors import CheckpointError, ConfigError
from edge_vlm.model.checkpoint import write_text
from edge_vlm.model.lora.folder import Base, identify
from edge_vlm.model.lora.layers import adapted, add_lora, block_matrices
from edge_vlm.model.published.folder import ModelFolder
from edge_vlm.model.video_lm import VideoLM
from edge_vlm_training.recipes.base import Lora, Recipe
from edge_vlm_training.trainer.distributed import Ranks

BASE = "base.json"


def check_lora(recipe: Recipe, ranks: Ranks) -> None:
    """Before anything is read. Raises ConfigError: no weights to adapt, or several processes;
    MissingExtraError where the library that packs weights is absent."""
    if recipe.lora is None:
        return
    if recipe.init is None:
        raise ConfigError(
            f"{recipe.name} trains adapters, and names no weights to put them on",
            remedy="add --init FOLDER",
        )
    if ranks.size > 1:
        raise ConfigError(
            f"adapters are trained in one process, and there are {ranks.size}",
            remedy="start it without torchrun, or take a recipe that trains whole weights",
        )
    if recipe.lora.base == "nf4":
        import edge_vlm.model.lora.nf4  # noqa: F401


def claim_base(folder: Path, init: ModelFolder, lora: Lora, *, resume: bool) -> Base:
    """Records in the run's folder what its adapters are on, or checks that it still is.

    Raises CheckpointError if the weights are others than when the run began.
    """
    base = identify(init, lora.base)
    if resume and Base.read(folder / BASE).fingerprint != base.fingerprint:
        raise CheckpointError(
            f"the run was started on other weights than lie in {init.path} now",
            where=folder / BASE,
            remedy="name the folder that it was started on: --init FOLDER",
        )
    write_text(folder / BASE, json.dumps(base.to_dict(), indent=1))
    return base


def adapted_layers(recipe: Recipe, names: Iterable[str]) -> list[str]:
    """The layers that get an adapter, among weights by name."""
    assert recipe.lora is not None
    trained = frozenset[str]().union(*(stage.parts for stage in recipe.stages))
    return adapted(names, trained, recipe.lora.targets)


def frozen_model(init: ModelFolder, lora: Lora) -> VideoLM:
    """The weights of `init` as they are kept while adapters are trained; a scorer in float32.

    What is stored in that type already stays a mapped file.
    """
    model = init.load(torch.float32 if lora.base == "float32" else torch.bfloat16)
    if model.scorer is not None:
        for name, parameter in model.scorer.named_parameters(prefix="scorer"):
            parameter.data = init.weights[name].float().clone()
    return model


def with_adapters(model: VideoLM, recipe: Recipe, rng: torch.Generator) -> VideoLM:
    """Freezes all but the scorer, packs the blocks if they are wanted so, and adds adapters."""
    assert recipe.lora is not None
    names = list(model.state_dict())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("scorer."))
    if recipe.lora.base == "nf4":
        from edge_vlm.model.lora.nf4 import PackedLinear

        for name in block_matrices(names):
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            model.set_submodule(name, PackedLinear(layer))
    add_lora(model, adapted_layers(recipe, names), recipe.lora.rank, recipe.lora.alpha, rng)
    return model
