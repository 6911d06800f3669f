"""The script of the full-size table, on the test model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.runtime import full_size
from tests.tiny import tiny_variant


def test_the_table_follows_from_the_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exported(is_tiny: bool, folder: Path) -> Path:
        assert is_tiny
        return Path(shutil.copytree(tiny_variant("both"), folder))

    monkeypatch.setattr(full_size, "exported", exported)
    out = tmp_path / "full_size.json"
    argv = ["--tiny", "--rounds", "3", "--past", "32", "--scratch", str(tmp_path)]
    assert full_size.main([*argv, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert list(tmp_path.iterdir()) == [out]
    stages = result["stages"]
    assert len(stages) == 8
    for form in ("before", "now"):
        row = result["table"][form]
        parts = ("vit_stem", "vit_trunk 0.5", "prefill 0.5")
        median = [stages[n].get(form, stages[n].get("both"))["median_s"] for n in parts]
        assert row["frames_a_second"]["0.5"] == pytest.approx(1 / sum(median), rel=1e-3)
        assert len(stages["vit_trunk 1"][form]["rounds_s"]) == 3
    assert f"now     {result['table']['now']['frames_a_second']['1']:g}" in capsys.readouterr().out
