"""Real processes, killed: the small form of the fault harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.runtime import faults
from benchmarks.runtime.fault_parts import cases


def measure(tmp_path: Path, *argv: str) -> dict[str, Any]:
    path = tmp_path / "faults.json"
    faults.main([*argv, "--out", str(path)])
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def require_goals(found: dict[str, Any]) -> None:
    if "left_out" in found and not found["goals"]:
        pytest.skip(found["left_out"])
    assert found["goals"] == dict.fromkeys(found["goals"], True), found


def test_kills_lose_nothing_that_was_accepted(tmp_path: Path) -> None:
    found = measure(tmp_path, "--cases", "kills", "--kills", "4", "--seed", "36")["kills"]
    require_goals(found)
    assert found["kills"] == 4
    assert found["viewer"]["events"] > 0
    assert found["receivers"]["webhook"]["told"] > 0


def test_a_full_disk_holds_nobody_up_and_loses_nothing(tmp_path: Path) -> None:
    found = measure(tmp_path, "--cases", "full_disk")["full_disk"]
    require_goals(found)
    assert found["carried_over_the_kill"] > 0


def test_sigterm_in_the_middle_of_an_answer(tmp_path: Path) -> None:
    found = measure(tmp_path, "--cases", "sigterm", "--stops", "1")["sigterm"]
    require_goals(found)


def test_a_clock_that_is_set_changes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases, "TURNS", 2)
    monkeypatch.setattr(cases, "SHIFTS_S", (cases.SHIFTS_S[1], cases.SHIFTS_S[2], 0))
    require_goals(measure(tmp_path, "--cases", "clock")["clock"])
