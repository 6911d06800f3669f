"""Recipes and `--set`."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from edge_vlm.config import Rescale, VisionAttention
from edge_vlm.errors import ConfigError
from edge_vlm_training.config import from_plain, plain
from edge_vlm_training.recipes.base import Answers, Minutes, Recipe, Rows, Similarity, Steps
from edge_vlm_training.recipes.catalog import RECIPES
from edge_vlm_training.recipes.demo import demo_cpu
from edge_vlm_training.recipes.molmo2 import molmo2_4b_stts_30, molmo2_4b_stts_50, stts_smoke
from edge_vlm_training.recipes.overrides import leaves, override, valid_keys


def values(recipe: Recipe) -> dict[str, object]:
    return {".".join(path): holder[key] for path, holder, key in leaves(plain(recipe))}


def test_the_published_recipe_is_as_published() -> None:
    recipe = molmo2_4b_stts_50()
    (stage,) = recipe.stages
    data = stage.data
    assert isinstance(data, Rows)
    assert (recipe.model, stage.length) == ("molmo2_4b", Steps(6250))
    assert (data.batch, data.device_batch, data.sequence_length) == (64, 2, 9686)
    assert (data.max_frames, data.fps, data.keep_ratio) == (64, 2.0, (0.5,))
    assert stage.train == {"llm": 1e-5, "vit": 5e-6, "connector": 5e-6, "scorer": 1e-4}
    assert (stage.warmup_steps, stage.rate, stage.cosine) == (200, (1.0, 0.1), True)
    assert stage.terms == (Answers(z_loss=1e-4), Similarity(0.5))
    assert (recipe.betas, recipe.eps, recipe.clip_norm) == ((0.9, 0.95), 1e-6, 1.0)
    assert (recipe.weight_decay, recipe.precision) == (0.0, "bfloat16")
    assert recipe.frame_markers
    assert recipe.residual_dropout == 0.1
    assert (recipe.rescale, recipe.attention) == (Rescale.ROW, VisionAttention.ALL)
    less, more = values(molmo2_4b_stts_30()), values(recipe)
    differing = {key for key in more if more[key] != less[key]}
    assert differing == {"stages.0.data.keep_ratio"}
    assert less["stages.0.data.keep_ratio"] == (0.7,)


def test_the_rate_warms_up_and_falls_by_a_cosine_to_a_tenth() -> None:
    (stage,) = molmo2_4b_stts_50().stages

    def rate(step: int) -> float:
        return stage.rate_at(step, step / 6250)

    assert rate(0) == pytest.approx(1 / 200)
    assert rate(199) == rate(200) == 1.0
    assert rate(200 + 3025) == pytest.approx(0.55)
    assert rate(6250) == pytest.approx(0.1)
    rates = [rate(step) for step in range(200, 6250)]
    assert all(a > b for a, b in itertools.pairwise(rates))


def test_a_stage_of_minutes_moves_its_rate_by_the_clock() -> None:
    frozen = demo_cpu().stages[-2]
    assert (frozen.name, frozen.length) == ("eight-frames-frozen", Minutes(26.0))
    late = [frozen.rate_at(1000, share) for share in (0.0, 0.2, 0.6, 1.0, 1.2)]
    assert late == pytest.approx([0.8, 0.8, 0.405, 0.01, 0.01])
    assert frozen.rate_at(0, 0.0) == pytest.approx(0.8 / 50)
    assert frozen.length.progress(7, 13 * 60) == 0.5


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_called_what_its_function_is_and_comes_back_from_json(name: str) -> None:
    recipe = override(RECIPES[name](), ["init=some/folder"])
    assert recipe.name == name
    assert recipe.init == Path("some/folder")
    assert from_plain(json.loads(json.dumps(plain(recipe))), Recipe) == recipe


def test_set_reads_each_field_by_its_type() -> None:
    settings = ["steps=9", "lr_scorer=2e-3", "activation_checkpointing=true", "removed=0,0.3,0.5"]
    settings += ["rescale=row", "init=/elsewhere", "data=world@1,clips.jsonl@3"]
    settings += ["precision=float32", "final_rate=0.2", "aux_weight=0.25", "z_loss=0"]
    recipe = override(stts_smoke(), settings)
    (stage,) = recipe.stages
    assert isinstance(stage.data, Rows)
    assert stage.length == Steps(9)
    assert stage.train["scorer"] == 2e-3
    assert recipe.activation_checkpointing is True
    assert stage.data.keep_ratio == (1.0, 0.7, 0.5)
    assert recipe.rescale is Rescale.ROW
    assert recipe.init == Path("/elsewhere")
    assert stage.data.sources == ("world@1", "clips.jsonl@3")
    assert recipe.precision == "float32"
    assert stage.rate == (1.0, 0.2)
    assert stage.terms == (Answers(), Similarity(0.25))
    assert override(recipe, ["init=none"]).init is None
    # Fields that must fit each other are checked when all are set.
    (both,) = override(stts_smoke(), ["batch=9", "device_batch=3"]).stages
    assert (both.data.batch, both.data.device_batch) == (9, 3)


def test_set_goes_down_into_one_stage_or_all() -> None:
    settings = ["stages.1.batch=5", "stages.1.minutes=2.5", "seed=3", "stages.2.steps=7"]
    recipe = override(demo_cpu(), [*settings, "stages.2.lr=2e-3", "stages.3.length.minutes=1"])
    assert (recipe.stages[1].data.batch, recipe.stages[1].length) == (5, Minutes(2.5))
    assert (recipe.stages[2].length, recipe.seed) == (Steps(7), 3)
    assert recipe.stages[2].train["llm+scorer"] == recipe.stages[2].train["probes"] == 2e-3
    assert recipe.stages[3].length == Minutes(1.0)
    assert recipe.stages[0] == demo_cpu().stages[0]
    assert {stage.length for stage in override(demo_cpu(), ["steps=2"]).stages} == {Steps(2)}
    for key in ("stages.99.batch=5", "stages.99.steps=5"):
        with pytest.raises(ConfigError, match="stages are numbered 0 to 8"):
            override(demo_cpu(), [key])
    with pytest.raises(ConfigError, match=r"valid keys: .*stages\.N\.minutes"):
        override(demo_cpu(), ["stages.1.colour=5"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("stepz=3", r"unknown key 'stepz'.*did you mean steps\?$"),
        ("zebra=3", r"unknown key 'zebra'.*valid keys: .*lr_scorer"),
        ("steps", "is not key=value"),
        ("steps=many", "Expected `int`, got `str`.*steps"),
        ("lr_llm=fast", "Expected `float`.*train"),
        ("activation_checkpointing=maybe", "Expected `bool`"),
        ("precision=float16", "Invalid enum value 'float16'"),
        ("rescale=col", "Invalid enum value 'col'"),
        ("removed=0.3,x", "could not convert"),
        ("removed=1.5", "Expected `float` > 0.0"),
        ("steps=0", "Expected `int` >= 1"),
        ("device_batch=3", "must be a multiple of device_batch = 3"),
        ("betas=0.9", r"`array` of length 2, got 1"),
        ("name=other", "unknown key 'name'"),
    ],
)
def test_a_wrong_setting_says_what_is_wrong(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(stts_smoke(), [setting])


@pytest.mark.parametrize("name", ["stts_smoke", "demo_cpu"])
def test_every_field_but_names_can_be_set_by_its_path(name: str) -> None:
    recipe = RECIPES[name]()
    assert {path.rpartition(".")[2] for path in values(recipe)} >= {"seed", "batch", "weight"}
    for path, value in values(recipe).items():
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
        assert override(recipe, [f"{path}={shown}"]) == recipe, path


@pytest.mark.parametrize("name", RECIPES)
def test_every_listed_key_is_known(name: str) -> None:
    recipe = RECIPES[name]()
    keys = valid_keys(recipe)
    assert {"lr_llm", "aux_weight", "steps", "minutes", "removed", "keep_ratio", "seed"} <= set(
        keys
    )
    assert ("lr_scorer" in keys, "timeline_weight" in keys) == (
        True,
        "demo_" in name[:5] or name == "smoke",
    )
    for key in keys:
        try:
            override(recipe, [f"{key}=0.5"])
        except ConfigError as error:
            assert "unknown key" not in str(error), key
