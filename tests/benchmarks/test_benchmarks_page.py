"""docs/benchmarks.md is what its script makes of the committed results, and those are what the
schema says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from docs import build_benchmarks
from edge_vlm_runtime.bench.record import SCHEMA
from tests.conftest import ROOT

COMMITTED = sorted(build_benchmarks.FOLDER.glob("*.json"))


def test_the_page_is_what_the_script_makes() -> None:
    assert (ROOT / "docs" / "benchmarks.md").read_text(
        encoding="utf-8"
    ) == build_benchmarks.page(), "run: python -m docs.build_benchmarks docs/benchmarks.md"


def test_there_is_a_result() -> None:
    assert COMMITTED


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_are_complete(path: Path) -> None:
    record = json.loads(path.read_text())
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(record)
    assert record["complete"]


def test_the_page_follows_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads(COMMITTED[0].read_text())
    record["device"]["name"] = "A device of somebody"
    record["answers"][-1]["tokens_per_s"] = 4321.0
    record["run"]["warnings"] = []
    (tmp_path / "other.json").write_text(json.dumps(record))
    monkeypatch.setattr(build_benchmarks, "FOLDER", tmp_path)
    monkeypatch.setattr(build_benchmarks, "ROOT", tmp_path)
    page = build_benchmarks.page()
    assert re.search(r"\| A device of somebody \|.*\| 4321 \|", page)
    assert "## demo on A device of somebody, ort" in page


def test_the_form_asks_for_the_file() -> None:
    form: dict[str, Any] = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/device.yml").read_text())
    required = {part["id"] for part in form["body"] if part.get("validations", {}).get("required")}
    assert required == {"device", "result"}
