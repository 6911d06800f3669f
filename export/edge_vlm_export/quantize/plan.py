"""Which format every node of a graph computes in, and why: decided here, applied in `convert`.

float16 is taken where calibration saw no value past half of its range, except for the few places
where its ten bits of precision hurt; weights and activations become integers where the bundle's
`Precision` says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import onnx_ir as ir

from edge_vlm.errors import BundleSchemaError
from edge_vlm.errors.export import RangeFp16
from edge_vlm.formats.bundle import IMAGE_ENCODER, VIT_STEM_REUSE
from edge_vlm.formats.calibrated.precision import KEPT, ProductPlan
from edge_vlm.formats.calibration import FP16_LIMIT
from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm.formats.precision import LLM_PRODUCTS, VIT_PRODUCTS, Precision, block_size
from edge_vlm.json_text import MALFORMED, fault_of, parse_json

SCHEMA_VERSION = 1
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)

MOVEMENT = frozenset(
    [
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Gather",
        "GatherND",
        "ScatterND",
        "Slice",
        "Split",
        "Concat",
        "Expand",
        "Tile",
        "Identity",
    ]
)
"""Operators that move values without changing them: they take the format of what they move."""
IN_PLACE = "GroupQueryAttention"
"""Reads and writes one buffer, which is of its own format."""
PRECISE_OPS = {
    "LayerNormalization": "normalisation",
    "Softmax": "softmax",
    "Log": "logarithm of scores",
}
OUTSIDE = ("vit", "scorer", "vit.patch_embed", "")
"""Modules of the stem besides its blocks."""


@dataclass(frozen=True, kw_only=True)
class NodePlan:
    """One node; `node` is "module/operator_number"."""

    node: str
    op: str
    dtype: str
    """`float32` or `float16`; `as input` for nodes that only move values."""
    weights: str | None = None
    """`int8` (a scale per output) or `int4` (a scale per block of inputs)."""
    activations: str | None = None
    """`int8`: its input is quantised with one scale."""
    max_abs: float | None = None
    """Largest |x| of its inputs and outputs in the calibration footage; None if not measured."""
    reason: str

    @property
    def module(self) -> str:
        return self.node.rpartition("/")[0]


@dataclass(frozen=True, kw_only=True)
class PrecisionPlan:
    """`precision_plan.json`"""

    precision: Precision
    footage: tuple[str, ...]
    """What the ranges were measured on; empty if none were needed."""
    graphs: Mapping[str, tuple[NodePlan, ...]]

    def to_json(self) -> str:
        data = {
            "schema_version": SCHEMA_VERSION,
            "precision": self.precision.to_dict(),
            "fp16_limit": FP16_LIMIT,
            "footage": list(self.footage),
            "graphs": {
                name: [
                    {key: value for key, value in asdict(node).items() if value is not None}
                    for node in nodes
                ]
                for name, nodes in self.graphs.items()
            },
        }
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: object = None) -> PrecisionPlan:
        """Raises BundleSchemaError for anything `to_json` does not write."""
        try:
            data = parse_json(text)
            if data["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema_version {data['schema_version']!r}")
            return cls(
                precision=Precision.from_dict(data["precision"]),
                footage=tuple(data["footage"]),
                graphs={
                    name: tuple(NodePlan(**node) for node in nodes)
                    for name, nodes in data["graphs"].items()
                },
            )
        except MALFORMED as error:
            raise BundleSchemaError(
                f"not a precision plan: {fault_of(error)}", where=where
            ) from error


def plan_graph(
    graph: ir.Graph,
    spec: GraphSpec,
    precision: Precision,
    ranges: Mapping[str, float] | None,
    products: Mapping[str, ProductPlan] | None = None,
) -> tuple[NodePlan, ...]:
    """One entry per node that has to do with floating-point numbers.

    `ranges`: largest |x| by tensor name; a tensor that is not in it was not measured and so is not
    trusted to float16. `products`: what a calibration decided, by module. Raises
    RangeFp16 if a cache tensor, whose format is fixed by the spec, would overflow.
    """
    ranges = ranges or {}
    if precision.cache_format == "float16":
        _require_cache_in_range(spec, ranges)
    rotations = _rotations(graph)
    plans = []
    for node in graph:
        values = [x for x in (*node.inputs, *node.outputs) if x is not None]
        if not any(value.dtype in FLOATS for value in values):
            continue
        seen = _largest(values, ranges)
        dtype, reason = "float32", "precision fp32"
        if node.op_type in MOVEMENT:
            dtype, reason = "as input", "moves values only"
        elif node.op_type == IN_PLACE and precision.cache == "float16":
            _require_in_range(node, ranges)
            dtype, reason = "float16", "adds to a cache of float16"
        elif precision.base == "float16":
            dtype, reason = _half_or_single(node, spec, seen, node in rotations)
        weights, activations, why = _integers(node, precision, ranges, products or {})
        plans.append(
            NodePlan(
                node=str(node.name),
                op=node.op_type,
                dtype=dtype,
                weights=weights,
                activations=activations,
                max_abs=seen,
                reason=reason if why is None else f"{reason}; {why}",
            )
        )
    return tuple(plans)


def _half_or_single(
    node: ir.Node, spec: GraphSpec, seen: float | None, rotation: bool
) -> tuple[str, str]:
    module = str(node.name).rpartition("/")[0]
    leaf = module.rpartition(".")[2]
    if node.op_type in PRECISE_OPS:
        return "float32", PRECISE_OPS[node.op_type]
    if "norm" in leaf:
        return "float32", "normalisation"
    if rotation:
        return "float32", "rotary positions"
    if node.op_type == "Add" and any(user.op_type == "Softmax" for user in node.successors()):
        return "float32", "attention scores"
    if spec.name in ("vit_stem", VIT_STEM_REUSE, IMAGE_ENCODER) and (
        module in OUTSIDE or module.startswith("scorer")
    ):
        return "float32", "patch embedding and scorer"
    if seen is None:
        return "float32", "not measured"
    if seen > FP16_LIMIT:
        return "float32", f"values up to {seen:.0f} are past {FP16_LIMIT:.0f}"
    return "float16", "within range"


def _integers(
    node: ir.Node,
    precision: Precision,
    ranges: Mapping[str, float],
    products: Mapping[str, ProductPlan],
) -> tuple[str | None, str | None, str | None]:
    """Formats of weights and activations, and a remark."""
    if not is_product(node):
        return None, None, None
    module = str(node.name).rpartition("/")[0]
    parent, _, leaf = module.rpartition(".")
    planned = products.get(module)
    source, weight = node.inputs[0], node.inputs[1]
    assert source is not None and weight is not None and weight.shape is not None
    if parent.startswith("vit.blocks.") and leaf in VIT_PRODUCTS and precision.vit == "int8":
        if planned is not None:
            if planned.activations is None:
                return None, None, planned.reason
            return "int8", "int8", f"vision product: {planned.reason}"
        if source.name not in ranges:
            return None, None, "left as it is: its input was not measured"
        return "int8", "int8", "vision product"
    if parent.startswith("llm.blocks.") and leaf in LLM_PRODUCTS and precision.llm != "base":
        num_inputs = weight.shape.numpy()[0]
        return _language(precision.llm, num_inputs, planned, "language product")
    if (parent, leaf) == ("llm", "head") and precision.head != "base":
        return _language(precision.head, weight.shape.numpy()[0], planned, "language head")
    return None, None, None


def _language(
    wanted: str, num_inputs: int, planned: ProductPlan | None, what: str
) -> tuple[str | None, None, str]:
    if wanted != "int4":
        return wanted, None, what
    if block_size(num_inputs) is None:
        return None, None, f"left as it is: {num_inputs} inputs do not divide into blocks"
    if planned is None:
        return wanted, None, what
    return None if planned.weights == KEPT else planned.weights, None, f"{what}: {planned.reason}"


def is_product(node: ir.Node) -> bool:
    """A product with a weight matrix."""
    if node.op_type != "MatMul" or node.inputs[1] is None:
        return False
    weight = node.inputs[1]
    return weight.is_initializer() and weight.shape is not None and len(weight.shape) == 2


def _largest(values: Iterable[ir.Value], ranges: Mapping[str, float]) -> float | None:
    """Of all measurable values; None if one of them was not measured."""
    found = [
        ranges.get(str(value.name))
        for value in values
        if value.dtype in FLOATS and not value.is_initializer()
    ]
    known = [x for x in found if x is not None]
    return max(known) if known and len(known) == len(found) else None


def _rotations(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that turn queries and keys by `cos` and `sin`."""
    turned = {value for value in graph.inputs if value.name in ("cos", "sin")}
    nodes = set()
    for node in graph:
        if not any(value in turned for value in node.inputs):
            continue
        if node.op_type in MOVEMENT and node.op_type != "Concat":
            turned.update(node.outputs)
        elif node.op_type in ("Mul", "Sub", "Add", "Concat"):
            nodes.add(node)
            if node.op_type != "Concat":
                turned.update(node.outputs)
    return nodes


