"""Gives every float tensor of a graph its format, with casts in between."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm_export.quantize.plan import FLOATS
from edge_vlm_export.trace.initializers import initializer_as


def set_formats(graph: ir.Graph, spec: GraphSpec, formats: Mapping[str, str]) -> None:
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
                casts[value, kind] = initializer_as(graph, value, kind)
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
            source = node.inputs[i]
            assert source is not None
            node.replace_input_with(i, typed(source, kind, node))
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
    cast = ir.node("Cast", [value], {"to": int(kind)}, name=f"{name}/output")
    output = cast.outputs[0]
    output.name, output.type, output.shape = name, ir.TensorType(kind), value.shape
    value.shape = None
    graph.append(cast)
    graph.outputs[index] = output
