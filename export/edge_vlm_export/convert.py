"""Applies a precision plan to a float32 graph, in place. Weights stay unread until written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edge_vlm.precision import Variant
from edge_vlm.specs import GraphSpec
from edge_vlm_export.graph_files import INT4_OPSET, ORT_DOMAIN
from edge_vlm_export.plan import FLOATS, NodePlan
from edge_vlm_export.quantize import (
    activation_scale,
    block_size,
    pack_nbits,
    quantize_blocks,
    quantize_outputs,
    smoothing,
)
from edge_vlm_export.trace import lazy

Read = Callable[[], np.ndarray]
NBITS_ACCURACY = 4
"""MatMulNBits may quantise its input to int8 in blocks: that is what makes it fast on CPUs."""


@dataclass(frozen=True)
class Ranges:
    """What calibration saw: largest |x| of tensors, and of the channels of products' inputs."""

    tensors: Mapping[str, float]
    channels: Mapping[str, np.ndarray]
    footage: tuple[str, ...] = ()


def convert(
    model: ir.Model,
    spec: GraphSpec,
    plan: Sequence[NodePlan],
    ranges: Ranges | None,
    variant: Variant,
) -> None:
    """Quantises the products that the plan names and gives every node its float format."""
    by_name = {entry.node: entry for entry in plan}
    known = dict(ranges.tensors) if ranges is not None else {}
    if ranges is not None and any(entry.activations for entry in plan):
        known.update(_smooth(model.graph, by_name, ranges.channels))
    formats = {entry.node: entry.dtype for entry in plan}
    for node in list(model.graph):
        entry = by_name.get(str(node.name))
        if entry is None or entry.weights is None:
            continue
        if entry.activations is not None:
            _quantize_input(model.graph, node, known, formats)
        if variant is Variant.ORT and entry.activations is None:
            _to_nbits(model, node, entry.weights, formats)
        else:
            _quantize_weight(model, node, entry.weights, formats)
    if "float16" in formats.values() or any(t.dtype == "float16" for t in spec.tensors):
        _set_formats(model.graph, spec, formats)


# ---- integers ------------------------------------------------------------------------------------


class _Once:
    """Computes numbers and scales of one weight together and keeps them until both were read."""

    def __init__(self, weight: ir.Value, bits: int, block: int | None) -> None:
        assert weight.const_value is not None
        self._weight, self._bits, self._block = weight.const_value, bits, block
        self._made: dict[str, np.ndarray] = {}

    def read(self, part: str) -> np.ndarray:
        if part not in self._made:
            matrix = self._weight.numpy().astype(np.float32, copy=False)
            numbers, scale = (
                quantize_outputs(matrix)
                if self._block is None
                else quantize_blocks(matrix, self._bits, self._block)
            )
            self._made = {"numbers": numbers, "scale": scale}
        return self._made.pop(part)


