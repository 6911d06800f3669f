"""Our vision side against recorded outputs of the published STTS code (see compare.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.golden.compare import TOLERANCE, differences, main, read

FILES = sorted((Path(__file__).parents[1] / "data" / "golden").glob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_recorded_outputs_are_met(path: Path) -> None:
    found = differences(path)
    assert {"scores", "features", "hidden.3", "hidden.4", "hidden.5", "hidden.7"} <= found.keys()
    assert all(difference <= TOLERANCE for difference in found.values()), found


def test_scorer_gradients_are_among_them() -> None:
    tensors, metadata = read(next(path for path in FILES if path.stem == "train"))
    assert metadata["train"] == "True"
    assert sum(name.startswith("grad.") for name in tensors) == 14


def test_a_difference_fails_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, metadata = read(next(path for path in FILES if path.stem == "k50"))
    tensors["output.features"][3, 5] += 1e-3
    damaged = tmp_path / "damaged.safetensors"
    save_file(tensors, damaged, metadata)
    assert main([str(damaged)]) == 1
    assert "above 0.0001" in capsys.readouterr().out
