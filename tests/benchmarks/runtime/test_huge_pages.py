"""The script that sets small pages beside huge ones, on the test model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

from benchmarks.export import wide_engines
from benchmarks.runtime import huge_pages
from edge_vlm_runtime.planning.check import cases_of
from tests.tiny import tiny_variant


def test_every_stage_is_run_on_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(is_tiny: bool, precision: str, folder: Path) -> None:
        assert (is_tiny, precision) == (True, "fp32")
        shutil.copytree(tiny_variant("both"), folder)

    monkeypatch.setattr(wide_engines, "export", export)
    # A process loads torch: one takes all stages, and two of them tell as much as all four.
    monkeypatch.setattr(huge_pages, "cases_of", lambda bundle: cases_of(bundle)[1::2])
    out = tmp_path / "pages.json"
    argv = ["--tiny", "--precisions", "fp32", "--rounds", "3", "--scratch", str(tmp_path)]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:

        @contextmanager
        def same(count: int, mp_context: BaseContext) -> Iterator[ProcessPoolExecutor]:
            assert (count, mp_context.get_start_method()) == (1, "spawn")
            yield process

        monkeypatch.setattr(huge_pages, "ProcessPoolExecutor", same)
        assert huge_pages.main([*argv, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert "tmp" not in result["command"]
    rows = result["stages"]["fp32"]
    assert [row["stage"] for row in rows] == ["vit_trunk", "decode"]
    for row in rows:
        assert len(row["small"]["rounds_s"]) == len(row["huge"]["rounds_s"]) == 3
        assert row["times_as_fast"] > 0
    assert list(tmp_path.iterdir()) == [out]
