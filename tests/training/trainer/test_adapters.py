"""Adapters in the one loop: what learns and what does not, what is kept, what is refused."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edge_vlm.cli import main
from edge_vlm.errors import (
    CheckpointError,
    ConfigError,
    MissingExtraError,
    RecipeTooLarge,
)
from edge_vlm.model.checkpoint import load_checkpoint, save_checkpoint
from edge_vlm.model.lora.layers import LoraLinear
from edge_vlm.model.published.folder import open_folder
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import molmo2_4b, tiny
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm.world.questions import vocabulary
from edge_vlm_training.config import msgspec
from edge_vlm_training.data.packing.batch import PackedBatch
from edge_vlm_training.objective.objective import Objective, totals_of
from edge_vlm_training.objective.terms import Totals
from edge_vlm_training.recipes.base import Lora, Recipe
from edge_vlm_training.recipes.molmo2 import (
    molmo2_4b_stts_50,
    molmo2_4b_stts_50_lora,
    stts_demo_lora,
)
from edge_vlm_training.recipes.overrides import override
from edge_vlm_training.trainer.adapters import check_lora, claim_base
from edge_vlm_training.trainer.checkpoints import stored_weights
from edge_vlm_training.trainer.distributed import Ranks
from edge_vlm_training.trainer.loop import Run
from edge_vlm_training.trainer.memory import check_fits, estimate
from edge_vlm_training.trainer.model_factory import build_model, model_config
from edge_vlm_training.world.vocabulary import build_tokenizer
from tests.tiny import tiny_checkpoint
from tests.training.trainer.batches import SHAPES, HandStream, make_batch
from tests.training.trainer.runs import ALONE, go, reports

SMALL = [
    *("steps=4", "batch=2", "device_batch=1", "save_every=2", "log_every=1", "sample_every=2"),
    *("sample_tokens=2", "peak_tflops=1", "warmup_steps=0", "residual_dropout=0.1", "rank=4"),
    f"init={tiny_checkpoint()}",
]
RECIPE = override(stts_demo_lora(), SMALL)
HALF = override(RECIPE, ["base=bfloat16", "precision=bfloat16", "activation_checkpointing=true"])


class SameBatches(HandStream):
    """The same four again and again, so that losses can be compared."""

    def __iter__(self) -> Iterator[PackedBatch]:
        while True:
            number = self._batches % len(SHAPES)
            self._batches += 1
            yield make_batch(self._cfg.vision, SHAPES[number], number)


def adapter_run(folder: Path, recipe: Recipe = RECIPE, *, resume: bool = False) -> Run:
    """As `train` makes it, on batches made by hand."""
    folder.mkdir(exist_ok=True)
    words = tiny_checkpoint() / "tokenizer.json"
    shutil.copyfile(words, folder / words.name)
    cfg = model_config(recipe, words)
    model = build_model(recipe, cfg, words)
    base = None
    if recipe.lora is not None:
        assert recipe.init is not None
        base = claim_base(folder, open_folder(recipe.init), recipe.lora, resume=resume)
    prompt, stream = PromptFormat(Tokenizer.from_file(words)), SameBatches(cfg)
    run = Run(recipe, cfg, model, lambda at, mix: stream, ALONE, folder, prompt, base=base)
    if resume:
        run.resume()
    return run


def frozen_weights(run: Run) -> dict[str, Tensor]:
    return {n: p for n, p in run.model.named_parameters() if not p.requires_grad}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Four steps with dropout."""
    run = adapter_run(tmp_path_factory.mktemp("lora") / "run")
    go(run)
    run.save_whole()
    return run


@pytest.mark.parametrize("recipe", [RECIPE, HALF], ids=["float32", "bfloat16"])
def test_frozen_weights_stay_and_have_no_gradients_and_no_moments(
    recipe: Recipe, tmp_path: Path
) -> None:
    # In the first step what is multiplied by zeros has no gradient.
    recipe = override(recipe, ["steps=2"])
    run = adapter_run(tmp_path, recipe)
    assert recipe.lora is not None
    before = {name: weight.clone() for name, weight in frozen_weights(run).items()}
    start = {name: weight.detach().clone() for name, weight in run.weights().items()}
    kind = torch.float32 if recipe.lora.base == "float32" else torch.bfloat16
    assert {weight.dtype for weight in before.values()} == {kind}
    assert {weight.dtype for weight in start.values()} == {torch.float32}
    whole = open_folder(tiny_checkpoint())
    assert len(before) == sum(not name.startswith("scorer.") for name in whole.weights)

    go(run)
    after = frozen_weights(run)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(weight.grad is None for weight in after.values())
    assert all(not torch.equal(start[name], weight) for name, weight in run.weights().items())
    assert all(name.startswith("scorer.") or ".lora_" in name for name in run.weights())
    names = {name.partition("/")[2] for name in run.updater.moments(run.at.stage_step)}
    assert names == set(run.weights())
    assert set(stored_weights(tmp_path, "")) == set(run.weights())


