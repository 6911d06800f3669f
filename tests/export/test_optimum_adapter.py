"""Optimum's static calibration on our graphs; skipped where its versions cannot live with ours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edge_vlm.errors import ConfigError
from edge_vlm.formats.precision import Precision
from tests.tiny import tiny_bundle, tiny_checkpoint, tiny_footage, tiny_variant

pytest.importorskip("optimum.onnxruntime", reason="needs the extra optimum, in its own environment")


@pytest.mark.parametrize("method", ["minmax", "percentiles"])
def test_a_bundle_with_optimum_ranges_is_close_to_float32(tmp_path: Path, method: str) -> None:
    from edge_vlm_export.optimum_adapter import quantize_vision

    bundle, report = quantize_vision(
        tiny_bundle(), tmp_path / "out", (tiny_footage(),), method=method
    )
    assert bundle.precision == Precision(vit="int8")
    assert all(result.ok for result in report.graphs)
    onnx = pytest.importorskip("onnx")
    model = onnx.load(bundle.graph_path("vit_trunk"), load_external_data=False)
    kinds = {node.op_type for node in model.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds
    stored = {item.data_type for item in model.graph.initializer}
    assert onnx.TensorProto.INT8 in stored
    old = (tiny_bundle() / "graphs" / "vit_trunk.weights").stat().st_size
    assert (bundle.path / "graphs" / "vit_trunk.weights").stat().st_size < old


def test_only_float32_bundles_and_known_methods(tmp_path: Path) -> None:
    from edge_vlm_export.optimum_adapter import quantize_vision

    with pytest.raises(ConfigError, match="float32"):
        quantize_vision(tiny_variant("ort-int4"), tmp_path / "out", (tiny_footage(),))
    with pytest.raises(ConfigError, match="method"):
        quantize_vision(tiny_bundle(), tmp_path / "out", (tiny_footage(),), method="best")
    assert list(tmp_path.iterdir()) == []


def test_the_registered_config_exports_the_stem(tmp_path: Path) -> None:
    import torch
    from optimum.exporters.tasks import TasksManager

    from edge_vlm.model.checkpoint import load_checkpoint
    from edge_vlm_export.optimum_adapter import TASK, EdgeVlmOnnxConfig, register_export_config

    register_export_config()
    make = TasksManager.get_exporter_config_constructor(
        "onnx", model_type="edge_vlm", task=TASK, library_name="transformers"
    )
    vision = load_checkpoint(tiny_checkpoint()).cfg.vision
    config = make(
        SimpleNamespace(
            image_size=vision.image_size,
            num_patches=vision.num_patches,
            patch_dim=vision.patch_dim,
        )
    )
    assert isinstance(config, EdgeVlmOnnxConfig)
    assert list(config.inputs) == ["pixels"]
    pixels = config.generate_dummy_inputs()["pixels"]
    assert pixels.shape == (2, vision.num_patches, vision.patch_dim)

    model = load_checkpoint(tiny_checkpoint())

    class Stem(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.model.embed_frames(pixels)

    torch.onnx.export(
        Stem().eval(),
        (pixels,),
        str(tmp_path / "stem.onnx"),
        input_names=list(config.inputs),
        output_names=list(config.outputs),
        dynamic_shapes={"pixels": {0: torch.export.Dim("F", min=1, max=4)}},
        opset_version=config.DEFAULT_ONNX_OPSET,
        dynamo=True,
        verbose=False,
    )
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(tmp_path / "stem.onnx"))
    frames = np.random.default_rng(0).random((3, *pixels.shape[1:]), np.float32)
    with torch.no_grad():
        expected = model.embed_frames(torch.from_numpy(frames)).numpy()
    (got,) = session.run(None, {"pixels": frames})
    np.testing.assert_allclose(got, expected, atol=1e-4)
