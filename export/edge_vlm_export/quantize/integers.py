"""Products whose weights, and perhaps activations, become small integers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edge_vlm.errors import ConfigError
from edge_vlm.formats.calibrated.precision import REMEDY
from edge_vlm.formats.precision import block_size
from edge_vlm_export.quantize.plan import NodePlan
from edge_vlm_export.quantize.rounding import (
    activation_scale,
    pack_nbits,
    quantize_blocks,
    quantize_outputs,
    smoothing,
)
from edge_vlm_export.trace.graph_files import INT4_OPSET, ORT_DOMAIN
from edge_vlm_export.trace.initializers import drop_unused, initializer
from edge_vlm_export.trace.trace import lazy

if TYPE_CHECKING:
    from edge_vlm.formats.calibrated.precision import PlannedArrays
    from edge_vlm_export.quantize.convert import Calibrated

NBITS_ACCURACY = 4
"""MatMulNBits may quantise its input to int8 in blocks: that is what makes it fast on CPUs."""


class _Once:
    """Computes numbers and scales of one weight together and keeps them until both were read.

    `given`: a calibration's rounded weights, which are taken for the `module` where there are any.
    """

    def __init__(
        self,
        weight: ir.Value,
        bits: int,
        block: int | None,
        module: str = "",
        given: PlannedArrays | None = None,
    ) -> None:
        assert weight.const_value is not None
        self._weight, self._bits, self._block = weight.const_value, bits, block
        self._module = module
        self._given = (
            given if bits == 4 and given is not None and given.has_weight(module) else None
        )
        self._made: dict[str, np.ndarray] = {}

    def read(self, part: str) -> np.ndarray:
        if part not in self._made and self._given is not None:
            numbers, scale = self._given.weight(self._module)
            rows, columns = self._weight.shape.numpy()
            blocks = (rows // (self._block or 1), columns)
            if numbers.shape != tuple(self._weight.shape) or scale.shape != blocks:
                raise ConfigError(
                    f"the rounded {self._module} is {numbers.shape} with scales {scale.shape}, the "
                    f"weights are {tuple(self._weight.shape)}",
                    where=self._given.path,
                    remedy=REMEDY,
                )
            self._made = {"numbers": numbers, "scale": scale}
        if part not in self._made:
            matrix = self._weight.numpy().astype(np.float32, copy=False)
            numbers, scale = (
                quantize_outputs(matrix)
                if self._block is None
                else quantize_blocks(matrix, self._bits, self._block)
            )
            self._made = {"numbers": numbers, "scale": scale}
        return self._made.pop(part)


def quantize_weight(
    model: ir.Model,
    node: ir.Node,
    kind: str,
    formats: dict[str, str],
    given: PlannedArrays | None = None,
) -> None:
    """`MatMul(x, W)` -> `MatMul(x, DequantizeLinear(numbers, scale))`, standard operators."""
    graph, weight = model.graph, node.inputs[1]
    assert weight is not None and weight.shape is not None and weight.name is not None
    k, n = (int(size) for size in weight.shape.numpy())
    block = block_size(k) if kind == "int4" else None
    once = _Once(weight, 4 if kind == "int4" else 8, block, _module(node), given)
    dtype = ir.DataType.INT4 if kind == "int4" else ir.DataType.INT8
    numbers = initializer(
        graph,
        f"{weight.name}.{kind}",
        (k, n),
        lambda: once.read("numbers").astype(ml_dtypes.int4 if kind == "int4" else np.int8),
        dtype,
    )
    scale_shape = (n,) if block is None else (k // block, n)
    scale = initializer(graph, f"{weight.name}.scale", scale_shape, lambda: once.read("scale"))
    attributes = {"axis": 1} if block is None else {"axis": 0, "block_size": block}
    restored = ir.node("DequantizeLinear", [numbers, scale], attributes, name=f"{node.name}/weight")
    restored.outputs[0].name = f"{weight.name}.restored"
    restored.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    formats[str(restored.name)] = formats[str(node.name)]
    graph.insert_before(node, restored)
    node.replace_input_with(1, restored.outputs[0])
    if kind == "int4":
        model.opset_imports[""] = max(INT4_OPSET, model.opset_imports[""])
    drop_unused(graph, weight)


def to_nbits(
    model: ir.Model,
    node: ir.Node,
    kind: str,
    formats: dict[str, str],
    given: PlannedArrays | None = None,
) -> None:
    """`MatMul(x, W)` -> ONNX Runtime's MatMulNBits, with the same numbers as the standard form."""
    graph, weight = model.graph, node.inputs[1]
    assert weight is not None and weight.shape is not None and weight.name is not None
    k, n = (int(size) for size in weight.shape.numpy())
    block = block_size(k)
    if block is None:
        quantize_weight(model, node, kind, formats, given)
        return
    bits, groups = (4, k // block) if kind == "int4" else (8, k // block)
    once = _Once(weight, bits, block if kind == "int4" else None, _module(node), given)

    def scales() -> np.ndarray:
        scale = once.read("scale")
        rows = scale.T if scale.ndim == 2 else np.repeat(scale[:, None], groups, 1)
        return np.ascontiguousarray(rows)

    packed = initializer(
        graph,
        f"{weight.name}.{kind}",
        (n, groups, block * bits // 8),
        lambda: pack_nbits(once.read("numbers"), bits, block),
        ir.DataType.UINT8,
    )
    scale = initializer(graph, f"{weight.name}.scale", (n, groups), scales)
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
    drop_unused(graph, weight)


def quantize_input(
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
        initializer(graph, f"{source.name}.{side}", (), lambda: np.array(step))
        for side in ("scale", "back_scale")  # two: their formats may come to differ
    ]
    zero = initializer(
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


def to_integer_product(
    model: ir.Model, node: ir.Node, known: Mapping[str, float], formats: dict[str, str]
) -> None:
    """`MatMul(x, W)` -> ONNX Runtime's MatMulIntegerToFloat, with the numbers of the standard form.

    Of that it makes a Gemm with the bias behind it before it looks for Q/DQ, finds no integer Gemm
    with a float output, and restores the weights in every call: slower than float32. Inputs are
    unsigned around 128, because its signed kernels are slow.
    """
    graph, source, weight = model.graph, node.inputs[0], node.inputs[1]
    assert source is not None and weight is not None and weight.shape is not None
    k, n = (int(size) for size in weight.shape.numpy())
    once = _Once(weight, 8, None)
    numbers = initializer(
        graph, f"{weight.name}.int8", (k, n), lambda: once.read("numbers"), ir.DataType.INT8
    )
    scale = initializer(graph, f"{weight.name}.scale", (n,), lambda: once.read("scale"))
    step = np.float32(activation_scale(known[str(source.name)]))
    input_scale = initializer(graph, f"{source.name}.scale", (), lambda: np.array(step))
    zero = initializer(
        graph, f"{source.name}.zero", (), lambda: np.array(128, np.uint8), ir.DataType.UINT8
    )
    down = next((user for user in source.consumers() if user.op_type == "QuantizeLinear"), None)
    if down is None:
        down = ir.node("QuantizeLinear", [source, input_scale, zero], name=f"{node.name}/quantize")
        down.outputs[0].name = f"{source.name}.uint8"
        down.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
        graph.insert_before(node, down)
    product = ir.node(
        "MatMulIntegerToFloat",
        [down.outputs[0], numbers, input_scale, scale, zero],
        domain=ORT_DOMAIN,
        name=node.name,
    )
    product.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model.opset_imports[ORT_DOMAIN] = 1
    # Its kernels know float32 only, and the scales are shared.
    formats[str(product.name)] = formats[str(down.name)] = "float32"
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [product], [node.outputs[0]], [product.outputs[0]]
    )
    drop_unused(graph, weight)


def smooth_as_planned(
    graph: ir.Graph,
    plan: Mapping[str, NodePlan],
    calibrated: Calibrated,
    channels: Mapping[str, np.ndarray],
) -> dict[str, float]:
    """As `smooth`, by a calibration's factors; the ranges that products' inputs are to have.

    `channels`: what the exporter itself has seen, which may only widen them.
    """
    ranges: dict[str, float] = {}
    for node in graph:
        if not _quantizes_input(plan.get(str(node.name))):
            continue
        source, planned = node.inputs[0], calibrated.products[_module(node)]
        assert source is not None and planned.range is not None
        ranges[str(source.name)] = planned.range
        if str(source.name) in channels:
            factor = _factor(source, calibrated)
            seen = channels[str(source.name)]
            seen = seen if factor is None else seen / factor
            ranges[str(source.name)] = max(planned.range, float(seen.max()))
    for node in graph:
        if node.op_type != "LayerNormalization":
            continue
        output = node.outputs[0]
        factor = _factor(output, calibrated)
        users = output.consumers()
        if factor is None or not users:
            continue
        if output.is_graph_output() or not all(
            _quantizes_input(plan.get(str(user.name))) for user in users
        ):
            raise ConfigError(
                f"{node.name} cannot be smoothed: not all that reads it is int8",
                where=calibrated.arrays.path,
                remedy=REMEDY,
            )
        _fold(node, [user.inputs[1] for user in users], factor)
    return ranges


def _factor(normed: ir.Value, calibrated: Calibrated) -> np.ndarray | None:
    norm = normed.producer()
    return None if norm is None else calibrated.arrays.smoothing(_module(norm))


def _module(node: ir.Node) -> str:
    return str(node.name).rpartition("/")[0]


def smooth(
    graph: ir.Graph, plan: Mapping[str, NodePlan], channels: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Moves outliers from normed activations into the weights after them; the new ranges of those.

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
        _fold(node, weights, factor)
        changed[str(output.name)] = float((seen / factor).max())
    return changed


def _fold(norm: ir.Node, weights: Sequence[ir.Value | None], factor: np.ndarray) -> None:
    for value in norm.inputs[1:]:
        _rescale(value, lambda x: x / factor)
    for value in weights:
        _rescale(value, lambda x: x * factor[:, None])


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
