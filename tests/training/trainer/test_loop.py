"""The loop by steps on batches made by hand: losses, resume, what goes wrong."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from edge_vlm.errors import ConfigError, NonFinite
from edge_vlm_training.data.packing.batch import Batch
from edge_vlm_training.recipes.overrides import override
from edge_vlm_training.trainer import checkpoints
from edge_vlm_training.trainer.distributed import Ranks
from tests.training.trainer.runs import RECIPE, go, make_run, reports

WITH_DROPOUT = override(RECIPE, ["residual_dropout=0.2"])


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in reports(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    go(make_run(folder, WITH_DROPOUT))
    return losses(folder)


def test_a_killed_run_resumes_to_the_same_losses(whole: list[float], tmp_path: Path) -> None:
    assert len(whole) == 4
    assert all(map(math.isfinite, whole))
    assert len(set(whole)) == 4

    killed = make_run(tmp_path / "killed", WITH_DROPOUT)
    save = killed.save

    def die_after_saving() -> Path:
        save()
        raise KeyboardInterrupt

    killed.save = die_after_saving  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        go(killed)
    assert losses(tmp_path / "killed") == whole[:2]
    with open(tmp_path / "killed" / "log.jsonl", "a") as log:
        log.write('{"step": 3, "loss": 9.0}\n{"step": 4, "lo')  # what a kill may leave

    again = make_run(tmp_path / "killed", WITH_DROPOUT)
    again.resume()
    assert again.at.step == 2
    # Moments, data and the random numbers of dropout go on as if nothing had happened.
    go(again)
    assert losses(tmp_path / "killed") == whole


def test_recomputed_activations_change_nothing(whole: list[float], tmp_path: Path) -> None:
    recomputing = override(WITH_DROPOUT, ["activation_checkpointing=true"])
    go(make_run(tmp_path / "again", recomputing))
    assert losses(tmp_path / "again") == pytest.approx(whole, rel=1e-5)


def test_every_part_learns_and_reports_say_so(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    before = {name: tensor.detach().clone() for name, tensor in run.weights().items()}
    last = go(run)[-1]
    moved = {n.partition(".")[0] for n, t in run.weights().items() if not torch.equal(t, before[n])}
    assert moved == {"llm", "vit", "connector", "scorer"}
    assert 0 < last["kept"] < 1
    assert last["tokens_per_s"] > 0
    assert last["mfu"] > 0
    assert last["eta_s"] == 0
    assert last["lr/scorer"] < run.stage.train["scorer"]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_loss_that_is_no_number_stops_and_leaves_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    update = run.update

    def break_weights(batches: list[Batch], factor: float) -> object:
        if run.at.step == 2:
            with torch.no_grad():
                run.model.llm.norm.weight.fill_(math.nan)
        return update(batches, factor)

    monkeypatch.setattr(run, "update", break_weights)
    with pytest.raises(NonFinite, match=r"loss of step 3 is nan .*clip 4"):
        go(run)
    again = make_run(tmp_path)
    again.resume()
    assert again.at.step == 2
    assert all(bool(torch.isfinite(tensor).all()) for tensor in again.weights().values())
    assert checkpoints.latest(tmp_path) == tmp_path / "checkpoints" / "step-00000002"


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    three = Ranks(0, 3, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"no multiple.*--set batch=3"):
        run = make_run(tmp_path)
        type(run)(RECIPE, run.cfg, run.model, lambda *_: run.stream, three, tmp_path, run.prompt)
