"""The script that compares caches of two formats, on test models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.export import cache_format
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.precision import Variant
from tests.tiny import tiny_variant

NAMES = {
    (Variant.ORT, "int4"): "ort-int4",
    (Variant.ORT, "int4,cache=float16"): "ort-cache",
    (Variant.PORTABLE, "int4"): "both",
    (Variant.PORTABLE, "int4,cache=float16"): "cache",
}


def test_each_form_is_measured_with_both_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exported(folder: Path, variant: Variant, precision: str, *, is_tiny: bool) -> EngineBundle:
        assert is_tiny
        return EngineBundle.open(tiny_variant(NAMES[variant, precision]))

    monkeypatch.setattr(cache_format, "exported", exported)
    out = tmp_path / "cache.json"
    argv = ["--tiny", "--rounds", "3", "--past", "16", "32", "--out", str(out)]
    assert cache_format.main(argv) == 0
    variants = json.loads(out.read_text())["variants"]
    assert variants.keys() == {"ort", "portable"}
    for found in variants.values():
        assert found["bytes_a_token"]["float32"] == 2 * found["bytes_a_token"]["float16"]
        assert found["past"].keys() == {"16", "32"}
        row = found["past"]["32"]
        ratio = row["float16"]["median_s"] / row["float32"]["median_s"]
        assert row["times"] == pytest.approx(ratio, abs=1e-3)
        assert len(row["float16"]["rounds_s"]) == 3
