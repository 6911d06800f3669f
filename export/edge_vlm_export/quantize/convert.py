"""Applies a precision plan to a float32 graph, in place. Weights stay unread until written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edge_vlm.formats.bundle import IMAGE_ENCODER
from edge_vlm.formats.calibrated.precision import PlannedArrays, ProductPlan
from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm.formats.precision import Variant
from edge_vlm_export.quantize.float_casts import set_formats
from edge_vlm_export.quantize.integers import (
    quantize_input,
    quantize_weight,
    smooth,
    smooth_as_planned,
    to_integer_product,
    to_nbits,
)
from edge_vlm_export.quantize.plan import NodePlan


@dataclass(frozen=True)
class Ranges:
    """What calibration saw: largest |x| of tensors, and of the channels of products' inputs."""

    tensors: Mapping[str, float]
    channels: Mapping[str, np.ndarray]
    footage: tuple[str, ...] = ()


@dataclass(frozen=True)
class Calibrated:
    """What `edge-vlm calibrate` decided of products, by module, and the numbers to it."""

    products: Mapping[str, ProductPlan]
    arrays: PlannedArrays


def convert(
    model: ir.Model,
    spec: GraphSpec,
    plan: Sequence[NodePlan],
    ranges: Ranges | None,
    variant: Variant,
    calibrated: Calibrated | None = None,
) -> None:
    """Quantises the products that the plan names and gives every node its float format.

    `calibrated`: whose decisions `plan` follows; its ranges, smoothing and rounded weights are
    taken in place of what `ranges` would give.
    """
    by_name = {entry.node: entry for entry in plan}
    known = dict(ranges.tensors) if ranges is not None else {}
    if any(entry.activations for entry in plan):
        if calibrated is not None:
            # A calibration has seen videos; still pictures were measured by the exporter.
            more = ranges if spec.name == IMAGE_ENCODER else None
            channels = more.channels if more is not None else {}
            known.update(smooth_as_planned(model.graph, by_name, calibrated, channels))
        elif ranges is not None:
            known.update(smooth(model.graph, by_name, ranges.channels))
    given = calibrated.arrays if calibrated is not None else None
    formats = {entry.node: entry.dtype for entry in plan}
    for node in list(model.graph):
        entry = by_name.get(str(node.name))
        if entry is None or entry.weights is None:
            continue
        if entry.activations is not None and variant is Variant.ORT:
            to_integer_product(model, node, known, formats)
            continue
        if entry.activations is not None:
            quantize_input(model.graph, node, known, formats)
        if variant is Variant.ORT and entry.activations is None:
            to_nbits(model, node, entry.weights, formats, given)
        else:
            quantize_weight(model, node, entry.weights, formats, given)
    if "float16" in formats.values() or any(t.dtype == "float16" for t in spec.tensors):
        set_formats(model.graph, spec, formats)
