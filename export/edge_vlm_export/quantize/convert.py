"""Applies a precision plan to a float32 graph, in place. Weights stay unread until written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm.formats.precision import Variant
from edge_vlm_export.quantize.float_formats import set_formats
from edge_vlm_export.quantize.integers import quantize_input, quantize_weight, smooth, to_nbits
from edge_vlm_export.quantize.plan import NodePlan


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
        known.update(smooth(model.graph, by_name, ranges.channels))
    formats = {entry.node: entry.dtype for entry in plan}
    for node in list(model.graph):
        entry = by_name.get(str(node.name))
        if entry is None or entry.weights is None:
            continue
        if entry.activations is not None:
            quantize_input(model.graph, node, known, formats)
        if variant is Variant.ORT and entry.activations is None:
            to_nbits(model, node, entry.weights, formats)
        else:
            quantize_weight(model, node, entry.weights, formats)
    if "float16" in formats.values() or any(t.dtype == "float16" for t in spec.tensors):
        set_formats(model.graph, spec, formats)
