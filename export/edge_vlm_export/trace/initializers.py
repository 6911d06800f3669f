"""Constants of a graph: made lazily, shared by name, dropped when unused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from edge_vlm.errors.export import RangeFp16
from edge_vlm_export.trace.trace import lazy

Read = Callable[[], np.ndarray]


def initializer(
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


def initializer_as(graph: ir.Graph, value: ir.Value, kind: ir.DataType) -> ir.Value:
    old = value.const_value
    assert old is not None and value.shape is not None

    def read() -> np.ndarray:
        numbers = old.numpy()
        largest = float(np.abs(numbers).max(initial=0))
        if largest > float(np.finfo(kind.numpy()).max):
            raise RangeFp16(
                f"weight {value.name} reaches {largest:.0f}, which float16 cannot hold",
                remedy="export with base=float32",
            )
        return numbers.astype(kind.numpy())

    return initializer(
        graph,
        f"{value.name}.{kind.name.lower()}",
        tuple(int(size) for size in value.shape.numpy()),
        read,
        kind,
    )


def drop_unused(graph: ir.Graph, value: ir.Value) -> None:
    if not value.uses():
        del graph.initializers[str(value.name)]
