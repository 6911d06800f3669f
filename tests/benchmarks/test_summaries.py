"""Result files hold figures, not answers, and the docs' picture is drawn from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.harness import RESULTS, ROOT
from benchmarks.model import policy_figure
from benchmarks.summarise import main, rows_of

LARGEST = 60_000
KINDS = {"count": {"asked": 4, "percent": 75.0}, "where": {"asked": 2, "percent": 50.0}}
ROW = {"path": "torch", "policy": "stream", "keep_ratio": 0.5, "mean_percent": 62.5}


def test_no_result_file_is_large() -> None:
    sizes = {path.name: path.stat().st_size for path in RESULTS.iterdir()}
    assert sizes
    assert not {name: size for name, size in sizes.items() if size > LARGEST}


def test_a_summary_keeps_the_figures_and_drops_the_answers(tmp_path: Path) -> None:
    table, summary = tmp_path / "table.json", tmp_path / "summary.json"
    rows = [
        {**ROW, "mean_of": ["count", "where"], "kinds": KINDS},
        {**ROW, "points_over_random": [2.0, 0.5], "kinds": {"when": {"percent": 10.0}}},
    ]
    record = {"command": "edge-vlm eval", "wrong": {"torch stream:0.5": []}, "rows": rows}
    table.write_text(json.dumps(record))
    assert main([str(table), str(summary)]) == 0
    kept = json.loads(summary.read_text())
    assert kept["command"] == "edge-vlm eval"
    assert "wrong" not in kept
    first, second = rows_of(kept)
    assert ROW.items() <= first.items()
    assert (first["count"], first["where"], first["when"]) == (75.0, 50.0, None)
    assert (second["count"], second["when"]) == (None, 10.0)
    assert (first["points_over_random"], second["points_over_random"]) == (None, [2.0, 0.5])


def test_rows_of_the_evaluations_own_record_are_taken_as_they_are() -> None:
    assert rows_of({"rows": [ROW]}) == [ROW]


@pytest.mark.parametrize("name", ["policies"])
def test_the_picture_in_the_docs_is_what_the_summary_says(name: str, tmp_path: Path) -> None:
    figure = tmp_path / "figure.svg"
    assert policy_figure.main([str(RESULTS / f"{name}.json"), str(figure)]) == 0
    assert figure.read_text() == (ROOT / "docs" / "images" / f"{name}.svg").read_text()
