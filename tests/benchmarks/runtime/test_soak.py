"""The soak at small size: everything is done at least once, counted, and sampled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.runtime import soak
from benchmarks.runtime.loads.soak_load import ENDS

FORM = ["--seconds", "10", "--cameras", "1", "--viewers", "2", "--fps", "2"]
RATES = ["--action-seconds", "0.2", "--sample-seconds", "0.5"]


def test_a_server_is_used_and_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "soak.json"
    soak.main([*FORM, *RATES, "--out", str(path)])  # a few seconds say nothing of growth
    result = json.loads(path.read_text())
    log = path.with_suffix(".server.log").read_text()
    goals = result["goals"]
    assert goals.pop("nothing_grows") in (True, False)
    assert goals == dict.fromkeys(goals, True), (result["errors"], result["alerts"], log)
    done = result["done"]
    for what in ("steady_answers", "subscriptions", "http_requests", "configurations"):
        assert done[what] > 0, done
    assert any(done.get(end) for end in ENDS)
    assert result["frames"]["sent"] > 0
    assert result["alerts"]["told"] > 0
    assert set(result["slopes"]) == set(soak.TOLERANCES)
    last = result["samples"][-1]
    assert last["rss_mb"] > last["anonymous_mb"] > 20
    assert last["threads"] > 1
    assert last["descriptors"] > 3
    assert last["kv_tokens"] > 0
    assert "95 % interval" in capsys.readouterr().out
