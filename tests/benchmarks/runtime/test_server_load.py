"""The script about a server's load, at small size: nothing is lost, and everybody is answered."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.runtime import server_load
from benchmarks.runtime.loads.load_clients import FPS, VIEWERS


def test_server_load_states_what_it_measured(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    argv = ["--seconds", "2", "--rounds", "1", "--questions", "1"]
    assert server_load.main([*argv, "--out", str(path)]) == 0
    result = json.loads(path.read_text())
    viewers, requests = result["viewers"], result["requests"]
    assert viewers["sent"] == VIEWERS * 2 * FPS
    assert viewers["goals"]["none_lost"]
    assert viewers["own_ms"]["p50"] <= viewers["own_ms"]["p99"] <= viewers["own_ms"]["most"]
    assert requests["goals"]["all_answered"]
    assert requests["statuses"]["200"] > 0
    times = requests["live_ttft_ms"]
    assert requests["ratio"] > 0
    assert times["questions_each"] == 1
