"""`edge-vlm verify --footage`: every value finite on real pictures, and torch's answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edge_vlm.cli import main
from edge_vlm.errors import NonFinite, VideoNotFound
from edge_vlm.errors.export import ParityError
from edge_vlm.formats.bundle import MANIFEST, EngineBundle, sha256_of_file
from edge_vlm_export.graphs.weights import open_weights
from edge_vlm_export.verify.verify import verify_bundle
from tests.tiny import tiny_bundle, tiny_checkpoint, tiny_footage, tiny_variant


def test_plain_graphs_give_torchs_answers(capsys: pytest.CaptureFixture[str]) -> None:
    footage = ["--footage", str(tiny_footage()), "--footage-frames", "5"]
    checkpoint = ["--checkpoint", str(tiny_checkpoint())]
    assert main(["verify", str(tiny_bundle()), *checkpoint, "--quick", *footage]) == 0
    out = capsys.readouterr().out
    assert "footage.mp4: 5 frames in 2 clips, every value finite; against torch: " in out
    assert "same cells kept in 5 of 5 frames" in out
    assert "32 of 32 answer tokens the same" in out


def test_quantised_graphs_are_measured_not_required() -> None:
    bundle = EngineBundle.open(tiny_variant("edge"))
    report = verify_bundle(
        bundle, open_weights(tiny_checkpoint()), thorough=False, footage=[tiny_footage()]
    )
    report.require()
    (check,) = report.footage
    assert (check.frames, check.clips, check.tokens) == (6, 2, 32)
    assert 0.9 < check.logits < 1.0
    assert 0 <= check.same_tokens <= check.tokens


def test_without_a_checkpoint_only_finiteness_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tiny_bundle()), "--footage", str(tiny_footage())]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-2] == "footage.mp4: 6 frames in 2 clips, every value finite"


def _changed(tmp_path: Path, graph: str, value: float) -> Path:
    """A bundle with one changed weight, and a manifest that vouches for it."""
    folder = Path(shutil.copytree(tiny_bundle(), tmp_path / "bundle"))
    path = folder / "graphs" / f"{graph}.weights"
    weights = np.fromfile(path, np.float32)
    weights[weights.size // 2] = value
    path.write_bytes(weights.tobytes())
    data = json.loads((folder / MANIFEST).read_text())
    data["files"][f"graphs/{graph}.weights"] = sha256_of_file(path)
    (folder / MANIFEST).write_text(json.dumps(data))
    return folder


def test_a_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    bundle = EngineBundle.open(_changed(tmp_path, "vit_trunk", np.nan))
    with pytest.raises(NonFinite, match=r"features is not finite .*vit_trunk"):
        verify_bundle(bundle, thorough=False, footage=[tiny_footage()])


def test_another_answer_of_plain_graphs_is_an_error(tmp_path: Path) -> None:
    bundle = EngineBundle.open(_changed(tmp_path, "vit_trunk", 1e3))
    report = verify_bundle(
        bundle, open_weights(tiny_checkpoint()), thorough=False, footage=[tiny_footage()]
    )
    report.graphs.clear()
    with pytest.raises(ParityError, match=r"clip 1 of footage\.mp4 against torch"):
        report.require()


def test_footage_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(VideoNotFound):
        verify_bundle(EngineBundle.open(tiny_bundle()), footage=[tmp_path / "no.mp4"])
