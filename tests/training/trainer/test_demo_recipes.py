"""The demo's stages in the one loop: as they were before it, resumed to the bit, part by part."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edge_vlm.config import VisionAttention
from edge_vlm.errors import CheckpointError, ConfigError
from edge_vlm.model.checkpoint import load_checkpoint, save_checkpoint
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import tiny
from edge_vlm.pruning.policies import Cells, StreamBudget
from edge_vlm.world.questions import vocabulary
from edge_vlm_training.config import msgspec
from edge_vlm_training.objective.vision import choose_cells
from edge_vlm_training.recipes.base import Clips, Minutes, Recipe, Stage, Steps
from edge_vlm_training.recipes.demo import demo_recipe, pictures, questions
from edge_vlm_training.recipes.overrides import override
from edge_vlm_training.trainer import checkpoints, model_factory
from edge_vlm_training.trainer import loop as loop_module
from edge_vlm_training.trainer.checkpoints import stored_weights
from edge_vlm_training.trainer.distributed import Ranks
from edge_vlm_training.trainer.loop import Run
from edge_vlm_training.trainer.train import train
from edge_vlm_training.world.vocabulary import build_tokenizer

ALONE = Ranks(0, 1, torch.device("cpu"))
FROZEN = Path(__file__).parents[2] / "data" / "demo_steps.json"
replace = msgspec.structs.replace

TWO = Steps(2)
CLIPS = Clips(
    batch=2,
    num_frames=3,
    branches=2,
    keep_ratio=(1.0, 0.5),
    forgetful_share=0.5,
    history_share=0.3,
)
RECIPE = override(
    demo_recipe(
        "test",
        pictures("dense", TWO, 2),
        questions("clips", TWO, CLIPS),
        questions("frozen", TWO, CLIPS, vision=None),
    ),
    # Nothing of the loop depends on the size of the model.
    ["model=tiny", "log_every=1", "keep_last=9", "peak_tflops=1"],
)


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def learned(folder: Path) -> dict[str, torch.Tensor]:
    """Masters, probes among them, as they were last saved."""
    return stored_weights(folder, "")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    train(override(RECIPE, ["save_every=1"]), folder, ALONE)
    return folder


def test_every_step_is_that_of_the_demo_s_former_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same seeds, data and weights: losses and read-outs, six steps deep in every stage."""
    frozen = json.loads(FROZEN.read_text())
    words = [text for text in vocabulary() if not text.startswith(("by ", "not "))]  # later ones
    monkeypatch.setattr(model_factory, "vocabulary", lambda: words)
    choose = StreamBudget._choose

    def owing_nothing(policy: StreamBudget, *arguments: Any) -> Cells:
        policy._owed = None  # a later rule
        return choose(policy, *arguments)

    monkeypatch.setattr(StreamBudget, "_choose", owing_nothing)
    shares: dict[str, Any] = {"history_share": 0.3, "forgetful_share": 0.5}
    data = Clips(
        batch=2, num_frames=5, branches=4, keep_ratio=(1.0, 0.5, 0.25), other_lengths=(2,), **shares
    )
    half = {"timeline": 0.1 * 0.4, "presence": 0.1 * 0.4}
    recipe = demo_recipe(
        "reference",
        replace(pictures("dense", Steps(4), 3), decay_from=0.5),
        questions("one", Steps(4), Clips(batch=3, branches=4, **shares), vision=2e-4),
        questions("clips", Steps(6), data, connector=3e-5, rate=(0.9, 0.9)),
        questions("frozen", Steps(6), data, vision=None, rate=(0.8, 0.01), decay_from=0.2, **half),
        seed=3,
    )
    settings = ["warmup_steps=2", "precision=float32", "log_every=1", "save_every=0"]
    train(override(recipe, [*settings, "peak_tflops=1"]), tmp_path, ALONE)
    found = log(tmp_path)
    assert len(found) == len(frozen["steps"]) == 20
    assert {step["kept"] for step in frozen["steps"] if "kept" in step} > {1.0, 0.5, 0.25}
    for old, new in zip(frozen["steps"], found, strict=True):
        name = "loss" if old["stage"] == "dense" else "answer_loss"
        assert new["stage"] == old["stage"]
        assert new[name] == pytest.approx(old.pop("loss"), rel=1e-4), new["step"]
        del old["stage"]
        assert {key: new[key] for key in old} == pytest.approx(old, rel=1e-3, abs=1e-5)
    sums: dict[str, float] = {}
    for name, tensor in learned(tmp_path).items():
        part = name.partition(".")[0].replace("probes", "heads")
        sums[part] = sums.get(part, 0.0) + float(tensor.double().abs().sum())
    assert sums == pytest.approx(frozen["weights"], rel=1e-4)


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_run_resumes_to_the_bit_from_any_step(finished: Path, tmp_path: Path, step: int) -> None:
    """Moments, random numbers, clips and what the questions' mix has seen, in and between stages:
    the same losses and the same weights."""
    folder = tmp_path / "killed"
    kept = finished / "checkpoints" / f"step-{step:08}"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / kept.name).symlink_to(kept)
    for name in ("recipe.json", "log.jsonl"):
        (folder / name).write_text((finished / name).read_text())
    train(RECIPE, folder, ALONE, resume=True)
    timed = ("minutes", "step_s", "eta_s", "tokens_per_s", "mfu")
    for mine, theirs in zip(log(folder), log(finished), strict=True):
        assert {k: v for k, v in mine.items() if k not in timed} == {
            k: v for k, v in theirs.items() if k not in timed
        }
    again, whole = learned(folder), learned(finished)
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_an_interrupt_is_saved_and_resumed_to_the_bit(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGINT in the midst of a step: the step is finished, saved, and nothing is lost."""
    import signal

    update = Run.update

    def interrupted(run: Run, *arguments: Any) -> Any:
        if run.at.step == 3:
            # As Python does for a real one, which kills this process where another test has had
            # TensorRT and OpenVINO in it: the stack for signals that they leave behind is unmapped.
            handler = signal.getsignal(signal.SIGINT)
            assert callable(handler)
            handler(signal.SIGINT, None)
        return update(run, *arguments)

    monkeypatch.setattr(Run, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, tmp_path, ALONE)
    monkeypatch.undo()
    path = checkpoints.latest(tmp_path)
    assert path is not None
    assert path.name == "step-00000004"
    train(RECIPE, tmp_path, ALONE, resume=True)
    again, whole = learned(tmp_path), learned(finished)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    assert [x["loss"] for x in log(tmp_path)] == [x["loss"] for x in log(finished)]


class Clock:
    """A `time.monotonic` that a test sets going: so much for each look at it."""

    def __init__(self) -> None:
        self.now, self.tick = 100.0, 1.0

    def monotonic(self) -> float:
        self.now += self.tick
        return self.now


def test_minutes_are_those_of_all_starts_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(loop_module, "time", clock)
    stage = replace(RECIPE.stages[0], length=Minutes(0.2))
    recipe = replace(RECIPE, stages=(stage,))
    train(recipe, tmp_path / "whole", ALONE)
    whole = log(tmp_path / "whole")
    assert len(whole) > 3
    assert whole[-1]["minutes"] >= 0.2 > whole[-2]["minutes"]

    save = Run.save
    stopped: list[Any] = []

    def stop(run: Run) -> Path:
        path = save(run)
        if run.at.step == 2 and not stopped:
            stopped.append(run.at.stage_s)
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(Run, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        train(override(recipe, ["save_every=2"]), tmp_path / "killed", ALONE)
    clock.now += 1e6  # the night in between does not count
    train(recipe, tmp_path / "killed", ALONE, resume=True)
    again = log(tmp_path / "killed")
    assert [line["minutes"] for line in again] == pytest.approx([line["minutes"] for line in whole])
    assert [line["loss"] for line in again] == [line["loss"] for line in whole]
    assert stopped[0] > 0


def test_a_stage_of_minutes_makes_one_step_at_least(tmp_path: Path) -> None:
    recipe = override(RECIPE, ["minutes=1e-9"])
    train(recipe, tmp_path, ALONE)
    assert [line["stage"] for line in log(tmp_path)] == ["dense", "clips", "frozen"]


def test_each_stage_learns_what_it_trains_and_nothing_else(finished: Path) -> None:
    reader = [f"step-{step:08}" for step in (2, 4, 6)]
    states = []
    for name in reader:
        copy = finished.parent / name
        (copy / "checkpoints").mkdir(parents=True)
        (copy / "checkpoints" / name).symlink_to(finished / "checkpoints" / name)
        states.append(learned(copy))

    def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
        changed = {n for n in after if not torch.equal(before[n], after[n])}
        return {".".join(n.split(".")[: 2 if n.startswith("probes") else 1]) for n in changed}

    probes = {"probes.features", "probes.timeline", "probes.presence"}
    dense, clips, frozen = states
    assert moved(dense, clips) == {"llm", "vit", "connector", "scorer", *probes}
    assert moved(clips, frozen) == {"llm", *probes}
    fresh = finished.parent / "fresh"
    train(override(RECIPE, ["steps=1", "lr_vit=0", "lr=0", "lr_connector=0"]), fresh, ALONE)
    assert moved(learned(fresh), dense) == {"vit", "probes.patches"}
    model = load_checkpoint(finished / "checkpoint")
    torch.testing.assert_close(model.llm.head.weight.data, frozen["llm.head.weight"])


def test_reports_have_one_set_of_columns(finished: Path) -> None:
    dense, _, clips, *_ = log(finished)
    always = {"step", "stage", "minutes", "loss", "step_s", "eta_s"}
    assert always | {"kind", "colour", "centre_rms", "norm/vit", "lr/vit"} <= dense.keys()
    assert "accuracy" not in dense
    assert "kept" not in dense
    told = {"answer_loss", "aux_loss", "kept", "tokens_right", "tokens_per_s", "mfu", "accuracy"}
    assert always | told | {"heading", "counted", "scale", "lr/llm+scorer"} <= clips.keys()
    assert clips["lr/llm+scorer"] < 1e-3
    assert set(clips["accuracy"]) > {"when", "count"}


def test_a_run_starts_from_a_checkpoint_and_the_probes_of_a_run_go_on(
    finished: Path, tmp_path: Path
) -> None:
    first = replace(RECIPE, stages=RECIPE.stages[:1])
    still = ["steps=1", "lr=0", "lr_vision=0", "seed=5"]
    name = "probes.features.rest.weight"
    for init, same in ((finished, True), (finished / "checkpoint", False)):
        folder = tmp_path / str(same)
        train(override(first, [*still, f"init={init}"]), folder, ALONE)
        found, before = learned(folder), learned(finished)
        assert torch.equal(found["llm.head.weight"], before["llm.head.weight"])
        assert torch.equal(found[name], before[name]) is same
    other = tmp_path / "other"
    words = finished / "tokenizer.json"
    cfg = tiny(*build_tokenizer(vocabulary(), tmp_path / "words.json"))
    cfg = dataclasses.replace(cfg, language=dataclasses.replace(cfg.language, mlp_width=32))
    save_checkpoint(other, cfg, VideoLM(cfg).init_weights().state_dict(), words)
    with pytest.raises(CheckpointError, match="not one of this recipe's"):
        train(override(first, [f"init={other}"]), tmp_path / "third", ALONE)


def test_a_scorer_can_be_learned_anew(finished: Path, tmp_path: Path) -> None:
    first = replace(RECIPE, stages=RECIPE.stages[:1])
    still = ["steps=1", "lr=0", "lr_vision=0", "seed=5", "new_scorer=true"]
    train(override(first, [*still, f"init={finished}"]), tmp_path, ALONE)
    found, before = learned(tmp_path), learned(finished)
    assert not torch.equal(found["scorer.fc1.weight"], before["scorer.fc1.weight"])
    assert torch.equal(found["vit.patch_embed.weight"], before["vit.patch_embed.weight"])


@pytest.mark.parametrize(
    "change", ["selection=random", "selection=stream", "rescale=row", "attention=all"]
)
def test_variants_of_a_recipe_train_their_model(tmp_path: Path, change: str) -> None:
    recipe = override(replace(RECIPE, stages=RECIPE.stages[1:2]), [change, "keep_ratio=0.5"])
    model = load_checkpoint(train(recipe, tmp_path, ALONE))
    assert model.cfg.attention is recipe.attention
    assert model.cfg.scorer is not None
    assert model.cfg.scorer.rescale is recipe.rescale
    assert (recipe.attention is VisionAttention.ALL) == (change == "attention=all")
    assert [line["step"] for line in log(tmp_path)] == [1, 2]


@pytest.mark.parametrize("selection", ["clip", "stream", "random"])
def test_cells_are_kept_within_the_budget(selection: Any) -> None:
    scores = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))
    choose: Callable[..., torch.Tensor] = choose_cells
    mask = choose(scores.flatten(0, 1), (16, 16, 16), 0.5, 1, selection, 7).view_as(scores)
    assert mask[:, 0].all()
    assert (mask.sum(-1) >= 1).all()
    assert (mask.sum((1, 2)) <= 128).all()
    assert (mask.sum((1, 2)) > 100).all()
    top = (scores[:, 1:] * mask[:, 1:]).sum() / mask[:, 1:].sum()
    assert (top > 0.6) == (selection != "random")
    assert choose(scores.flatten(0, 1), (16, 16, 16), 1.0, 0, selection, 7).all()


def test_truth_is_for_one_process_on_the_cpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="for one process, and there are 2"):
        _run(RECIPE, tmp_path, Ranks(0, 2, torch.device("cpu")))
    with pytest.raises(ConfigError, match=r"trained on the CPU.*device=cpu"):
        _run(RECIPE, tmp_path, Ranks(0, 1, torch.device("cuda")))


def _run(recipe: Recipe, folder: Path, ranks: Ranks) -> Run:
    cfg = tiny()
    nothing: Any = None
    return Run(recipe, cfg, VideoLM(cfg), nothing, ranks, folder, nothing)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"llm": 1e-3, "legs": 1.0}}, "Stage.train = .*names parts of llm"),
        ({"train": {"llm": 1e-3, "llm+vit": 1.0}}, "each once"),
        ({"train": {"llm": -1.0}}, r"Stage.train = .*>= 0"),
        ({"terms": ()}, "needs one term"),
        ({"rate": (1.0, -0.1)}, r"Stage.rate = .*>= 0"),
        ({"decay_from": 2.0}, "Stage.decay_from = 2.0"),
        ({"data": Clips(batch=1, branches=0)}, "Answers needs data with questions"),
    ],
)
def test_a_bad_stage_names_its_field(changes: dict[str, Any], message: str) -> None:
    fields = {f: getattr(RECIPE.stages[1], f) for f in Stage.__struct_fields__}
    with pytest.raises(ValueError, match=message):
        Stage(**(fields | changes))


def test_a_bad_number_names_its_field() -> None:
    for make, message in (
        (lambda: Clips(batch=0), "Clips.batch = 0"),
        (lambda: Clips(batch=1, keep_ratio=(0.0,)), "Clips.keep_ratio"),
        (lambda: Clips(batch=1, selection=("guess",)), "Clips.selection.*guess"),  # type: ignore
        (lambda: Minutes(0.0), "Minutes.minutes = 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
