"""Recipes by steps and `--set`."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from edge_vlm.config import Rescale, VisionAttention
from edge_vlm.errors import ConfigError
from edge_vlm_training.recipes.base import (
    STEP_RECIPES,
    StepRecipe,
    molmo2_4b_stts_30,
    molmo2_4b_stts_50,
    stts_smoke,
)
from edge_vlm_training.recipes.overrides import override, valid_keys
from edge_vlm_training.recipes.stages import demo_cpu


def test_the_published_recipe_is_as_published() -> None:
    recipe = molmo2_4b_stts_50()
    assert (recipe.model, recipe.steps, recipe.batch, recipe.device_batch) == (
        *("molmo2_4b", 6250, 64, 2),
    )
    assert (recipe.sequence_length, recipe.max_frames, recipe.fps) == (9686, 64, 2.0)
    rates = {"llm": 1e-5, "vit": 5e-6, "connector": 5e-6, "scorer": 1e-4}
    assert recipe.learning_rates() == rates
    assert (recipe.warmup_steps, recipe.final_rate, recipe.clip_norm) == (200, 0.1, 1.0)
    assert (recipe.betas, recipe.eps, recipe.z_loss) == ((0.9, 0.95), 1e-6, 1e-4)
    assert (recipe.aux_weight, recipe.removed, recipe.precision) == (0.5, (0.5,), "bfloat16")
    assert recipe.frame_markers
    assert recipe.residual_dropout == 0.1
    assert (recipe.rescale, recipe.attention) == (Rescale.ROW, VisionAttention.ALL)
    less = dataclasses.asdict(molmo2_4b_stts_30())
    more = dataclasses.asdict(recipe)
    differing = {key for key in more if more[key] != less[key]}
    assert differing == {"name", "removed"}
    assert less["removed"] == (0.3,)


def test_the_rate_warms_up_and_falls_by_a_cosine_to_a_tenth() -> None:
    recipe = molmo2_4b_stts_50()
    assert recipe.rate_at(0) == 1 / 200
    assert recipe.rate_at(199) == recipe.rate_at(200) == 1.0
    half = 200 + (6250 - 200) // 2
    assert recipe.rate_at(half) == pytest.approx(0.55)
    assert recipe.rate_at(6250) == pytest.approx(0.1)
    rates = [recipe.rate_at(step) for step in range(200, 6250)]
    assert all(a > b for a, b in itertools.pairwise(rates))


@pytest.mark.parametrize("name", STEP_RECIPES)
def test_a_recipe_is_called_what_its_function_is_and_comes_back_from_json(name: str) -> None:
    recipe = dataclasses.replace(STEP_RECIPES[name](), init=Path("some/folder"))
    assert recipe.name == name
    assert StepRecipe(**json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_set_reads_each_field_by_its_type() -> None:
    settings = ["steps=9", "lr_scorer=2e-3", "activation_checkpointing=true", "removed=0,0.3,0.5"]
    settings += [
        "rescale=row",
        "init=/tmp/there",
        "data=world@1,clips.jsonl@3",
        "precision=float32",
    ]
    recipe = override(stts_smoke(), settings)
    assert (recipe.steps, recipe.lr_scorer, recipe.activation_checkpointing) == (9, 2e-3, True)
    assert recipe.removed == (0.0, 0.3, 0.5)
    assert recipe.rescale is Rescale.ROW
    assert recipe.init == Path("/tmp/there")
    assert recipe.data == ("world@1", "clips.jsonl@3")
    assert recipe.precision == "float32"
    assert override(recipe, ["init=none"]).init is None
    # Fields that must fit each other are checked when all are set.
    both = override(stts_smoke(), ["batch=9", "device_batch=3"])
    assert (both.batch, both.device_batch) == (9, 3)


def test_set_goes_down_into_the_stages_of_a_recipe_by_the_clock() -> None:
    recipe = override(demo_cpu(), ["stages.1.batch=5", "stages.1.minutes=2.5", "seed=3"])
    assert (recipe.stages[1].batch, recipe.stages[1].minutes, recipe.seed) == (5, 2.5, 3)
    assert recipe.stages[0] == demo_cpu().stages[0]
    with pytest.raises(ConfigError, match="stages are numbered 0 to"):
        override(demo_cpu(), ["stages.99.batch=5"])
    with pytest.raises(ConfigError, match=r"valid keys: .*stages\.N\.minutes"):
        override(demo_cpu(), ["stages.1.colour=5"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stepz=3", r"unknown key 'stepz'.*did you mean steps\?.*valid keys: .*lr_scorer"),
        ("steps", "is not key=value"),
        ("steps=many", "expected a whole number"),
        ("lr_llm=fast", "expected a number"),
        ("activation_checkpointing=maybe", "expected true or false"),
        ("precision=float16", "expected one of float32, bfloat16"),
        ("rescale=col", "expected one of row, frame, absolute"),
        ("removed=0.3,x", "expected a number"),
        ("removed=1.5", r"shares must lie in \[0, 1\)"),
        ("steps=0", "steps = 0: must be positive"),
        ("device_batch=3", "must be a multiple of device_batch = 3"),
        ("betas=0.9", "betas = .*needs two numbers"),
        ("name=other", "unknown key 'name'"),
    ],
)
def test_a_wrong_setting_says_what_is_wrong(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(stts_smoke(), [setting])


def test_every_field_but_the_name_can_be_set() -> None:
    fields = {field.name for field in dataclasses.fields(StepRecipe)} - {"name"}
    assert set(valid_keys(stts_smoke())) == fields
    for name in fields:
        value = getattr(stts_smoke(), name)
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        shown = getattr(shown, "value", shown)
        assert override(stts_smoke(), [f"{name}={shown}"]) == stts_smoke(), name
