"""Small ONNX models written out by hand: what measures a runtime has to run in it.

The libraries that write such files are hundreds of megabytes that a device does not need. Protocol
buffers of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto, by field number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

IR_VERSION, OPSET = 9, 17
FLOAT = 1
"""TensorProto.FLOAT."""
INTS = 7
"""AttributeProto.INTS."""
INPUT, OUTPUT = "x", "y"


@dataclass(frozen=True)
class Node:
    op: str
    inputs: Sequence[str]
    output: str
    perm: Sequence[int] = ()
    """Attribute of Transpose."""


def chain(ops: Sequence[tuple[str, np.ndarray | None]], shape: Sequence[int | str]) -> bytes:
    """A model that applies `ops` one behind the other to `x` f32 `shape` and gives `y`: each an
    operator and its second argument, a constant f32 or None for none."""
    nodes, constants = [], {}
    last = INPUT
    for index, (op, constant) in enumerate(ops):
        output = OUTPUT if index == len(ops) - 1 else f"t{index}"
        inputs = [last]
        if constant is not None:
            name = f"c{index}"
            constants[name] = constant
            inputs.append(name)
        nodes.append(Node(op, inputs, output))
        last = output
    return model(nodes, constants, shape)


def model(
    nodes: Sequence[Node], constants: Mapping[str, np.ndarray], shape: Sequence[int | str]
) -> bytes:
    graph = b"".join(_field(1, _node(node)) for node in nodes) + _field(2, b"probe")
    graph += b"".join(_field(5, _tensor(name, value)) for name, value in constants.items())
    sizes = [f"size{axis}" for axis in range(len(shape))]
    graph += _field(11, _value(INPUT, shape)) + _field(12, _value(OUTPUT, sizes))
    opset = _field(8, _field(1, b"") + _number(2, OPSET))
    return _number(1, IR_VERSION) + _field(7, graph) + opset


def _node(node: Node) -> bytes:
    names = b"".join(_field(1, name.encode()) for name in node.inputs)
    data = names + _field(2, node.output.encode()) + _field(4, node.op.encode())
    if node.perm:
        numbers = b"".join(_number(8, axis) for axis in node.perm)
        data += _field(5, _field(1, b"perm") + numbers + _number(20, INTS))
    return data


def _tensor(name: str, value: np.ndarray) -> bytes:
    dims = b"".join(_number(1, size) for size in value.shape)
    data = np.ascontiguousarray(value, "<f4").tobytes()
    return dims + _number(2, FLOAT) + _field(8, name.encode()) + _field(9, data)


def _value(name: str, shape: Sequence[int | str]) -> bytes:
    dims = b"".join(
        _field(1, _number(1, size) if isinstance(size, int) else _field(2, size.encode()))
        for size in shape
    )
    kind = _number(1, FLOAT) + _field(2, dims)
    return _field(1, name.encode()) + _field(2, _field(1, kind))


def _field(number: int, data: bytes) -> bytes:
    """Length-delimited."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