def test_the_loss_falls_as_in_full_training(tmp_path: Path) -> None:
    """The same clips again and again, the same steps; adapters at a higher rate, as they need."""

    def fall(recipe: Recipe, name: str) -> tuple[float, float]:
        recipe = override(recipe, ["steps=8", "residual_dropout=0", "save_every=0"])
        losses = [line["answer_loss"] for line in go(adapter_run(tmp_path / name, recipe))]
        return sum(losses[:2]) / 2, sum(losses[-2:]) / 2

    rates = ["lr_llm=3e-3", "lr_vit=1e-3", "sample_every=0"]
    whole = msgspec.structs.replace(override(RECIPE, rates), lora=None)
    full_start, full_end = fall(whole, "full")
    start, end = fall(override(RECIPE, [*rates, "lr_llm=1e-2", "rank=16"]), "lora")
    assert start == pytest.approx(full_start, rel=0.05)
    assert full_start - full_end > 0.5
    assert start - end > 0.7 * (full_start - full_end)


def test_merged_the_trained_adapters_give_the_same_loss(finished: Run) -> None:
    cfg = finished.cfg
    batch = make_batch(cfg.vision, SHAPES[0], 9)
    weight, cells, number = totals_of([batch], cfg.vision.num_cells)
    totals = Totals(weight, cells, float(number))
    merged = open_folder(finished.folder / "checkpoint").load()
    assert not any(isinstance(module, LoraLinear) for module in merged.modules())
    losses = []
    for model in (finished.model, merged, load_checkpoint(tiny_checkpoint())):
        objective = Objective(model, finished.stage.terms).eval()
        with torch.no_grad():
            losses.append(float(objective(batch, totals).loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


def test_a_killed_run_resumes_to_the_same_bits(finished: Run, tmp_path: Path) -> None:
    run = adapter_run(tmp_path / "killed")
    save = run.save

    def die_after_saving() -> Path:
        save()
        raise KeyboardInterrupt

    run.save = die_after_saving  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        go(run)
    again = adapter_run(tmp_path / "killed", resume=True)
    assert again.at.step == 2
    go(again)
    whole = finished.weights()
    assert all(torch.equal(weight, whole[name]) for name, weight in again.weights().items())
    assert [line["loss"] for line in reports(again.folder)] == [
        line["loss"] for line in reports(finished.folder)
    ]


def test_a_base_may_move_and_other_weights_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoint(), base)
    go(adapter_run(tmp_path / "run", override(RECIPE, ["steps=1"])))
    recipe = override(RECIPE, [f"init={base}", "steps=1"])
    run = adapter_run(tmp_path / "run", recipe, resume=True)
    assert run.base is not None
    assert run.base.path == base
    tensors = load_file(base / "model.safetensors")
    tensors["llm.blocks.0.mlp.up.weight"] *= 1.5
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"other weights than lie in .*base now"):
        adapter_run(tmp_path / "run", recipe, resume=True)


def test_four_bits_train_and_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # When it is imported, the library has torch's compiler imported, of which nothing is used here.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install edge-vlm[nf4]")
    run = adapter_run(tmp_path, override(HALF, ["base=nf4", "steps=2", "sample_every=0"]))
    layer = run.model.get_submodule("llm.blocks.1.mlp.up.base")
    packed = layer.get_buffer("packed")
    before = packed.clone()
    assert packed.dtype == torch.uint8
    assert packed.numel() == layer.in_features * layer.out_features // 2  # type: ignore[operator]
    go(run)
    assert torch.equal(before, layer.get_buffer("packed"))
    ends = [line["loss"] for line in reports(tmp_path)]
    exact = go(adapter_run(tmp_path / "half", override(HALF, ["steps=2", "sample_every=0"])))
    assert ends == pytest.approx([line["loss"] for line in exact], rel=0.2)
    assert ends != [line["loss"] for line in exact]
    run.save_whole()
    assert '"frozen_as": "nf4"' in (tmp_path / "checkpoint" / "edge_vlm.json").read_text()


def test_without_the_library_four_bits_are_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "edge_vlm.model.lora.nf4", raising=False)
    recipe = override(molmo2_4b_stts_50_lora(), ["base=nf4", f"init={tmp_path}"])
    with pytest.raises(MissingExtraError, match=r"bitsandbytes.*pip install 'edge-vlm\[nf4\]'"):
        check_lora(recipe, ALONE)


