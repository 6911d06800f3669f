"""Whether a graph keeps to what TensorRT 10.3 (JetPack 6) can import, told without TensorRT.

The parser of 10.3 cannot be run outside NVIDIA's own packages, so this reads a graph against lists
made from onnx-tensorrt's documents: docs/operators.md at 8.4 and 10.15, docs/Changelog.md up to
10.6. A graph that passes may still fail to build; one that fails here will fail there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_OPSET = 20
MAX_IR = 10
INT4_OPSET = 21
"""ONNX has int4 only from here on. The changelog says 10.0 added it, not up to which opset."""

# "Y" in operators.md of 8.4, those that a transformer can use: support was never withdrawn.
NAMES_8_4 = """
    Abs Add And ArgMax ArgMin Cast Ceil Clip Concat Constant ConstantOfShape Conv Cos CumSum
    DequantizeLinear Div Einsum Equal Erf Exp Expand Flatten Floor Gather GatherElements GatherND
    Gemm Greater GreaterOrEqual Identity InstanceNormalization IsNaN Less LessOrEqual Log
    LogSoftmax Loop MatMul Max Mean Min Mul Neg Not Or Pad Pow QuantizeLinear Range ReduceL2
    ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Round
    ScatterElements ScatterND Shape Sigmoid Sign Sin Size Slice Softmax Softplus Split Sqrt Squeeze
    Sub Sum Tanh Tile TopK Transpose Unsqueeze Where
    """
SINCE_8_4 = frozenset(NAMES_8_4.split())
# From the changelog, with the release that added each.
ADDED = {
    "Mod": "8.5",
    "Trilu": "8.5",
    "GroupNormalization": "8.6",
    "IsInf": "8.6",
    "LayerNormalization": "8.6",
}
# In operators.md of 10.15, in neither older document: likely, but not shown for 10.3.
UNCONFIRMED = {
    "Gelu": "10.3's Python names have the activations GELU_ERF and GELU_TANH",
    "Reciprocal": '"N" at 8.4, "Y" at 10.15, no entry in the changelog',
}
# ONNX tensor types (TensorProto.DataType) that strongly typed networks of 10.3 hold.
TYPES = {1: "FLOAT", 2: "UINT8", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "FLOAT16"}
INT4 = 22
TYPES |= {16: "BFLOAT16", 17: "FLOAT8E4M3FN", INT4: "INT4"}
CONSTANT_INPUTS = {"ReduceMax": 1, "ReduceMean": 1, "ReduceMin": 1, "ReduceProd": 1, "ReduceSum": 1}
CONSTANT_INPUTS |= {"Squeeze": 1, "Unsqueeze": 1, "CumSum": 1}
"""Operators and the input that must be an initialiser or a Constant."""


@dataclass(frozen=True)
class Report:
    problems: tuple[str, ...]
    doubts: tuple[str, ...]
    """What it uses that is likely, but not shown for 10.3: operators of UNCONFIRMED, opset 21."""


def lint(model: Any) -> Report:
    """Reads an `onnx.ModelProto`; its weights need not be loaded."""
    problems = []
    doubts: dict[str, None] = {}
    holds_int4 = any(tensor.data_type == INT4 for tensor in model.graph.initializer)
    if model.ir_version > MAX_IR:
        problems.append(f"IR version {model.ir_version}, at most {MAX_IR}")
    for opset in model.opset_import:
        if opset.domain not in ("", "ai.onnx"):
            problems.append(f"operator domain {opset.domain!r}")
        elif opset.version == INT4_OPSET and holds_int4:
            doubts[f"opset {INT4_OPSET}"] = None
        elif opset.version > MAX_OPSET:
            problems.append(f"opset {opset.version}, at most {MAX_OPSET}")
    if len(model.functions):
        problems.append(f"{len(model.functions)} functions")
    problems += [
        f"initialiser {tensor.name} has type {tensor.data_type}"
        for tensor in model.graph.initializer
        if tensor.data_type not in TYPES
    ]
    constants = {tensor.name for tensor in model.graph.initializer}
    constants |= {
        name for node in model.graph.node if node.op_type == "Constant" for name in node.output
    }
    for node in _all_nodes(model.graph):
        if node.op_type in UNCONFIRMED:
            doubts[node.op_type] = None
        problems += _node_problems(node, constants)
    return Report(problems=tuple(problems), doubts=tuple(doubts))


def _all_nodes(graph: Any) -> Iterator[Any]:
    """Those of loops' bodies too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _all_nodes(attribute.g)


def _node_problems(node: Any, constants: set[str]) -> Iterator[str]:
    at = f"{node.op_type} {node.name}"
    if node.domain not in ("", "ai.onnx"):
        yield f"{at}: domain {node.domain!r}"
        return
    if node.op_type not in SINCE_8_4 | ADDED.keys() | UNCONFIRMED.keys():
        yield f"{at}: not on the list of operators"
    position = CONSTANT_INPUTS.get(node.op_type)
    if position is not None and len(node.input) > position and node.input[position]:
        name = node.input[position]
        if name not in constants:
            yield f"{at}: input {name} must be constant"
    if node.op_type == "LayerNormalization" and sum(map(bool, node.output)) > 1:
        yield f"{at}: only the first output is supported"
