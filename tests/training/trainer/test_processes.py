"""Two processes that share the weights against one that has them all."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edge_vlm.model.checkpoint import load_checkpoint
from edge_vlm_training.trainer import checkpoints
from tests.training.trainer.runs import FIRST, go, make_run, reports

ROOT = Path(__file__).parents[3]
SAME = ("loss", "answer_loss", "z_loss", "aux_loss", "kept", "norm/llm", "norm/vit", "norm/scorer")


def in_two_processes(folder: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.training.trainer.runs", str(folder)]
    run = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert run.returncode == 0, run.stderr[-4000:]


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one")
    alone = go(one)
    two = tmp_path / "two"
    in_two_processes(two)
    shared = reports(two, FIRST)
    assert [line["step"] for line in shared] == [1, 2, 3, 4]
    for mine, theirs in zip(alone, shared, strict=True):
        for name in SAME:
            assert theirs[name] == pytest.approx(mine[name], rel=2e-4), (mine["step"], name)

    # The whole checkpoint that they gathered holds what one process learned.
    gathered = load_checkpoint(two / checkpoints.WHOLE).state_dict()
    for name, tensor in one.weights().items():
        torch.testing.assert_close(gathered[name], tensor.detach(), rtol=1e-3, atol=1e-5)

    # What the second of them finds wrong with the newest checkpoint, both refuse alike. Without it,
    # from step 2 on, they come to the same losses again.
    damaged = two / checkpoints.CHECKPOINTS / "step-00000004" / "__1_0.distcp"
    refused = [(two / f"refused-{rank}").read_text() for rank in (0, 1)]
    assert f"not the bytes that were saved ({damaged}): remove step-00000004" in refused[0]
    assert refused[0] == refused[1]
    assert [line["loss"] for line in reports(two)] == [line["loss"] for line in shared]

    # So does a single process that goes on from what the two had saved.
    shutil.rmtree(checkpoints.latest(two) or two)
    again = make_run(two)
    again.resume()
    assert again.at.step == 2
    for mine, theirs in zip(go(again), shared, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-4)


def test_a_launcher_can_start_the_command_as_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`torchrun -m edge_vlm train ...`"""
    monkeypatch.setattr(sys, "argv", ["", "train", "no_such_recipe", "-o", "unused"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("edge_vlm", run_name="__main__", alter_sys=True)
    assert stopped.value.code == 2
    assert "E-CONFIG: unknown recipe" in capsys.readouterr().err
