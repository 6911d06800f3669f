"""Where float16 is taken and where not, decided by what calibration saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edge_vlm.errors import BundleSchemaError
from edge_vlm.errors.export import RangeFp16
from edge_vlm.formats.calibration import FP16_LIMIT
from edge_vlm.formats.precision import FP32, PRESETS, Precision, Variant
from edge_vlm.presets import tiny
from edge_vlm_export.graphs.graphs import graph_specs
from edge_vlm_export.quantize.convert import Ranges, convert
from edge_vlm_export.quantize.plan import MOVEMENT, NodePlan, PrecisionPlan, plan_graph
from edge_vlm_export.trace.graph_files import load_graph, save_graph
from edge_vlm_export.verify.check_inputs import sample_inputs
from edge_vlm_export.verify.ort_runner import OrtRunner
from tests.tiny import tiny_bundle, tiny_config

HALF = Precision(base="float16")


def _trunk() -> tuple[ir.Model, dict[str, float]]:
    """The exported float32 graph, and ranges that are all small."""
    model = load_graph(tiny_bundle() / "graphs" / "vit_trunk.onnx")
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    return model, {str(value.name): 1.0 for value in values}


def _by_module(plan: tuple[NodePlan, ...], op: str) -> dict[str, NodePlan]:
    return {entry.module: entry for entry in plan if entry.op == op}


def test_small_values_are_float16_but_for_the_precise_places() -> None:
    model, ranges = _trunk()
    plan = plan_graph(model.graph, graph_specs(tiny())["vit_trunk"], HALF, ranges)
    assert _by_module(plan, "MatMul")["vit.blocks.3.fc1"].dtype == "float16"
    assert {entry.dtype for entry in plan if entry.op == "Softmax"} == {"float32"}
    assert {entry.dtype for entry in plan if entry.op == "LayerNormalization"} == {"float32"}


def test_a_large_value_makes_an_island_around_it() -> None:
    model, ranges = _trunk()
    product = next(n for n in model.graph if n.name and "blocks.4.fc2/MatMul" in n.name)
    ranges[str(product.outputs[0].name)] = FP16_LIMIT + 1
    plan = plan_graph(model.graph, graph_specs(tiny())["vit_trunk"], HALF, ranges)
    island = _by_module(plan, "MatMul")["vit.blocks.4.fc2"]
    assert (island.dtype, island.max_abs) == ("float32", FP16_LIMIT + 1)
    assert "32753" in island.reason
    assert _by_module(plan, "Add")["vit.blocks.4.fc2"].dtype == "float32"  # its consumer
    assert _by_module(plan, "MatMul")["vit.blocks.4.fc1"].dtype == "float16"


def test_what_was_not_measured_is_not_trusted() -> None:
    model, ranges = _trunk()
    product = next(n for n in model.graph if n.name and "blocks.3.fc1/MatMul" in n.name)
    del ranges[str(product.outputs[0].name)]
    plan = plan_graph(model.graph, graph_specs(tiny())["vit_trunk"], HALF, ranges)
    entry = _by_module(plan, "MatMul")["vit.blocks.3.fc1"]
    assert (entry.dtype, entry.reason) == ("float32", "not measured")


@pytest.mark.parametrize("precision", [HALF, Precision(cache="float16")])
def test_a_cache_that_would_overflow_is_an_error(precision: Precision) -> None:
    model = load_graph(tiny_bundle() / "graphs" / "llm.onnx")
    spec = graph_specs(tiny_config(), precision=precision)["llm"]
    with pytest.raises(RangeFp16, match="new_k_1 of graph llm reached 40000"):
        plan_graph(model.graph, spec, precision, {"new_k_1": 40_000.0})


def _with_large_residual(model: ir.Model, ranges: dict[str, float], size: float) -> ir.Model:
    """Two blocks that each add `size` to one channel; `ranges` as a measurement would have them."""
    for block in (3, 4):
        bias = model.graph.initializers[f"vit.blocks.{block}.fc2.bias"]
        assert bias.const_value is not None
        changed = bias.const_value.numpy().copy()
        changed[0] = size
        bias.const_value = ir.Tensor(changed, name=bias.name)
    large = {
        output
        for node in model.graph
        if str(node.name).startswith(("vit.blocks.3.fc2/Add", "vit.blocks.4.fc2/Add"))
        for output in node.outputs
    }
    for node in model.graph:
        carries = node.op_type in MOVEMENT or node.op_type == "Add"
        if carries and any(x in large for x in node.inputs):
            large |= set(node.outputs)
    ranges |= {str(value.name): 2 * size for value in large}
    return model


def test_an_island_keeps_values_that_float16_cannot_hold(tmp_path: Path) -> None:
    spec = graph_specs(tiny_config(), precision=HALF)["vit_trunk"]
    inputs = sample_inputs(spec, {"F": 1, "G": 4}, tiny_config(), seed=1)

    def features(name: str, known: bool) -> np.ndarray:
        model, ranges = _trunk()
        seen = dict(ranges)
        _with_large_residual(model, seen if known else {}, 60_000.0)
        plan = plan_graph(model.graph, spec, HALF, seen)
        convert(model, spec, plan, Ranges(seen, {}), Variant.PORTABLE)
        save_graph(model, tmp_path / f"{name}.onnx")
        runner = OrtRunner(tmp_path / f"{name}.onnx", spec, as_written=True)
        return runner.run(inputs)["features"]

    assert not np.isfinite(features("without", known=False)).all()
    assert np.isfinite(features("with", known=True)).all()


def test_a_weight_that_float16_cannot_hold_is_an_error(tmp_path: Path) -> None:
    model, ranges = _trunk()
    _with_large_residual(model, {}, 90_000.0)
    spec = graph_specs(tiny_config(), precision=HALF)["vit_trunk"]
    plan = plan_graph(model.graph, spec, HALF, ranges)
    convert(model, spec, plan, Ranges(ranges, {}), Variant.PORTABLE)
    with pytest.raises(RangeFp16, match=r"vit\.blocks\.3\.fc2\.bias reaches 90000"):
        save_graph(model, tmp_path / "huge.onnx")


def test_a_plan_survives_its_file() -> None:
    model, ranges = _trunk()
    nodes = plan_graph(model.graph, graph_specs(tiny())["vit_trunk"], HALF, ranges)
    plan = PrecisionPlan(precision=HALF, footage=("a.mp4",), graphs={"vit_trunk": nodes})
    assert PrecisionPlan.from_json(plan.to_json()) == plan
    for text in ("", "{}", plan.to_json().replace('"schema_version": 1', '"schema_version": 2')):
        with pytest.raises(BundleSchemaError):
            PrecisionPlan.from_json(text)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_names(name: str) -> None:
    assert Precision.parse(name).label == name


def test_other_precisions_are_spelled_out() -> None:
    precision = Precision.parse("llm=int4,base=float16")
    assert precision == Precision(base="float16", llm="int4")
    assert Precision.parse(precision.label) == precision
    assert Precision.from_dict(precision.to_dict()) == precision
    assert Precision.parse("fp32") == FP32


def test_a_preset_with_another_cache() -> None:
    precision = Precision.parse("int4,cache=float16")
    assert precision == Precision(llm="int4", head="int8", embed="float16", cache="float16")
    assert precision.label == "int4,cache=float16"
    assert Precision.from_dict(precision.to_dict()) == precision
    assert "cache" not in PRESETS["int4"].to_dict()
    assert Precision.parse("fp16").cache_format == "float16"
    with pytest.raises(ValueError, match="cache=int8: must be one of base, float16"):
        Precision.parse("int4,cache=int8")


@pytest.mark.parametrize(
    "text",
    [
        "fp8",
        "llm=int3",
        "llm",
        "lm=int4",
        "",
        "llm=int4,",
        "int4,",
        "int4,edge",
        "llm=int4,llm=int8",
    ],
)
def test_unknown_precisions_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="precision"):
        Precision.parse(text)
