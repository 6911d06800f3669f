"""Scripts that time our own work with a picture, and a graph by one library and the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import ROOT
from benchmarks.runtime import cpu_backends, picture_path
from edge_vlm.errors import GpuMissing
from edge_vlm_runtime.engines.cuda import Cuda
from tests.tiny import tiny_bundle


def test_picture_path_states_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("simplejpeg", reason="simplejpeg is not installed")
    monkeypatch.setattr(picture_path, "SIZES", {"small": (48, 64)})
    path = tmp_path / "result.json"
    assert picture_path.main(["--rounds", "2", "--out", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["command"] == "python -m benchmarks.runtime.picture_path --rounds 2"
    assert result["steps"].keys() == {"decode small", "resize small", "raw small"}
    for step in result["steps"].values():
        assert step["ratio"] > 0
        assert len(step["before"]["rounds_s"]) == len(step["after"]["rounds_s"]) == 2


def test_cpu_backends_states_what_it_measured(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")
    path = tmp_path / "result.json"
    argv = [str(tiny_bundle()), "--graphs", "vit_trunk", "llm", "--rounds", "1"]
    assert cpu_backends.main([*argv, "--out", str(path)]) == 0
    graphs = json.loads(path.read_text())["graphs"]
    assert [case["sizes"]["G"] for case in graphs["vit_trunk"]] == [9, 5, 1]
    for cases in graphs.values():
        for case in cases:
            assert case["cases"]["ort"]["cosine"] == 1.0
            assert case["cases"]["openvino f32"]["cosine"] > 0.9999
            assert case["cases"]["openvino bf16"]["cosine"] > 0.99


def test_a_borrowed_gpu_that_does_not_answer_is_said(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "device.sh"
    env = {**os.environ, "PYTHON": sys.executable}
    try:
        Cuda()
    except GpuMissing:
        ended = subprocess.run(
            [script, tmp_path / "out"], env=env, capture_output=True, text=True, timeout=120
        )
    else:
        pytest.skip("there is a GPU here")
    assert ended.returncode == GpuMissing.exit_code
    assert "no NVIDIA driver" in ended.stderr
    assert "device.sh: no GPU answers, nothing is measured" in ended.stderr
