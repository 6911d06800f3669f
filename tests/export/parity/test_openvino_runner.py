"""`edge-vlm verify --backend openvino`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_vlm.cli import main
from edge_vlm.errors import ConfigError
from edge_vlm.errors.export import ParityError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm_export.verify.openvino_runner import OpenVinoRunner, openvino_graphs
from edge_vlm_export.verify.pipeline import Arrays
from edge_vlm_export.verify.verify import verify_bundle
from tests.tiny import tiny_bundle, tiny_variant

pytest.importorskip("openvino", reason="openvino is not installed")


def test_the_bundle_is_compared_as_openvino_runs_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tiny_bundle()), "--backend", "openvino"]) == 0
    out = capsys.readouterr().out
    assert "OpenVINO in float32 against the bundle's reference tensors" in out
    assert "every graph agrees" in out


def test_a_graph_that_differs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, run = EngineBundle.open(tiny_bundle()), OpenVinoRunner.run

    def off(self: OpenVinoRunner, inputs: Arrays, more: tuple[str, ...] = ()) -> Arrays:
        return {name: np.float32(1.01) * array for name, array in run(self, inputs).items()}

    monkeypatch.setattr(OpenVinoRunner, "run", off)
    exact = next(openvino_graphs(bundle, 1))
    with pytest.raises(ParityError):
        verify_bundle(bundle, thorough=False, by=exact).require()


def test_what_openvino_would_compute_wrongly_is_refused() -> None:
    bundle = EngineBundle.open(Path(tiny_variant("ort-int4")))
    with pytest.raises(ConfigError, match="--variant portable"):
        next(openvino_graphs(bundle, 1))
