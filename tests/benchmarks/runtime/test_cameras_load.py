"""The script about a server's own cameras, at small size: nothing is lost, all are answered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.runtime import cameras_load


def test_cameras_load_states_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cameras_load, "MARGIN_S", 150.0)  # on a busy machine all begins late
    monkeypatch.setattr(cameras_load, "CAMERAS", 3)
    monkeypatch.setattr(cameras_load, "VIEWERS", 2)
    path = tmp_path / "result.json"
    assert cameras_load.main(["--seconds", "4", "--out", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["goals"]["each_frame_one_outcome"], result
    assert result["goals"]["all_answered"], result
    assert result["frames_seen"] >= cameras_load.CAMERAS
    assert min(result["frames_accepted"]) > 0
    assert result["questions"]["all"] > 0
    assert result["states"] == ["live"]
