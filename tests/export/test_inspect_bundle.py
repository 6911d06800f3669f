"""`edge-vlm inspect BUNDLE` says what the manifest and the plan say, after checking the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edge_vlm.cli import main
from edge_vlm.formats.bundle import MANIFEST
from tests.tiny import tiny_bundle


def test_a_bundle_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_bundle())]) == 0
    out = capsys.readouterr().out
    assert "fp32 (base float32, vit base, llm base, head base, embed float32)" in out
    assert "portable, cache token_major" in out
    assert "s=1..96 p=0..512" in out
    assert "graphs/llm.weights" in out
    assert "llm: " in out


def test_json_holds_the_whole_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_bundle()), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    manifest = json.loads((tiny_bundle() / MANIFEST).read_text())
    assert found["graphs"]["llm"] == manifest["graphs"]["llm"]["spec"]
    assert found["source"] == manifest["source"]
    assert found["files"]["manifest.json"] == (tiny_bundle() / MANIFEST).stat().st_size


def test_a_damaged_bundle_is_not_described(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny_bundle(), tmp_path / "bundle"))
    with (folder / "graphs" / "llm.weights").open("r+b") as file:
        file.write(b"\xff")
    assert main(["inspect", str(folder)]) == 4
    assert "E-BUNDLE-HASH" in capsys.readouterr().err
