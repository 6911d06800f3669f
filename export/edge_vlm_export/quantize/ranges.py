"""How large every tensor of the float32 graphs becomes on footage.

The graphs are run as they were traced, with two kinds of outputs added: the largest |x| of every
float tensor, and of every channel of what goes into a product with weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edge_vlm.errors import NonFinite
from edge_vlm.formats.calibration import CalibrationTable
from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm_export.quantize.convert import Ranges
from edge_vlm_export.quantize.plan import FLOATS, is_product
from edge_vlm_export.trace.graph_files import load_graph
from edge_vlm_export.verify.ort_runner import OrtRunner
from edge_vlm_export.verify.pipeline import Arrays, Clip, Pipeline

MAX_PREFIX, CHANNELS_PREFIX = "max:", "channels:"


@dataclass
class Observer:
    """One graph with its added outputs, and what they showed."""

    runner: OrtRunner
    maxima: list[str]
    channels: list[str]
    tensors_seen: dict[str, float] = field(default_factory=dict)
    channels_seen: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, spec: GraphSpec, threads: int) -> Observer:
        """`path` is a graph as `trace` makes it. Writes a file beside it."""
        model = load_graph(path)
        maxima, channels = add_observers(model)
        observed = path.with_name(f"{path.stem}.observed.onnx")
        ir.save(model, observed)
        return cls(OrtRunner(observed, spec, threads=threads), maxima, channels)

    def run(self, inputs: Arrays) -> Arrays:
        """The spec's outputs. Raises NonFinite naming the first tensor that is not finite."""
        out = self.runner.run(inputs, [*self.maxima, *self.channels])
        for name in self.maxima:
            value, tensor = float(out.pop(name)), name.removeprefix(MAX_PREFIX)
            if not np.isfinite(value):
                raise NonFinite(
                    f"{tensor} is not finite on the footage", where=self.runner.spec.name
                )
            self.tensors_seen[tensor] = max(value, self.tensors_seen.get(tensor, 0.0))
        for name in self.channels:
            row, tensor = out.pop(name), name.removeprefix(CHANNELS_PREFIX)
            self.channels_seen[tensor] = np.maximum(row, self.channels_seen.get(tensor, 0.0))
        return out

    def ranges(self, footage: tuple[str, ...]) -> Ranges:
        return Ranges(self.tensors_seen, self.channels_seen, footage)


def measure(
    observers: Mapping[str, Observer],
    pipeline: Pipeline,
    clips: Iterable[Clip],
    footage: tuple[str, ...],
) -> dict[str, Ranges]:
    """Runs `pipeline`, whose graphs are the observers', over the clips."""
    for clip in clips:
        pipeline.stream(clip)
    return {name: observer.ranges(footage) for name, observer in observers.items()}


def add_observers(model: ir.Model) -> tuple[list[str], list[str]]:
    """Adds the outputs, and returns their names."""
    graph = model.graph
    zero = _constant(graph, "observer.zero", np.zeros(1, np.float32))
    flat = _constant(graph, "observer.flat", np.array([-1], np.int64))
    first_axis = _constant(graph, "observer.axis", np.array([0], np.int64))
    products = {node.inputs[0]: node.inputs[1] for node in graph if is_product(node)}
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    maxima, channels = [], []
    for value in [value for value in values if value.dtype in FLOATS]:
        size = ir.node("Abs", [value])
        line = ir.node("Reshape", [size.outputs[0], flat])
        # A past may be empty, and the largest of nothing is minus infinity.
        some = ir.node("Concat", [line.outputs[0], zero], {"axis": 0})
        most = ir.node("ReduceMax", [some.outputs[0]], {"keepdims": 0})
        graph.extend([size, line, some, most])
        maxima.append(_output(graph, f"{MAX_PREFIX}{value.name}", most.outputs[0], ()))
        if value in products:
            weight = products[value]
            assert weight is not None and weight.shape is not None
            k = weight.shape.numpy()[0]
            shape = _constant(graph, f"observer.rows.{k}", np.array([-1, k], np.int64))
            rows = ir.node("Reshape", [size.outputs[0], shape])
            each = ir.node("ReduceMax", [rows.outputs[0], first_axis], {"keepdims": 0})
            graph.extend([rows, each])
            channels.append(_output(graph, f"{CHANNELS_PREFIX}{value.name}", each.outputs[0], (k,)))
    return maxima, channels


def with_table(ranges: Ranges, graph: ir.Graph, table: CalibrationTable) -> Ranges:
    """Adds what `edge-vlm calibrate` saw on its own footage, where module and tensor correspond:
    the inputs and outputs of products with weights."""
    tensors = dict(ranges.tensors)
    for node in graph:
        module = str(node.name).rpartition("/")[0]
        if not is_product(node) or module not in table.input_ranges:
            continue
        for value, seen in (
            (node.inputs[0], table.input_ranges[module]),
            (node.outputs[0], table.output_ranges[module]),
        ):
            assert value is not None
            name = str(value.name)
            if name in tensors:
                tensors[name] = max(tensors[name], seen)
    return Ranges(tensors, ranges.channels, (*ranges.footage, *table.footage))


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    if name not in graph.initializers:
        value = ir.Value(name=name, shape=ir.Shape(array.shape), const_value=ir.Tensor(array))
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        graph.register_initializer(value)
    return graph.initializers[name]


def _output(graph: ir.Graph, name: str, value: ir.Value, shape: tuple[int, ...]) -> str:
    value.name = name
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    graph.outputs.append(value)
    return name
