"""A recipe that cannot fit is refused before anything is loaded, with numbers and a way out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from edge_vlm.errors import RecipeTooLarge
from edge_vlm.presets import molmo2_4b, tiny
from edge_vlm_training.recipes.base import Recipe
from edge_vlm_training.recipes.molmo2 import molmo2_4b_stts_50, stts_smoke
from edge_vlm_training.recipes.overrides import override
from edge_vlm_training.trainer.distributed import Ranks
from edge_vlm_training.trainer.memory import GIB, check_fits, estimate

CFG = molmo2_4b()
PARAMETERS = 4_884_635_969  # published, with the scorer's 33,766,769


def gib(recipe: Recipe, processes: int) -> float:
    return estimate(recipe, CFG, processes, cuda=True).total / GIB


def test_weights_gradients_and_moments_are_four_float32_each() -> None:
    parts = estimate(molmo2_4b_stts_50(), CFG, 8, cuda=True).parts
    assert parts["weights, gradients and moments"] == 16 * PARAMETERS / 8


def test_what_saves_memory_lowers_the_estimate() -> None:
    recipe = molmo2_4b_stts_50()
    assert gib(recipe, 64) < gib(recipe, 8) < gib(recipe, 1)
    for change in ("device_batch=1", "sequence_length=5000", "keep_ratio=0.2", "batch=64"):
        assert gib(override(recipe, [change]), 8) <= gib(recipe, 8), change
    assert gib(override(recipe, ["activation_checkpointing=false"]), 8) > 2 * gib(recipe, 8)


def test_the_published_recipe_fits_the_published_machine_and_not_one_gpu() -> None:
    assert gib(molmo2_4b_stts_50(), 8) < 80
    assert gib(molmo2_4b_stts_50(), 1) > 80


def test_a_recipe_too_large_is_refused_with_numbers_and_a_remedy_that_fits() -> None:
    recipe = override(molmo2_4b_stts_50(), ["activation_checkpointing=false", "memory_gib=40"])
    alone = Ranks(0, 1, torch.device("cpu"))
    with pytest.raises(RecipeTooLarge) as caught:
        check_fits(recipe, CFG, alone)
    message = str(caught.value)
    assert re.search(r"needs about [\d.]+ GiB \(weights, gradients and moments [\d.]+", message)
    assert "there are 40.0 GiB" in message
    found = re.search(r"torchrun with (\d+) processes.* it needs ([\d.]+) GiB", message)
    assert found is not None
    assert float(found[2]) <= 40
    settings = re.findall(r"--set (\S+)", message)
    assert "activation_checkpointing=true" in settings
    changed = override(recipe, settings)
    processes = Ranks(0, int(found[1]), torch.device("cpu"))
    assert check_fits(changed, CFG, processes).total <= 40 * GIB


def test_a_small_recipe_fits(tmp_path: Path) -> None:
    recipe = override(stts_smoke(), ["model=tiny", "memory_gib=2"])
    assert check_fits(recipe, tiny(), Ranks(0, 1, torch.device("cpu"))).total < 2 * GIB
    assert "GiB" in str(estimate(recipe, tiny(), 1, cuda=False))
