"""Exported graphs keep to what TensorRT 10.3 can import; graphs that do not are told apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from tests.export.trt_lint import UNCONFIRMED, lint
from tests.published_folder import image_bundle
from tests.tiny import tiny_bundle, tiny_variant


def _model(*nodes: onnx.NodeProto, opset: int = 20, ir: int = 10) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    domains = {node.domain for node in nodes} - {""}
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    graph = helper.make_graph(list(nodes), "g", [x], [y])
    return helper.make_model(graph, opset_imports=imports, ir_version=ir)


@pytest.mark.parametrize(
    ("folder", "graph"),
    [
        (tiny_bundle, "vit_stem"),
        (tiny_bundle, "vit_trunk"),
        (tiny_bundle, "llm"),
        (lambda: tiny_variant("both"), "llm_decode"),
        (image_bundle, "image_encoder"),
        (image_bundle, "llm"),
    ],
)
def test_portable_graphs_pass(folder: Callable[[], Path], graph: str) -> None:
    path = folder() / "graphs" / f"{graph}.onnx"
    report = lint(onnx.load(path, load_external_data=False))
    assert report.problems == ()
    # Said in docs/tensorrt.md as not shown for 10.3; whoever adds another must say so there.
    assert set(report.doubts) <= {"Gelu", "Reciprocal"} == UNCONFIRMED.keys()


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (_model(helper.make_node("NonZero", ["x"], ["y"])), "NonZero : not on the list"),
        (_model(helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "s", "z"])), "not on the"),
        (_model(helper.make_node("Attention", ["x", "x", "x"], ["y"])), "not on the list"),
        (
            _model(helper.make_node("MatMulNBits", ["x"], ["y"], domain="com.microsoft")),
            "operator domain 'com.microsoft'",
        ),
        (_model(helper.make_node("Relu", ["x"], ["y"]), opset=21), "opset 21, at most 20"),
        (_model(helper.make_node("Relu", ["x"], ["y"]), ir=11), "IR version 11, at most 10"),
        (
            _model(
                helper.make_node("Shape", ["x"], ["axes"]),
                helper.make_node("ReduceMean", ["x", "axes"], ["y"]),
            ),
            "input axes must be constant",
        ),
        (
            _model(helper.make_node("LayerNormalization", ["x", "x", "x"], ["y", "mean"])),
            "only the first output",
        ),
    ],
)
def test_what_it_cannot_import_is_named(model: onnx.ModelProto, problem: str) -> None:
    assert any(problem in line for line in lint(model).problems), lint(model).problems


def test_a_wrong_type_is_named() -> None:
    model = _model(helper.make_node("Relu", ["x"], ["y"]))
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.DOUBLE, [1], [1.0]))
    assert lint(model).problems == ("initialiser w has type 11",)


def test_int4_weights_may_use_the_opset_that_has_them() -> None:
    model = _model(helper.make_node("Relu", ["x"], ["y"]), opset=21)
    weights = helper.make_tensor("w", TensorProto.INT4, [2], [1, -2])
    model.graph.initializer.append(weights)
    assert (lint(model).problems, lint(model).doubts) == ((), ("opset 21",))
