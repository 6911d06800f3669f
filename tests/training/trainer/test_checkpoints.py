"""Damaged and foreign checkpoints: a clear error, and the last good one intact."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save

from edge_vlm.errors import CheckpointError, ConfigError, WeightFilesError, WeightNamesError
from edge_vlm.errors.export import NoSpaceLeft
from edge_vlm.model.checkpoint import load_checkpoint
from edge_vlm_training.recipes.overrides import override
from edge_vlm_training.trainer import checkpoints, integrity
from edge_vlm_training.trainer.checkpoints import Progress
from edge_vlm_training.trainer.distributed import Ranks
from tests.training.trainer.runs import RECIPE, go, make_run, older

NAME = "exp_avg/scorer.fc1.weight"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_run(folder).save()
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "run"))


def test_what_is_saved_is_what_comes_back(folder: Path) -> None:
    run, again = make_run(folder), make_run(folder)
    with torch.no_grad():
        for tensor in again.weights().values():
            tensor.add_(1.0)
    again.resume()
    for name, tensor in run.weights().items():
        assert torch.equal(tensor, again.weights()[name]), name
    assert not list((folder / "checkpoints").glob("*.partial"))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the library, when it is called as here
def test_missing_misshapen_and_unknown_entries_are_named(folder: Path) -> None:
    path = checkpoints.latest(folder)
    assert path is not None
    run = make_run(folder)
    tensors = {f"weight/{name}": t.detach() for name, t in run.weights().items()}
    tensors |= run.updater.moments(0)
    del tensors[NAME]
    tensors["weight/scorer.fc3.bias"] = torch.zeros(7)
    tensors["weight/gone"] = torch.zeros(1)
    older(path)  # it would be refused as changed
    save(tensors, checkpoint_id=path, no_dist=True)
    with pytest.raises(WeightNamesError, match=f"lacks {NAME}.*unknown weight/gone") as caught:
        make_run(folder).resume()
    assert caught.value.missing == (NAME,)
    assert caught.value.unknown == ("weight/gone",)
    assert caught.value.misshaped == ("weight/scorer.fc3.bias: (7,) instead of (1,)",)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "run.json", "process-00000.json"])
@pytest.mark.parametrize("damage", ["gone", "cut off"])
def test_a_damaged_file_is_a_clear_error(folder: Path, file: str, damage: str) -> None:
    path = checkpoints.latest(folder)
    assert path is not None
    if damage == "gone":
        (path / file).unlink()
    else:
        (path / file).write_bytes((path / file).read_bytes()[:5])
    with pytest.raises(CheckpointError, match="step-00000000"):
        make_run(folder).resume()


def test_an_index_that_would_run_something_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(WeightFilesError, match="names the global"):
        checkpoints._stored(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in (folder / "checkpoints").rglob("*") if p.is_file()}
    run = make_run(folder)
    run.at = Progress(step=5)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_sharded", full)
    with pytest.raises(NoSpaceLeft, match=r"step-00000005.*one before is intact"):
        run.save()
    latest = checkpoints.latest(folder)
    assert latest is not None
    assert latest.name == "step-00000000"
    assert before == {p.name: p.read_bytes() for p in latest.iterdir()}
    monkeypatch.undo()
    assert run.save().name == "step-00000005"  # what was left over is no obstacle


def test_what_one_process_cannot_write_ends_the_saving_of_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is left waiting: each hears of it before any goes on."""
    heard: list[object] = []

    class Pair(Ranks):
        def gather(self, value: Any) -> list[Any]:
            heard.append(value)
            return [value, NoSpaceLeft("of the other") if len(heard) == 2 else None]

    run = make_run(folder)
    run.at = Progress(step=5)
    run.ranks = Pair(0, 1, torch.device("cpu"))
    with pytest.raises(NoSpaceLeft, match="of the other"):
        run.save()
    assert heard == [None, None]
    heard.clear()

    def broken(*args: Any) -> str:
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr(checkpoints, "process_text", broken)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        run.save()
    assert "process 0 of the training failed: RuntimeError" in str(heard[1])
    assert newest(folder).name == "step-00000000"


def test_only_the_newest_checkpoints_stay(folder: Path) -> None:
    run = make_run(folder)
    for step in (10, 20, 30):
        run.at = Progress(step=step)
        run.save()
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["step-00000020", "step-00000030"]
    assert RECIPE.keep_last == 2


def test_the_whole_checkpoint_is_replaced_as_a_whole(folder: Path) -> None:
    run = make_run(folder)
    for shift in (0.0, 1.0):
        with torch.no_grad():
            run.model.llm.norm.weight.add_(shift)
        path = run.save_whole()
        found = load_checkpoint(path)
        torch.testing.assert_close(found.llm.norm.weight, run.model.llm.norm.weight)
    assert json.loads((path / "config.json").read_text())["scorer"]
    assert not list(folder.glob("checkpoint.*"))


def test_the_whole_checkpoint_may_be_the_mean_of_the_latest(folder: Path) -> None:
    run = make_run(folder, override(RECIPE, ["keep_last=3", "average_last=2"]))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    begin = run.model.llm.norm.weight.detach().clone()
    found = load_checkpoint(run.save_whole())  # nothing to average yet
    torch.testing.assert_close(found.llm.norm.weight, begin)
    for step, shift in ((10, 5.0), (20, 1.0), (30, 2.0)):
        run.at = Progress(step=step)
        with torch.no_grad():
            run.model.llm.norm.weight.copy_(begin + shift)
        run.save()
    found = load_checkpoint(run.save_whole())
    torch.testing.assert_close(found.llm.norm.weight, begin + 1.5)
    torch.testing.assert_close(found.vit.patch_embed.weight, run.model.vit.patch_embed.weight)
    with pytest.raises(ConfigError, match="more than keep_last = 2"):
        override(RECIPE, ["average_last=3"])


