"""The script about a server's load, at small size: nothing is lost, and everybody is answered."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.runtime import server_load
from benchmarks.runtime.loads.load_clients import FPS, VIEWERS

FEW = 6
"""Requests at once: each of many would be answered."""


start = server_load._process


def few_requests(kind: str, url: str, seconds: float, folder: str) -> subprocess.Popen[str]:
    if kind != "requests":
        return start(kind, url, seconds, folder)
    code = (
        "import sys; from benchmarks.runtime.loads import load_clients; "
        f"load_clients.REQUESTS = {FEW}; sys.exit(load_clients.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, kind, url, str(seconds), folder]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_server_load_states_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_load, "REQUESTS", FEW)
    monkeypatch.setattr(server_load, "_process", few_requests)
    path = tmp_path / "result.json"
    argv = ["--seconds", "2", "--rounds", "1", "--questions", "1"]
    assert server_load.main([*argv, "--out", str(path)]) == 0
    result = json.loads(path.read_text())
    viewers, requests = result["viewers"], result["requests"]
    assert viewers["sent"] == VIEWERS * 2 * FPS
    assert viewers["goals"]["none_lost"]
    assert viewers["own_ms"]["p50"] <= viewers["own_ms"]["p99"] <= viewers["own_ms"]["most"]
    assert requests["goals"]["all_answered"]
    assert requests["requests_at_once"] == FEW
    assert requests["statuses"]["200"] > 0
    times = requests["live_ttft_ms"]
    assert requests["ratio"] > 0
    assert times["questions_each"] == 1
