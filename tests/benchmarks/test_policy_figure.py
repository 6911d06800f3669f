"""The figure of a table: every row is in it, where its figures say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.model import policy_figure
from edge_vlm.errors import ConfigError
from edge_vlm.evaluation.runs import Run, grid

SVG = "{http://www.w3.org/2000/svg}"


def row(path: str, run: Run, mean: float) -> dict[str, Any]:
    kept = 100 * run.keep_ratio
    named = {"policy": run.policy, "keep_ratio": run.keep_ratio, "attention": run.attention.value}
    interval = [mean - 5, min(mean + 5, 100)]
    shares = {"kept_percent": kept, "mean_percent": mean, "mean_interval_95": interval}
    return {"path": path, "clips": 9, **named, **shares}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [row("bundle", run, 40 + 60 * run.keep_ratio) for run in grid()]
    rows += [row("served", Run("stream", 0.5), 0) | {"clips": 2}]
    file = tmp_path / "table.json"
    file.write_text(json.dumps({"rows": rows}))
    return file


def test_every_policy_has_its_line_in_each_panel(table: Path, tmp_path: Path) -> None:
    assert policy_figure.main([str(table), str(tmp_path / "figure.svg")]) == 0
    picture = ElementTree.parse(tmp_path / "figure.svg").getroot()
    lines = list(picture.iter(f"{SVG}polyline"))
    assert len(lines) == 2 * len(policy_figure.COLOURS)
    for line in lines:
        points = [point.split(",") for point in line.get("points", "").split()]
        assert len(points) == 6  # five shares and the whole
        assert points[-1] == [str(float(policy_figure.WIDTH)), "0.0"]
        assert [float(y) for _, y in points] == sorted((float(y) for _, y in points), reverse=True)
    words = {text.text for text in picture.iter(f"{SVG}text")}
    assert words >= {*policy_figure.COLOURS, "cells kept, %"}


def test_another_path_can_be_drawn(table: Path, tmp_path: Path) -> None:
    assert policy_figure.main([str(table), str(tmp_path / "f.svg"), "--path", "served"]) == 0
    picture = ElementTree.parse(tmp_path / "f.svg").getroot()
    assert len(list(picture.iter(f"{SVG}polyline"))) == 1


def test_an_empty_table_is_an_error(table: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no row"):
        policy_figure.main([str(table), str(tmp_path / "f.svg"), "--path", "torch"])
