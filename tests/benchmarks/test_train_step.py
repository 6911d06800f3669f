"""The training-step benchmark at tiny size: what it states follows from what it measured."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch

from benchmarks.training import train_step


def test_train_step_states_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    argv = ["--size", "tiny", "--frames", "4", "--clips", "2", "--rounds", "2", "--warmups", "0"]
    argv += ["--removed", "0.5"]
    threads = torch.get_num_threads()
    try:
        assert train_step.main([*argv, "--out", str(path)]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(path.read_text())
    assert result["command"] == " ".join(["python -m benchmarks.training.train_step", *argv])
    assert result["clock"] == "processor"
    assert result["threads"] == 1
    assert {"device", "threads", "torch", "precision", "edge_vlm"} <= result.keys()
    base, case = result["cases"]["unpruned"], result["cases"]["kept 0.5"]
    assert (base["cells_kept"], case["cells_kept"]) == (1.0, 0.5)
    times = zip(base["rounds_s"], case["rounds_s"], strict=True)
    measured = statistics.median(a / b for a, b in times)
    assert case["speed_up"] == pytest.approx(measured, rel=0.05, abs=2e-3)
    assert case["bound"] > 1
    assert base["peak_gib"] > 0
    assert case["peak_gib"] > 0
    memory = case["peak_gib"] / base["peak_gib"]
    assert case["share_of_unpruned_memory"] == pytest.approx(memory, abs=0.02)
    assert "kept 0.5" in capsys.readouterr().out


def test_unpruned_is_the_model_without_a_scorer() -> None:
    cfg = train_step.config_of("scaled")
    assert cfg.scorer is not None
    assert cfg.vision.num_cells == 81
    assert cfg.vision.num_patches == 729
    assert torch.tensor(cfg.vision.feature_layers).tolist() == [24, 18]