def test_a_mean_is_of_one_stage_and_of_what_can_be_read(folder: Path) -> None:
    run = make_run(folder, override(RECIPE, ["keep_last=3", "average_last=3"]))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    begin = run.model.llm.norm.weight.detach().clone()
    for at, shift in ((Progress(10, stage=0), 9.0), (Progress(20, stage=1), 1.0)):
        run.at = at
        with torch.no_grad():
            run.model.llm.norm.weight.copy_(begin + shift)
        run.save()
    found = load_checkpoint(run.save_whole())
    torch.testing.assert_close(found.llm.norm.weight, begin + 1)
    for part in (folder / "checkpoints" / "step-00000020").glob("*.distcp"):
        part.write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read"):
        run.save_whole()


def test_what_is_not_in_the_mean_may_be_broken(folder: Path) -> None:
    run = make_run(folder, override(RECIPE, ["keep_last=3"]))
    for step in (10, 20):
        run.at = Progress(step)
        run.save()
    (folder / "checkpoints" / "step-00000000" / "run.json").write_text("")
    assert checkpoints.mean_weights(folder, 2)
    told = r"cannot be read.*step-00000000/run\.json.*remove step-00000000: newer ones are in"
    with pytest.raises(CheckpointError, match=told):
        checkpoints.mean_weights(folder, 3)


def test_the_mean_that_is_saved_along_a_training_has_the_newest_weights_in_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["steps=2", "save_every=0", "sample_every=0", "whole_every=1", "average_last=2"]
    run = make_run(folder, override(RECIPE, options))
    shutil.rmtree(folder / "checkpoints")
    learned, saved = [], []
    save_whole = run.save_whole

    def recorded() -> Path:
        path = save_whole()
        learned.append(run.model.llm.embed.weight.detach().clone())
        saved.append(load_checkpoint(path).llm.embed.weight.detach())
        return path

    monkeypatch.setattr(run, "save_whole", recorded)
    go(run)
    assert not torch.allclose(learned[0], learned[1])
    torch.testing.assert_close(saved[0], learned[0])
    torch.testing.assert_close(saved[1], (learned[0] + learned[1]) / 2)


def readers(folder: Path) -> list[Callable[[], object]]:
    return [
        make_run(folder).resume,
        lambda: checkpoints.mean_weights(folder, 1),
        lambda: checkpoints.stored_weights(folder, ""),
    ]


def newest(folder: Path) -> Path:
    path = checkpoints.latest(folder)
    assert path is not None
    return path


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "run.json", "process-00000.json"])
def test_a_changed_bit_is_refused(folder: Path, name: str) -> None:
    path = newest(folder)
    file = path / name
    whole = file.read_bytes()
    at = {  # a number of the run, a random one, a name of the index, a weight
        "run.json": whole.find(b'"stage_s": 0.0') + len('"stage_s": '),
        "process-00000.json": whole.find(b'"cpu": "') + 40,
        ".metadata": whole.find(b"TensorStorageMetadata"),
    }.get(name, len(whole) // 2)
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    for read in readers(folder):
        with pytest.raises(
            CheckpointError, match=r"not the bytes that were saved.*start a new run"
        ) as e:
            read()
        assert e.value.where == str(file)


def test_a_checkpoint_without_checksums_is_read_as_it_is(folder: Path) -> None:
    path = newest(folder)
    (path / "process-00000.copy.json").write_text("no file of a checkpoint's")
    for read in readers(folder):
        read()
    (path / "process-00000.copy.json").unlink()
    older(path)
    assert not [file for file in path.glob("*.json") if "crc32" in file.read_text()]
    for read in readers(folder):
        read()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "run.json", "process-00000.json"])
def test_a_file_that_the_disk_does_not_give_is_a_clear_error(folder: Path, name: str) -> None:
    file = newest(folder) / name
    file.unlink()
    file.symlink_to("/proc/self/mem")  # a regular file of which no byte can be read
    for read in readers(folder):
        with pytest.raises(
            CheckpointError, match=r"cannot be read: .*Errno.*start a new run"
        ) as caught:
            read()
        assert caught.value.where == str(file)


def test_each_process_s_file_has_to_be_there(folder: Path) -> None:
    path = newest(folder)
    (path / "process-00000.json").unlink()
    for read in readers(folder):
        with pytest.raises(CheckpointError, match=r"cannot be read.*process-00000"):
            read()


def test_a_checkpoint_is_of_the_step_in_its_name(folder: Path) -> None:
    path = newest(folder)
    path.rename(path.with_name("step-00000007"))
    with pytest.raises(CheckpointError, match=r"of step 0 .*step-00000007"):
        make_run(folder).resume()


def test_moments_and_random_numbers_are_stored(folder: Path) -> None:
    path = checkpoints.latest(folder)
    assert path is not None
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    count = len(make_run(folder).weights())
    assert len(stored) == 3 * count
    assert all(isinstance(item, TensorStorageMetadata) for item in stored.values())
    own = json.loads((path / "process-00000.json").read_text())
    assert own["stream"] == {"batches": 0, "lanes": {}}
    assert len(own["random"]["cpu"]) > 1000


def test_the_remedy_depends_on_what_else_there_is(tmp_path: Path) -> None:
    for name in ("step-00000002.partial", "step-00000005"):
        (tmp_path / name).mkdir()
    assert integrity.before(tmp_path / "step-00000005").endswith("start a new run")
    (tmp_path / "step-00000010").mkdir()
    assert integrity.before(tmp_path / "step-00000010").startswith("remove step-00000010 to resume")
    assert integrity.before(tmp_path / "step-00000005").endswith(f"newer ones are in {tmp_path}")