def _quantize_weight(model: ir.Model, node: ir.Node, kind: str, formats: dict[str, str]) -> None:
    """`MatMul(x, W)` -> `MatMul(x, DequantizeLinear(numbers, scale))`, standard operators."""
    graph, weight = model.graph, node.inputs[1]
    assert weight is not None and weight.shape is not None and weight.name is not None
    k, n = (int(size) for size in weight.shape.numpy())
    block = block_size(k) if kind == "int4" else None
    once = _Once(weight, 4 if kind == "int4" else 8, block)
    dtype = ir.DataType.INT4 if kind == "int4" else ir.DataType.INT8
    numbers = _initializer(
        graph,
        f"{weight.name}.{kind}",
        (k, n),
        lambda: once.read("numbers").astype(ml_dtypes.int4 if kind == "int4" else np.int8),
        dtype,
    )
    scale_shape = (n,) if block is None else (k // block, n)
    scale = _initializer(graph, f"{weight.name}.scale", scale_shape, lambda: once.read("scale"))
    attributes = {"axis": 1} if block is None else {"axis": 0, "block_size": block}
    restored = ir.node("DequantizeLinear", [numbers, scale], attributes, name=f"{node.name}/weight")
    restored.outputs[0].name = f"{weight.name}.restored"
    restored.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    formats[str(restored.name)] = formats[str(node.name)]
    graph.insert_before(node, restored)
    node.replace_input_with(1, restored.outputs[0])
    if kind == "int4":
        model.opset_imports[""] = max(INT4_OPSET, model.opset_imports[""])
    _drop_unused(graph, weight)


def _to_nbits(model: ir.Model, node: ir.Node, kind: str, formats: dict[str, str]) -> None:
    """`MatMul(x, W)` -> ONNX Runtime's MatMulNBits, with the same numbers as the standard form."""
    graph, weight = model.graph, node.inputs[1]
    assert weight is not None and weight.shape is not None and weight.name is not None
    k, n = (int(size) for size in weight.shape.numpy())
    block = block_size(k)
    if block is None:
        _quantize_weight(model, node, kind, formats)
        return
    bits, groups = (4, k // block) if kind == "int4" else (8, k // block)
    once = _Once(weight, bits, block if kind == "int4" else None)

    def scales() -> np.ndarray:
        scale = once.read("scale")
        rows = scale.T if scale.ndim == 2 else np.repeat(scale[:, None], groups, 1)
        return np.ascontiguousarray(rows)

    packed = _initializer(
        graph,
        f"{weight.name}.{kind}",
        (n, groups, block * bits // 8),
        lambda: pack_nbits(once.read("numbers"), bits, block),
        ir.DataType.UINT8,
    )
    scale = _initializer(graph, f"{weight.name}.scale", (n, groups), scales)
    product = ir.node(
        "MatMulNBits",
        [node.inputs[0], packed, scale],
        {
            "K": k,
            "N": n,
            "bits": bits,
            "block_size": block,
            "accuracy_level": NBITS_ACCURACY,
        },
        domain=ORT_DOMAIN,
        name=node.name,
    )
    product.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model.opset_imports[ORT_DOMAIN] = 1
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [product], [node.outputs[0]], [product.outputs[0]]
    )
    _drop_unused(graph, weight)


def _quantize_input(
    graph: ir.Graph, node: ir.Node, known: Mapping[str, float], formats: dict[str, str]
) -> None:
    """Puts Q/DQ before a product's input; products of one input share them."""
    source = node.inputs[0]
    assert source is not None
    name = f"{source.name}.restored"
    for user in source.consumers():
        if user.op_type == "QuantizeLinear":
            (back,) = user.successors()
            node.replace_input_with(0, back.outputs[0])
            return
    step = np.float32(activation_scale(known[str(source.name)]))
    scales = [
        _initializer(graph, f"{source.name}.{side}", (), lambda: np.array(step))
        for side in ("scale", "back_scale")  # two: their formats may come to differ
    ]
    zero = _initializer(
        graph, f"{source.name}.zero", (), lambda: np.array(0, np.int8), ir.DataType.INT8
    )
    down = ir.node("QuantizeLinear", [source, scales[0], zero], name=f"{node.name}/quantize")
    down.outputs[0].name = f"{source.name}.int8"
    down.outputs[0].type = ir.TensorType(ir.DataType.INT8)
    back = ir.node(
        "DequantizeLinear", [down.outputs[0], scales[1], zero], name=f"{node.name}/input"
    )
    back.outputs[0].name = name
    back.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    formats[str(down.name)] = "as input"
    formats[str(back.name)] = formats[str(node.name)]
    graph.insert_before(node, [down, back])
    node.replace_input_with(0, back.outputs[0])


def _smooth(
    graph: ir.Graph, plan: Mapping[str, NodePlan], channels: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Moves outliers from normed activations into the weights behind; the new ranges of those.

    A norm's scale and shift are divided by what its products' weights are multiplied by, so the
    float graph computes the same.
    """
    changed: dict[str, float] = {}
    for node in graph:
        output = node.outputs[0]
        users = output.consumers()
        products = [user for user in users if _quantizes_input(plan.get(str(user.name)))]
        if (
            node.op_type != "LayerNormalization"
            or str(output.name) not in channels
            or not products
            or len(products) != len(users)
            or output.is_graph_output()
        ):
            continue
        weights = [user.inputs[1] for user in products]
        rows = np.max([np.abs(_numpy(weight)).max(1) for weight in weights], axis=0)
        seen = channels[str(output.name)]
        factor = smoothing(seen, rows)
        for value in node.inputs[1:]:
            _rescale(value, lambda x, f=factor: x / f)  # type: ignore[misc]
        for value in weights:
            _rescale(value, lambda x, f=factor: x * f[:, None])  # type: ignore[misc]
        changed[str(output.name)] = float((seen / factor).max())
    return changed


def _quantizes_input(entry: NodePlan | None) -> bool:
    return entry is not None and entry.activations is not None


def _numpy(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def _rescale(value: ir.Value | None, change: Callable[[np.ndarray], np.ndarray]) -> None:
    assert value is not None and value.const_value is not None and value.shape is not None
    old = value.const_value
    value.const_value = lazy(
        str(value.name), value.shape, lambda: change(old.numpy()).astype(np.float32)
    )


# ---- float formats -------------------------------------------------------------------------------


def _set_formats(graph: ir.Graph, spec: GraphSpec, formats: Mapping[str, str]) -> None:
    """Gives every float tensor the format of the node that makes it, with casts in between."""
    kinds = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}
    fixed = {tensor.name: kinds.get(tensor.dtype) for tensor in spec.tensors}
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def typed(value: ir.Value, kind: ir.DataType, user: ir.Node) -> ir.Value:
        """`value` in another format, made once: before its first user, which comes before all
        others."""
        if value.dtype == kind:
            return value
        if (value, kind) not in casts:
            if value.is_initializer():
                casts[value, kind] = _initializer_as(graph, value, kind)
            else:
                cast = ir.node("Cast", [value], {"to": int(kind)}, name=f"{value.name}/{kind.name}")
                cast.outputs[0].name = f"{value.name}.{kind.name.lower()}"
                cast.outputs[0].type = ir.TensorType(kind)
                graph.insert_before(user, cast)
                casts[value, kind] = cast.outputs[0]
        return casts[value, kind]

    for value in graph.inputs:
        if fixed[str(value.name)] is ir.DataType.FLOAT16:
            value.type = ir.TensorType(ir.DataType.FLOAT16)
    for node in list(graph):
        floats = [
            i for i, value in enumerate(node.inputs) if value is not None and value.dtype in FLOATS
        ]
        wanted = formats.get(str(node.name), "float32")
        if wanted == "as input":
            moved = node.inputs[floats[0]] if floats else None
            kind = moved.dtype if moved is not None else ir.DataType.FLOAT
            assert kind is not None
        else:
            kind = kinds[wanted] if floats else ir.DataType.FLOAT
        for i in floats:
            value = node.inputs[i]
            assert value is not None
            node.replace_input_with(i, typed(value, kind, node))
        for output in node.outputs:
            if output.dtype in FLOATS:
                output.type = ir.TensorType(kind)
    for i, value in enumerate(list(graph.outputs)):
        kind_wanted = fixed[str(value.name)]
        if kind_wanted is not None and value.dtype != kind_wanted:
            _cast_output(graph, i, value, kind_wanted)
    for name in [n for n, v in graph.initializers.items() if not v.uses()]:
        del graph.initializers[name]


def _cast_output(graph: ir.Graph, index: int, value: ir.Value, kind: ir.DataType) -> None:
    name = str(value.name)
    value.name = f"{name}.inner"
    cast = ir.node("Cast", [value], {"to": int(kind)}, name=f"{name}/{kind.name}")
    output = cast.outputs[0]
    output.name, output.type, output.shape = name, ir.TensorType(kind), value.shape
    value.shape = None
    graph.append(cast)
    graph.outputs[index] = output


# ---- initializers --------------------------------------------------------------------------------


def _initializer(
    graph: ir.Graph,
    name: str,
    shape: tuple[int, ...],
    read: Read,
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.Value:
    if name not in graph.initializers:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        value.const_value = lazy(name, ir.Shape(shape), read, dtype)
        graph.register_initializer(value)
    return graph.initializers[name]


def _initializer_as(graph: ir.Graph, value: ir.Value, kind: ir.DataType) -> ir.Value:
    old = value.const_value
    assert old is not None and value.shape is not None
    return _initializer(
        graph,
        f"{value.name}.{kind.name.lower()}",
        tuple(int(size) for size in value.shape.numpy()),
        lambda: old.numpy().astype(kind.numpy()),
        kind,
    )


def _drop_unused(graph: ir.Graph, value: ir.Value) -> None:
    if not value.uses():
        del graph.initializers[str(value.name)]
