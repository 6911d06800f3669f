"""How far a long command is: lines in a pipe, a bar on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from edge_vlm.console.progress import Progress, counted, duration


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_line_a_minute_with_total_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress("clips", 40, clock=clock) as progress:
        clock.now += 30
        progress.advance(5)
        assert capsys.readouterr().err == ""
        clock.now += 30
        progress.advance(5, "row 2")
        assert progress.left_s == 180
    assert capsys.readouterr().err == "clips: 10 of 40, 25%, 3 min left, row 2\n"


def test_sizes_and_what_has_no_known_end() -> None:
    clock = Clock()
    download = Progress("model", 4e9, unit="B", clock=clock)
    clock.now += 10
    download.at(1e9)
    assert download.line() == "model: 1000 of 4000 MB, 25%, 30 s left"
    unknown = Progress("frames", None)
    assert unknown.left_s is None
    assert unknown.line() == "frames: 0"


def test_items_pass_unchanged() -> None:
    assert list(counted(iter("abc"), "letters", 3)) == ["a", "b", "c"]


def test_durations_in_words() -> None:
    assert [duration(s) for s in (3, 600, 12_000)] == ["3 s", "10 min", "3 h 20 min"]


def test_a_bar_on_a_terminal() -> None:
    code = (
        "from edge_vlm.console import progress; "
        "list(progress.counted(range(7), 'clips', 7)); print('out')"
    )
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
            text=True,
            check=True,
        )
        shown = os.read(ours, 65536).decode()
    finally:
        os.close(theirs)
        os.close(ours)
    assert done.stdout == "out\n"
    assert "clips" in shown
    assert "7/7" in shown
