"""What the suite promises of itself: checks that are on, and lanes that hold together."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests import conftest


def test_event_loops_are_in_debug_mode() -> None:
    async def from_another_thread() -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, loop.call_soon, print)

    with pytest.raises(RuntimeError, match="Non-thread-safe"):
        asyncio.run(from_another_thread())


def test_programs_that_tests_start_are_as_their_users_start_them() -> None:
    code = "import asyncio; print(asyncio.new_event_loop().get_debug())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_a_warning_is_an_error() -> None:
    with pytest.raises(UserWarning, match="careful"):
        warnings.warn("careful", stacklevel=1)


def test_a_file_left_open_is_an_error(pytester: pytest.Pytester) -> None:
    pytester.makepyprojecttoml((conftest.ROOT / "pyproject.toml").read_text())
    pytester.mkdir("tests").joinpath("test_it.py").write_text("def test_it(): open(__file__)")
    pytester.runpytest("-p", "no:cacheprovider").assert_outcomes(failed=1)


def test_every_slow_place_exists() -> None:
    tests = Path(conftest.__file__).parent
    assert not [place for place in conftest.SLOW if not (tests / place).exists()]
    placed = (*conftest.LONGEST, *conftest.WAITING)
    assert not [name for name in placed if not (tests / name).is_file()]
    assert all(conftest._is_slow(tests / name) for name in placed)
    assert len(set(placed)) == len(placed)


@pytest.mark.parametrize("again", [False, True])
def test_one_thread_for_each_process(again: bool) -> None:
    import torch

    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)  # as a command does that a test calls
