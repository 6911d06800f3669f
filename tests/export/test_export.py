"""An exported graph equals torch at its smallest, usual and largest sizes, and nothing is fixed."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from edge_vlm.cli import main
from edge_vlm.errors import CheckpointError
from edge_vlm.errors.export import ExportError, ParityError, Specialised
from edge_vlm.formats.bundle import MANIFEST, EngineBundle, sha256_of_file
from edge_vlm.presets import molmo2_4b, tiny
from edge_vlm_export.graphs.graphs import GraphLimits, graph_specs
from edge_vlm_export.graphs.weights import open_weights
from edge_vlm_export.verify.check_inputs import LARGEST_CHECK, check_sizes, sample_inputs
from edge_vlm_export.verify.compare import format_table
from edge_vlm_export.verify.verify import require_source, verify_bundle
from tests.tiny import tiny_bundle, tiny_checkpoint

GRAPHS = ("vit_stem", "vit_trunk", "llm")


@pytest.fixture(scope="module")
def bundle() -> EngineBundle:
    return EngineBundle.open(tiny_bundle())


def test_every_graph_equals_torch_at_every_size(bundle: EngineBundle) -> None:
    from edge_vlm_export.graphs.weights import open_weights

    report = verify_bundle(bundle, open_weights(tiny_checkpoint()))
    report.require()
    seen = defaultdict(list)
    for result in report.graphs:
        seen[result.graph].append(dict(result.sizes))
    assert tuple(seen) == GRAPHS
    for name, spec in bundle.specs.items():
        assert len(seen[name]) >= 3
        most = {
            dim: min(size, LARGEST_CHECK.get(dim, size)) for dim, size in spec.sizes("max").items()
        }
        assert spec.sizes("min") in seen[name]
        assert most in seen[name]
    assert {"s": 1, "p": 512, "n": 1} in seen["llm"]


def test_every_graph_equals_its_reference_tensors(bundle: EngineBundle) -> None:
    report = verify_bundle(bundle)
    report.require()
    assert tuple(result.graph for result in report.graphs) == GRAPHS
    assert format_table(report.graphs).count(" ok") == 3
    assert [pipeline.same_tokens for pipeline in report.pipelines] == [16, 16]
    assert [pipeline.same_cells for pipeline in report.pipelines] == [3, 3]


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_are_plain_onnx_with_free_dimensions(bundle: EngineBundle, name: str) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(bundle.graph_path(name), load_external_data=False)
    onnx.checker.check_model(str(bundle.graph_path(name)))
    assert {(item.domain, item.version) for item in model.opset_import} == {("", 20)}
    assert model.ir_version == 10
    # Operators that TensorRT's importer refuses or runs on the host.
    assert not {node.op_type for node in model.graph.node} & {
        "NonZero",
        "ScatterND",
        "TopK",
        "Loop",
        "If",
    }
    dims = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.output]
    }
    assert dims == {tensor.name: list(tensor.shape) for tensor in bundle.specs[name].tensors}


def test_nothing_of_this_machine_is_in_the_files(bundle: EngineBundle) -> None:
    here = str(Path(__file__).parents[2]).encode()
    for name in GRAPHS:
        content = bundle.graph_path(name).read_bytes()
        assert here not in content
        assert b"site-packages" not in content


def test_frames_of_one_call_are_scored_as_in_calls_of_their_own(bundle: EngineBundle) -> None:
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(bundle.graph_path("vit_stem"))
    spec = bundle.specs["vit_stem"]
    inputs = sample_inputs(spec, {"F": 3}, bundle.config, seed=5)
    inputs["is_first"] = np.array([True, False, False])
    together = session.run(None, inputs)
    prev = inputs["prev_cells"]
    for i in range(3):
        alone = {
            "pixels": inputs["pixels"][i : i + 1],
            "prev_cells": prev,
            "is_first": inputs["is_first"][i : i + 1],
        }
        outputs = session.run(None, alone)
        for whole, part in zip(together, outputs, strict=True):
            np.testing.assert_allclose(whole[i : i + 1], part, atol=1e-5)
        prev = outputs[1]


def test_frames_of_one_trunk_call_do_not_see_each_other(bundle: EngineBundle) -> None:
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(bundle.graph_path("vit_trunk"))
    inputs = sample_inputs(bundle.specs["vit_trunk"], {"F": 3, "G": 12}, bundle.config, seed=5)
    (together,) = session.run(None, inputs)
    num_cells = bundle.config.vision.num_cells
    for frame in range(3):
        mine = inputs["frame_id"] == frame
        (alone,) = session.run(
            None,
            {
                "hidden": inputs["hidden"][frame : frame + 1],
                "cell_idx": inputs["cell_idx"][mine] - frame * num_cells,
                "frame_id": inputs["frame_id"][mine] * 0,
            },
        )
        np.testing.assert_allclose(together[mine], alone, atol=1e-5)


def test_published_sizes_have_specs() -> None:
    specs = graph_specs(molmo2_4b())
    assert specs["vit_stem"].inputs[0].shape == ("F", 729, 588)
    assert specs["vit_trunk"].dims["G"].max == 324
    assert len(specs["llm"].inputs) == 5 + 72
    assert specs["llm"].outputs[0].shape == ("n", 151_936)
    assert specs["llm"].outputs[1].shape == ("s", 8, 128)


@pytest.mark.parametrize("sizes", check_sizes(graph_specs(tiny())["llm"]))
def test_sampled_masks_let_every_token_see_itself(sizes: dict[str, int]) -> None:
    inputs = sample_inputs(graph_specs(tiny())["llm"], sizes, tiny(), seed=0)
    rows = np.arange(sizes["s"])
    assert (inputs["attn_bias"][rows, rows + sizes["p"]] == 0).all()
    assert (inputs["attn_bias"][:, : sizes["p"]] == 0).all()


def test_limits_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_tokens = 0"):
        GraphLimits(max_tokens=0)


def _copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle(), tmp_path / "bundle"))


def _change_weights(folder: Path) -> None:
    """Other weights for the llm, and a manifest that vouches for them."""
    path = folder / "graphs/llm.weights"
    weights = np.fromfile(path, np.float32)
    path.write_bytes((weights * 1.5).tobytes())
    data = json.loads((folder / MANIFEST).read_text())
    data["files"]["graphs/llm.weights"] = sha256_of_file(path)
    (folder / MANIFEST).write_text(json.dumps(data))


def test_other_weights_are_noticed(tmp_path: Path) -> None:
    folder = _copy(tmp_path)
    _change_weights(folder)
    report = verify_bundle(EngineBundle.open(folder))
    assert "DIFFERS" in str(report)
    # The first tensor that differs, not the one that differs most: keys are normed, values not.
    with pytest.raises(ParityError, match="the first is new_v_0 of graph llm"):
        report.require()


def test_another_checkpoint_is_noticed(bundle: EngineBundle, tmp_path: Path) -> None:
    require_source(bundle, open_weights(tiny_checkpoint()), tiny_checkpoint())
    other = Path(shutil.copytree(tiny_checkpoint(), tmp_path / "other"))
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    with pytest.raises(CheckpointError, match=r"config\.json is not the same"):
        require_source(bundle, open_weights(other), other)


def test_verify_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tiny_bundle())]) == 0
    out = capsys.readouterr().out
    assert out.count(" ok\n") == 3
    assert "every graph agrees" in out


def test_verify_fails_on_other_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _copy(tmp_path)
    _change_weights(folder)
    assert main(["verify", str(folder)]) == ParityError.exit_code
    assert "E-PARITY" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["verify", "{tmp}/nothing"], "E-BUNDLE-NOT-FOUND"),
        (["export", "{tmp}/nothing", "-o", "{tmp}/out"], "E-CHECKPOINT"),
        (["export", "{checkpoint}", "-o", "{bundle}"], "E-BUNDLE"),
        (["export", "{checkpoint}", "-o", "{tmp}/out", "--default", "fps"], "E-CONFIG"),
        (["export", "{checkpoint}", "-o", "{tmp}/out", "--default", "keep=1"], "E-CONFIG"),
        (["export", "{checkpoint}", "-o", "{tmp}/out", "--max-tokens", "0"], "E-CONFIG"),
    ],
)
def test_bad_arguments_are_one_clear_line(
    arguments: list[str], code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"tmp": tmp_path, "checkpoint": tiny_checkpoint(), "bundle": tiny_bundle()}
    assert main([text.format(**names) for text in arguments]) != 0
    err = capsys.readouterr().err
    assert f"edge-vlm: {code}: " in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_fixed_dimension_in_the_file_is_noticed(bundle: EngineBundle, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from edge_vlm_export.trace.graph_files import check_graph

    spec = bundle.specs["vit_trunk"]
    check_graph(bundle.graph_path("vit_trunk"), spec)
    model = onnx.load(bundle.graph_path("vit_trunk"), load_external_data=False)
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 11
    onnx.save(model, tmp_path / "fixed.onnx")
    with pytest.raises(Specialised, match=r"cell_idx .* has shape \[11\]"):
        check_graph(tmp_path / "fixed.onnx", spec)


def test_a_module_that_fixes_a_dimension_is_a_typed_error() -> None:
    import torch

    from edge_vlm.formats.graph_spec import DynamicDim, GraphSpec, TensorSpec
    from edge_vlm_export.trace.trace import trace

    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(7, 4) * 2

    tensors = [TensorSpec(name=name, dtype="float32", shape=("s", 4)) for name in ("x", "y")]
    spec = GraphSpec(
        name="fixed",
        inputs=(tensors[0],),
        outputs=(tensors[1],),
        dims={"s": DynamicDim(min=1, opt=2, max=9)},
    )
    with pytest.raises(ExportError):
        trace(Fixed(), spec, lambda name: torch.zeros(()))
