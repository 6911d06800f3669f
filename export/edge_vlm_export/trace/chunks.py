"""A loop over chunks of queries in place of every ChunkedAttention node.

Every query of an exact prefill sees keys of all frames, so keys and values of a layer stand before
its first query is looked at, but the queries need not stand there all at once. ONNX's Loop takes
CHUNK of them at a time, so that the scores of a layer are [H, CHUNK, t] and not [H, s, t]. (Scan
would say it more plainly; TensorRT for RTX 1.7 does not import it.) The loop is made when precision
has been decided: to the plan the attention is one node.

Shape letters: s new tokens, p past tokens, t = p + s, H heads, h key-value heads, g = H / h, d head
width, N chunks, c queries of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edge_vlm.memory import QUERIES_AT_ONCE
from edge_vlm.text.masks import MASKED
from edge_vlm_export.graphs.attention import CHUNKED_ATTENTION
from edge_vlm_export.trace.initializers import initializer

CHUNK = QUERIES_AT_ONCE
"""Queries looked at together: the weights of 32 heads over 36,864 tokens are 0.3 GB then. Fewer
would repeat the reading of keys and values more often than it saves."""
DOMAIN, OP = CHUNKED_ATTENTION.split("::")
FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
SIZES = ("num_heads", "kv_num_heads", "head_dim")


def expand_chunks(model: ir.Model, chunk: int = CHUNK) -> None:
    """Replaces the nodes in place; a graph without any stays as it is."""
    graph = model.graph
    nodes = [node for node in graph if (node.domain, node.op_type) == (DOMAIN, OP)]
    if not nodes:
        return
    shared = _Shared(graph, nodes[0], chunk)
    for node in nodes:
        _expand(graph, node, shared)
    del model.opset_imports[DOMAIN]


class _Maker:
    """Adds nodes, each with one output named after it."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.nodes: list[ir.Node] = []
        self._graph, self.prefix = graph, prefix

    def __call__(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        dtype: ir.DataType | None,
        **attributes: Any,
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes, name=f"{self.prefix}/{op}_{len(self.nodes)}")
        (output,) = node.outputs
        output.name = f"{node.name}.out"
        output.type = None if dtype is None else ir.TensorType(dtype)
        self.nodes.append(node)
        return output

    def ints(self, *numbers: int) -> ir.Value:
        """A list of whole numbers."""
        name = f"chunks.{'_'.join(map(str, numbers))}"
        array = np.array(numbers, np.int64)
        return initializer(self._graph, name, array.shape, lambda: array, INT64)

    def number(self, value: float, dtype: ir.DataType) -> ir.Value:
        name = f"chunks.{dtype.name.lower()}.{value:g}"
        return initializer(self._graph, name, (), lambda: np.array(value, dtype.numpy()), dtype)

    def cast(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        if value.dtype == wanted:
            return value
        return self("Cast", [value], wanted, to=int(wanted))


class _Shared:
    """What all layers have in common."""

    def __init__(self, graph: ir.Graph, first: ir.Node, chunk: int) -> None:
        make = _Maker(graph, "chunks")
        rule, past = first.inputs[5], first.inputs[3]
        assert rule is not None and past is not None
        one, zero = make.ints(1), make.ints(0)
        s = make("Shape", [rule], INT64, start=1, end=2)
        self.num_new, self.num_past = s, make("Shape", [past], INT64, start=0, end=1)
        most = make.ints(chunk)
        # As many queries in every chunk as may be, and at least one: s = 65 is 33 and 33, not 64
        # and 64, and a single new token is one chunk of one.
        rounded = make("Sub", [make("Add", [s, most], INT64), one], INT64)
        count = make("Div", [rounded, most], INT64)
        rounded = make("Sub", [make("Add", [s, count], INT64), one], INT64)
        size = make("Div", [rounded, count], INT64)
        end = make("Squeeze", [make("Mul", [count, size], INT64), zero], INT64)
        scalar = [make("Squeeze", [x, zero], INT64) for x in (zero, one)]
        places = make("Range", [scalar[0], end, scalar[1]], INT64)
        last = make("Sub", [s, one], INT64)
        shape = make("Concat", [count, size], INT64, axis=0)
        clamped = make("Min", [places, last], INT64)
        self.rows = make("Reshape", [clamped, shape], INT64, allowzero=1)
        """[N, c]: the queries of each chunk; the last one stands again where there is room."""
        self.count = make("Squeeze", [count, zero], INT64)
        self.go_on = initializer(graph, "chunks.true", (), lambda: np.array(True), BOOL)
        length = make("Squeeze", [s, zero], INT64)
        self.columns = make("Range", [scalar[0], length, scalar[1]], INT64)
        wide = make("Cast", [rule], INT64, to=int(INT64))
        self.first, self.block = (
            make("Squeeze", [make("Slice", [wide, start, stop, zero], INT64), zero], INT64)
            for start, stop in ((zero, one), (one, make.ints(2)))
        )
        graph.insert_before(first, make.nodes)


def _expand(graph: ir.Graph, node: ir.Node, shared: _Shared) -> None:
    q, k, v, past_k, past_v, _ = node.inputs
    (output,) = node.outputs
    kind = output.dtype
    assert kind is not None and q is not None
    make = _Maker(graph, str(node.name))
    columns = [make("Transpose", [x], kind, perm=[1, 2, 0]) for x in (past_k, k)]
    values = [make("Transpose", [x], kind, perm=[1, 0, 2]) for x in (past_v, v)]
    heads, kv_heads, width = (node.attributes[name].as_int() for name in SIZES)
    chunk = _Chunk(_Maker(graph, f"{node.name}/chunk"), kind, (kv_heads, heads // kv_heads, width))
    body = chunk.body(q, columns, values, shared)
    made = make("Loop", [shared.count, None], kind, body=body)
    flat = make("Reshape", [made, make.ints(-1, heads, width)], kind)
    zero = make.ints(0)
    rows = make("Slice", [flat, zero, shared.num_new, zero], kind)
    ir.convenience.replace_nodes_and_values(graph, node, [node], make.nodes, [output], [rows])


class _Chunk:
    """The loop's body: the number of a chunk to what its queries find, [c, H, d]."""

    def __init__(self, make: _Maker, kind: ir.DataType, sizes: tuple[int, int, int]) -> None:
        self._make, self._kind, self._sizes = make, kind, sizes

    def body(
        self,
        q: ir.Value,
        columns: Sequence[ir.Value],
        values: Sequence[ir.Value],
        shared: _Shared,
    ) -> ir.Graph:
        """`columns` and `values` are [h, d, t] and [h, t, d] of the past and of the new tokens.

        Scores are in float32, whatever the rest is in.
        """
        make, kind, (h, g, d) = self._make, self._kind, self._sizes
        number, go_on = (
            ir.Value(name=f"{make.prefix}/{name}", type=ir.TensorType(dtype), shape=ir.Shape([]))
            for name, dtype in (("number", INT64), ("go_on", BOOL))
        )
        rows = make("Gather", [shared.rows, number], INT64, axis=0)
        zero = make.ints(0)
        scaled = make(
            "Mul", [make("Gather", [q, rows], kind, axis=0), make.number(d**-0.5, kind)], kind
        )
        split = make("Reshape", [scaled, make.ints(-1, h, g, d)], kind)
        heads = make("Transpose", [split], kind, perm=[1, 2, 0, 3])
        queries = make("Reshape", [heads, make.ints(h, -1, d)], kind)
        old, new = (make.cast(make("MatMul", [queries, x], kind), FLOAT) for x in columns)
        by_head = make("Concat", [make.ints(h, g, -1), shared.num_new], INT64, axis=0)
        masked = make(
            "Add", [make("Reshape", [new, by_head], FLOAT), self._bias(rows, shared)], FLOAT
        )
        together = make("Concat", [make.ints(h, -1), shared.num_new], INT64, axis=0)
        new = make("Reshape", [masked, together], FLOAT)
        scores = make("Concat", [old, new], FLOAT, axis=-1)
        weights = make.cast(make("Softmax", [scores], FLOAT, axis=-1), kind)
        end, axis = make.ints(np.iinfo(np.int64).max), make.ints(2)
        parts = (
            make("Slice", [weights, zero, shared.num_past, axis], kind),
            make("Slice", [weights, shared.num_past, end, axis], kind),
        )
        seen = [make("MatMul", [part, x], kind) for part, x in zip(parts, values, strict=True)]
        total = make("Reshape", [make("Add", seen, kind), make.ints(h, g, -1, d)], kind)
        turned = make("Transpose", [total], kind, perm=[2, 0, 1, 3])
        out = make("Reshape", [turned, make.ints(-1, h * g, d)], kind)
        out.shape = ir.Shape(["c", h * g, d])
        still = make("Identity", [shared.go_on], BOOL)
        still.shape = ir.Shape([])
        return ir.Graph([number, go_on], [still, out], nodes=make.nodes, name=make.prefix)

    def _bias(self, rows: ir.Value, shared: _Shared) -> ir.Value:
        """[c, s]: 0 where a query may look among the new tokens, MASKED elsewhere."""
        make, one = self._make, self._make.ints(1)
        place = make("Unsqueeze", [rows, one], INT64)
        first, block = (
            make("Unsqueeze", [make("Gather", [x, rows], x.dtype, axis=0), one], x.dtype)
            for x in (shared.first, shared.block)
        )
        before = make("LessOrEqual", [shared.columns, place], BOOL)
        after = make("GreaterOrEqual", [shared.columns, first], BOOL)
        same = make("Equal", [block, shared.block], BOOL)
        is_block = make("GreaterOrEqual", [block, make.number(0, INT64)], BOOL)
        visible = make(
            "Or",
            [make("And", [before, after], BOOL), make("And", [same, is_block], BOOL)],
            BOOL,
        )
        shown, hidden = make.number(0.0, FLOAT), make.number(MASKED, FLOAT)
        return make("Where", [visible, shown, hidden], FLOAT)