def test_what_adapters_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"names no weights to put them on.*--init"):
        check_lora(molmo2_4b_stts_50_lora(), ALONE)
    with pytest.raises(ConfigError, match="in one process, and there are 2"):
        check_lora(RECIPE, Ranks(0, 2, torch.device("cpu")))
    with pytest.raises(ConfigError, match=r"with lora\.base = nf4 it is bfloat16"):
        override(RECIPE, ["base=nf4"])
    with pytest.raises(ConfigError, match="the vocabulary is the base's"):
        override(RECIPE, ["world_words=true"])
    with pytest.raises(ConfigError, match=r"Invalid enum value 'w'"):
        override(RECIPE, ["targets=q,w"])
    with pytest.raises(ValueError, match="with lora connector cannot be trained"):
        Recipe(name="both", stages=molmo2_4b_stts_50().stages, lora=Lora())


def test_settings_of_adapters_are_settings_of_the_recipe() -> None:
    recipe = override(RECIPE, ["rank=2", "alpha=3.5", "targets=q,v"])
    assert recipe.lora == Lora(rank=2, alpha=3.5, targets=("q", "v"), base="float32")
    cfg = model_config(recipe, tiny_checkpoint() / "tokenizer.json")
    model = build_model(recipe, cfg, tiny_checkpoint() / "tokenizer.json")
    layers = [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]
    assert len(layers) == 2 * (cfg.language.num_layers + cfg.vision.num_layers)
    assert {name.rpartition(".")[2] for name in layers} == {"q", "v"}


def gigabytes(*settings: str) -> dict[str, float]:
    found = estimate(override(molmo2_4b_stts_50_lora(), settings), molmo2_4b(), 1, cuda=True)
    return {name: size / 1e9 for name, size in found.parts.items()} | {"all": found.total / 1e9}


def test_one_card_of_24_gigabytes_holds_it() -> None:
    half, packed = gigabytes(), gigabytes("base=nf4")
    assert half["frozen weights in bfloat16"] == pytest.approx(9.70, abs=0.01)
    assert packed["frozen weights in nf4"] == pytest.approx(3.74, abs=0.01)
    assert half["scorer"] == pytest.approx(0.540, abs=0.001)
    assert half["adapters of llm"] == pytest.approx(0.528, abs=0.001)
    assert half["adapters of vit"] == pytest.approx(0.129, abs=0.001)
    assert packed["all"] + 5 < half["all"] < 24 * 0.93  # a desktop takes its part of a card


def test_what_does_not_fit_is_refused_with_a_remedy_that_fits() -> None:
    recipe = override(molmo2_4b_stts_50_lora(), ["memory_gib=16", "device=cpu"])
    with pytest.raises(RecipeTooLarge, match=r"frozen weights in bfloat16 9\.0") as caught:
        check_fits(recipe, molmo2_4b(), ALONE)
    settings = re.findall(r"--set (\S+)", str(caught.value))
    assert "base=nf4" in settings
    assert check_fits(override(recipe, settings), molmo2_4b(), ALONE).total < 16 * 2**30
    with pytest.raises(RecipeTooLarge, match="lower sequence_length") as caught:
        check_fits(override(recipe, ["memory_gib=4"]), molmo2_4b(), ALONE)
    assert "torchrun" not in str(caught.value)


def test_the_command_trains_on_a_checkpoint_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = ["steps=2", "max_frames=2", "batch=1", "device_batch=1", "sequence_length=240"]
    fast += ["save_every=1", "sample_every=0", "peak_tflops=1", "keep_ratio=0.5"]
    sets = [part for setting in fast for part in ("--set", setting)]
    run = tmp_path / "run"
    words = tmp_path / "words.json"
    cfg = tiny(*build_tokenizer(vocabulary(), words))
    weights = VideoLM(cfg).init_weights(torch.Generator().manual_seed(0)).state_dict()
    save_checkpoint(tmp_path / "base", cfg, weights, words)
    start = ["train", "stts_demo_lora", "-o", str(run)]
    assert main([*start, "--init", str(tmp_path / "base"), *sets]) == 0
    trained = run / "checkpoint"
    before = (trained / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    shutil.copytree(tmp_path / "base", tmp_path / "moved")
    assert main([*start, "--resume", "--init", str(tmp_path / "moved")]) == 0
    assert (trained / "adapter_model.safetensors").read_bytes() == before
    found = open_folder(trained)
    assert found.origin.path == tmp_path / "moved"
    assert found.usage.defaults["keep_ratio"] == 0.5
    assert main(["train", "stts_demo_lora", "-o", str(tmp_path / "none"), *sets]) == 2
    assert "names no weights to put them on" in capsys.readouterr().err
