"""Other software beside ours: every part states what it measured, or what it lacks."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from benchmarks.peers import __main__ as peers
from benchmarks.peers import by_llama_cpp
from docs import build_benchmarks
from edge_vlm.presets import tiny
from tests.tiny import traced_once


def test_the_same_weights_and_pictures_give_the_same_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    out = tmp_path / "peers.json"
    argv = ["--tiny", "--parts", "transformers", "llama.cpp", "--frames", "2", "--rounds", "1"]
    with traced_once():
        assert peers.main([*argv, "--node-modules", str(tmp_path), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["command"] == f"python -m benchmarks.peers {' '.join(argv)}"
    assert "is missing" in result["skipped"]["llama.cpp"]
    (row,) = result["parts"]["transformers"]["rows"]
    assert row["largest_logit_difference"] < 1e-4
    assert row["cases"]["transformers, a question"]["times_faster"] == 1
    assert len(row["cases"]) == 5
    monkeypatch.setattr(build_benchmarks, "PEERS", (out,))
    page = "\n".join(build_benchmarks.peers())
    assert "llama.cpp was left out:" in page
    assert f"| 2 | {row['prompt_tokens']} |" in page


def test_nothing_installed_is_a_failure(tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    argv = ["--parts", "llama.cpp", "--node-modules", str(tmp_path), "--out", str(out)]
    assert peers.main(argv) == 1
    assert json.loads(out.read_text())["parts"] == {}


def test_a_written_gguf_holds_the_shape(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    language = tiny(base_vocab=300).language
    language = dataclasses.replace(language, width=64, head_dim=32, mlp_width=96)
    by_llama_cpp.write_gguf(tmp_path / "made.gguf", language)
    tensors = {t.name: tuple(t.shape) for t in gguf.GGUFReader(tmp_path / "made.gguf").tensors}
    assert len(tensors) == 3 + 11 * language.num_layers
    assert tensors["token_embd.weight"] == (64, 300)
    assert tensors["blk.1.attn_k.weight"] == (64, language.num_kv_heads * 32)


def test_node_ending_is_told(tmp_path: Path) -> None:
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    with (
        pytest.raises(RuntimeError, match="node ended with 1"),
        by_llama_cpp._llama(tmp_path, tmp_path / "none.gguf", 1, 64),
    ):
        pytest.fail("it cannot start")
