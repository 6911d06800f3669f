"""The scripts about streams, at small size: what they state follows from what they measured."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks.runtime import exact_prefill, live_load, stream_length
from edge_vlm_runtime.protocol.settings import SessionSettings
from edge_vlm_runtime.session.budget import default_settings
from tests.published_folder import image_bundle


def read(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text())
    assert isinstance(result, dict)
    return result


def test_stream_length_states_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    argv = ["--lengths", "3", "30", "--clips", "--rounds", "3", "--warmups", "0"]
    assert stream_length.main([*argv, "--out", str(path)]) == 0
    result = read(path)
    assert result["command"] == " ".join(["python -m benchmarks.runtime.stream_length", *argv])
    assert "question" not in result
    stream = result["stream"]
    first, last = (stream["lengths"][length] for length in ("3", "30"))
    assert first["kv_tokens"] < last["kv_tokens"] <= stream["settings"]["window_tokens"]
    for name in ("time_to_first_token", "one_frame"):
        pairs = zip(last[name]["rounds_s"], first[name]["rounds_s"], strict=True)
        expected = statistics.median(later / earlier for later, earlier in pairs)
        assert stream[f"{name}_last_to_first"] == pytest.approx(expected, rel=0.05, abs=0.01)
    assert "last to first" in capsys.readouterr().out


def test_live_load_states_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def beats_soon(*of: Any) -> SessionSettings:
        """A scene that stands still is looked at again after a few seconds, not after ten."""
        return default_settings(*of).changed({"heartbeat_s": 3.0})

    monkeypatch.setattr(live_load, "default_settings", beats_soon)
    monkeypatch.setattr(live_load, "RATES", (2.0, live_load.FLOOD))
    path = tmp_path / "result.json"
    argv = ["--answer", "5", "--seconds", "4", "--rounds", "1"]
    assert live_load.main([*argv, "--out", str(path)]) == 0
    result = read(path)
    cases = result["answer"]["cases"]
    assert cases["alone"]["times_alone"] == 1.0
    assert cases["alone"]["frames_encoded_meanwhile"] == 0
    for case in cases.values():
        ratio = case["rounds_s"][0] / cases["alone"]["rounds_s"][0]
        assert case["times_alone"] == pytest.approx(ratio, rel=0.01)
    budget = result["budget"]
    values = [value for row in budget["spent_to_target"].values() for value in row.values()]
    assert budget["worst"] == max(abs(1 - value) for value in values)
    static = result["static"]
    assert static["static"]["frames_encoded"] == 2
    assert static["fast"]["frames_encoded"] == 8
    assert static["static_to_busy"]["frames_encoded"] == pytest.approx(2 / 8, abs=1e-3)
    assert "static to busy" in capsys.readouterr().out


def test_an_exact_prefill_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    argv = ["--bundle", str(image_bundle()), "--frames", "1", "--threads", "1", "--out", str(path)]
    assert exact_prefill.main(argv) == 0
    (row,) = json.loads(path.read_text())["frames"]
    assert row["tokens"] == exact_prefill.TOKENS
    assert abs(row["prefill_gb"]) < 1
    assert row["second_of_first"] > 0
