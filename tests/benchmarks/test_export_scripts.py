"""The scripts that measure exports, on the test model: what they write is what happened."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.export import full_size_export, precisions, wide_engines
from edge_vlm.errors.export import ParityError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.precision import FP32
from edge_vlm_export.to_onnx import ExportOptions
from edge_vlm_export.verify.compare import Comparison
from edge_vlm_export.verify.compare_pipelines import PipelineComparison
from edge_vlm_export.verify.verify import Report
from tests.tiny import tiny_bundle, tiny_checkpoint, tiny_footage, tiny_variant


def test_precisions_are_set_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exported(checkpoint: Path, out: Path, options: ExportOptions) -> EngineBundle:
        """Those of other tests: an export takes its time."""
        plain = options.precision == FP32
        return EngineBundle.open(tiny_bundle() if plain else tiny_variant("ort-int4"))

    monkeypatch.setattr(precisions, "export_bundle", exported)
    monkeypatch.setattr(precisions, "DEMO_CLIP", tiny_footage())
    path = tmp_path / "result.json"
    argv = ["--checkpoint", str(tiny_checkpoint()), "--cases", "portable fp32", "ort int4"]
    argv += ["--frames", "4", "--measured", "4", "--threads", "1", "--out", str(path)]
    assert precisions.main(argv) == 0
    cases = json.loads(path.read_text())["cases"]
    exact, small = cases["portable fp32"], cases["ort int4"]
    assert exact["footage"]["footage.mp4"]["same_tokens"] == "16 of 16"
    assert exact["graphs"]["llm"]["max_difference"] < small["graphs"]["llm"]["max_difference"]
    assert small["llm_mb"] < exact["llm_mb"]
    assert capsys.readouterr().out.count("\n") == 2
    assert list(tmp_path.iterdir()) == [path]  # the bundles are gone


def test_a_precision_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(checkpoint: Path, out: Path, options: ExportOptions) -> EngineBundle:
        raise ParityError("logits differ")

    monkeypatch.setattr(precisions, "export_bundle", differs)
    path = tmp_path / "result.json"
    argv = ["--checkpoint", str(tiny_checkpoint()), "--cases", "portable fp16"]
    assert precisions.main([*argv, "--out", str(path)]) == 0
    found = json.loads(path.read_text())["cases"]["portable fp16"]
    assert found == {"failed": "E-PARITY: logits differ"}


def test_the_worst_size_of_a_graph_is_stated() -> None:
    graphs = [
        Comparison(
            graph="llm",
            sizes={"s": size},
            tensor="logits",
            difference=difference,
            allowed=None,
            cosine=cosine,
            least_cosine=0.9,
        )
        for size, difference, cosine in ((1, 0.25, 0.99), (2, 0.5, 0.999))
    ]
    clip = PipelineComparison(
        name="clip",
        frames=3,
        same_cells=3,
        features=1.0,
        logits=0.5,
        tokens=16,
        same_tokens=4,
        required=False,
    )
    found = precisions.comparisons(Report("torch", graphs=graphs, pipelines=[clip, clip]))
    assert found["graphs"]["llm"] == {"max_difference": 0.5, "least_cosine": 0.99}
    assert found["clip"]["same_tokens"] == "4 of 16"


def test_an_export_is_watched_and_its_bundle_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The child takes what torch made of these graphs, of as many words, from other tests.
    shared = (
        "import edge_vlm.presets; from tests.tiny import tiny_config, traced_once; "
        "edge_vlm.presets.tiny = tiny_config; held = traced_once(); held.__enter__()\n"
    )

    def started(command: list[str], **options: Any) -> subprocess.Popen[str]:
        program, flag, code, *arguments = command
        return subprocess.Popen([program, flag, shared + code, *arguments], **options)

    names = SimpleNamespace(Popen=started, PIPE=subprocess.PIPE)
    monkeypatch.setattr(full_size_export, "subprocess", names)
    path = tmp_path / "result.json"
    argv = ["--shape", "tiny", "--threads", "1", "--out", str(path)]
    argv += ["--tokenizer", str(tiny_checkpoint() / "tokenizer.json")]
    assert full_size_export.main([*argv, "--scratch", str(tmp_path)]) == 0
    result = json.loads(path.read_text())
    assert result["exit_code"] == 0
    assert "tmp" not in result["command"]
    memory = result["peak_memory_gb"]
    assert 0.1 < memory["own"] < memory["both"] < 5
    assert any(re.match(r"took \d+ s, memory \d", text) for text in result["printed"])
    assert list(tmp_path.iterdir()) == [path]


def test_an_export_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    argv = ["--shape", "tiny", "--limit-minutes", "0.001", "--out", str(path)]
    assert full_size_export.main([*argv, "--scratch", str(tmp_path)]) == 1
    result = json.loads(path.read_text())
    assert result["stopped_after_s"] == pytest.approx(0.06)
    assert result["exit_code"] != 0
    assert result["files_mb"] == {}


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)
def test_engines_are_built_and_measured(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    assert wide_engines.main(["--tiny", "--out", str(path), "--scratch", str(tmp_path)]) == 0
    graphs = json.loads(path.read_text())["graphs"]
    assert list(graphs) == ["vit_stem", "vit_trunk", "llm", "llm_decode"]
    assert all(found["engine_mb"] > 0.1 and not found["warnings"] for found in graphs.values())
    assert list(tmp_path.iterdir()) == [path]


def test_wide_layers_are_those_of_the_published_model() -> None:
    language, vision = wide_engines.shallow().language, wide_engines.shallow().vision
    assert (language.width, language.num_kv_heads, language.head_dim) == (2560, 8, 128)
    assert (vision.width, vision.num_patches) == (1152, 729)
