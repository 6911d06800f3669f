"""`edge-vlm train RECIPE` by steps, from the command line, on the rendered world."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from edge_vlm.cli import main
from edge_vlm.model.checkpoint import load_checkpoint

SETTINGS = ("model=tiny", "steps=2", "whole_every=1", "save_every=1", "sample_tokens=2")
FAST = [part for setting in SETTINGS for part in ("--set", setting)]
AGAIN = [*FAST, "--set", "peak_tflops=1"]
"""Without measuring once more what the machine can do."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command") / "run"
    assert main(["train", "stts_smoke", "-o", str(folder), *FAST]) == 0
    return folder


def test_a_run_leaves_a_checkpoint_a_log_and_its_recipe(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    for name in ("loss", "tokens_per_s", "mfu", "kept", "eta_s", "lr/scorer"):
        assert all(math.isfinite(line[name]) for line in lines), name
    assert json.loads((finished / "recipe.json").read_text())["stages"][0]["length"]["steps"] == 2
    assert list((finished / "tensorboard").glob("events*"))
    model = load_checkpoint(finished / "checkpoint")
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_data_made_ahead_and_a_lost_step_change_no_loss(finished: Path, tmp_path: Path) -> None:
    """Decoding in threads, then going on from the first step as if killed behind it."""

    def losses(folder: Path) -> list[float]:
        lines = (folder / "log.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    out = tmp_path / "ahead"
    threads = ["--set", "decode_threads=2"]
    assert main(["train", "stts_smoke", "-o", str(out), *AGAIN, *threads]) == 0
    assert losses(out) == losses(finished)
    for resumed_with in ([], ["--set", "decode_threads=0"]):
        shutil.rmtree(out / "checkpoints" / "step-00000002")
        assert main(["train", "stts_smoke", "-o", str(out), "--resume", *resumed_with]) == 0
        assert losses(out) == losses(finished)


def test_resume_goes_on_with_the_folder_s_recipe(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ["train", "stts_smoke", "-o", str(finished), "--resume"]
    assert main(again) == 0  # nothing is left to do
    assert main([*again, "--set", "lr_llm=1"]) == 2
    assert "another recipe: stages.0.train.llm (0.0006 before, now 1.0)" in capsys.readouterr().err
    assert main(["train", "stts_demo_cpu", "-o", str(finished), "--resume"]) == 2
    assert "started with the recipe stts_smoke" in capsys.readouterr().err
    assert main(["train", "stts_smoke", "-o", str(finished)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert load_checkpoint(finished / "checkpoint") is not None


def test_a_run_starts_from_the_checkpoint_of_another(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "next"
    still = [*AGAIN, "--set", "steps=1", "--set", "sample_every=0"]
    for part in ("llm", "vit", "connector", "scorer"):
        still += ["--set", f"lr_{part}=0"]
    init = ["--init", str(finished / "checkpoint")]
    assert main(["train", "stts_smoke", "-o", str(out), *init, *still]) == 0
    before = load_checkpoint(finished / "checkpoint").state_dict()
    after = load_checkpoint(out / "checkpoint").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no_such"], 2, "choose one of demo_cpu, .*molmo2_4b_stts_50"),
        (["stts_smoke", "--set", "zebra=1"], 2, "E-CONFIG.*unknown key.*valid keys: "),
        (["stts_smoke", "--set", "memory_gib=0.01"], 2, "E-RECIPE-MEMORY.*needs about"),
        (["stts_smoke", "--resume"], 3, "nothing to resume"),
        (["stts_smoke", "--set", "data=no/such.jsonl"], None, r"no/such\.jsonl"),
        (["stts_smoke", "--set", "data=world@heavy"], 2, "SOURCE or SOURCE@WEIGHT"),
        (["stts_smoke", "--init", "no/such/folder"], None, "no/such/folder"),
        (["molmo2_4b_stts_50", "--set", "device=cpu"], 2, "no vocabulary of its own.*--init"),
        (["stts_smoke", "--set", "frame_markers=true"], 2, "no token '<frame_start>'"),
        (["smoke", "--set", "stages.0.batch=0"], 2, r"`int` >= 1 - at `\$\.stages"),
    ],
)
def test_what_is_wrong_is_one_clear_line(
    arguments: list[str],
    code: int | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = main(["train", *arguments, "-o", str(tmp_path / "run")])
    error = capsys.readouterr().err.strip()
    assert found == code or (code is None and found not in (0, 1))
    assert re.search(message, error), error
    assert not (tmp_path / "run" / "checkpoints").exists()