def _require_in_range(node: ir.Node, ranges: Mapping[str, float]) -> None:
    """Queries, mask and result have to be float16 where the cache is, which is in range."""
    names = [str(value.name) for value in (*node.inputs, *node.outputs) if value is not None]
    seen = max((ranges.get(name, 0.0) for name in names), default=0.0)
    if not seen <= FP16_LIMIT:
        raise RangeFp16(
            f"{node.name} reached {seen:.0f} on the footage, float16 is trusted up to "
            f"{FP16_LIMIT:.0f}",
            remedy="export without cache=float16, or with --variant portable",
        )


def _require_cache_in_range(spec: GraphSpec, ranges: Mapping[str, float]) -> None:
    for tensor in spec.outputs:
        seen = ranges.get(tensor.name, 0.0)
        if tensor.dtype == "float16" and not seen <= FP16_LIMIT:
            raise RangeFp16(
                f"{tensor.name} of graph {spec.name} reached {seen:.0f} on the footage, float16 "
                f"is trusted up to {FP16_LIMIT:.0f}",
                remedy="export with base=float32 and without cache=float16",
            )


def exceptions(plans: Mapping[str, Iterable[NodePlan]], precision: Precision) -> list[str]:
    """What does not have the format that was asked for, and why, a line each."""
    lines = []
    for graph, nodes in plans.items():
        for node in nodes:
            wanted = _wanted(node, precision)
            past = precision.base == "float16" and node.dtype == "float32" and _is_past(node)
            if past or (wanted is not None and node.weights != wanted):
                has = node.weights or node.dtype
                lines.append(f"{graph}: {node.node} is {has}: {node.reason}")
    return lines


def _is_past(node: NodePlan) -> bool:
    return node.max_abs is not None and node.max_abs > FP16_LIMIT


def _wanted(node: NodePlan, precision: Precision) -> str | None:
    """The integers that a product's weights were to become."""
    parent, _, leaf = node.module.rpartition(".")
    wanted = "base"
    if node.op != "MatMul":
        return None
    if parent.startswith("vit.blocks.") and leaf in VIT_PRODUCTS:
        wanted = precision.vit
    elif parent.startswith("llm.blocks.") and leaf in LLM_PRODUCTS:
        wanted = precision.llm
    elif node.module == "llm.head":
        wanted = precision.head
    return None if wanted == "base" else wanted
