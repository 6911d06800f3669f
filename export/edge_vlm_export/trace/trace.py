"""A torch module becomes an ONNX graph whose weights are still elsewhere.

The module is traced with hollow parameters, one number spread over each shape, so that tracing a
model of any size takes no memory for weights. In the traced graph each weight is an initializer of
the checkpoint's own name, to be read when the graph is written.

All products with weights are brought to one form, `MatMul(x, W) [+ b]` with W [inputs, outputs],
and every node is named after the module it comes from: `llm.blocks.0.attn.q/MatMul_3`.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn

import edge_vlm
from edge_vlm.config import ModelConfig
from edge_vlm.errors.export import ExportError, Specialised
from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm.model.hollow import hollow
from edge_vlm.model.video_lm import VideoLM

OPSET = 20
"""The newest that TensorRT 10.3, the oldest engine builder we serve, reads."""
IR_VERSION = 10

# Sizes seen while tracing: different from each other and never 0 or 1, which torch.export would
# take for constants.
TRACE_SIZES = {"F": 3, "G": 11, "M": 6, "I": 5, "T": 17, "s": 7, "p": 13, "n": 2, "C": 29}
_DTYPES = {"float32": torch.float32, "int32": torch.int32, "bool": torch.bool}

GetWeight = Callable[[str], Tensor]


def hollow_model(cfg: ModelConfig) -> VideoLM:
    """A model without memory for its parameters: each is one number, seen through its shape.

    The numbers differ, and none is 0 or 1, so that no optimisation takes two parameters for one or
    leaves a sum out.
    """
    model = hollow(cfg)
    number = 3.0
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            number += 1 / 1024
            filled = torch.tensor(number).expand(parameter.shape)
            setattr(module, name, nn.Parameter(filled, requires_grad=False))
    return model.eval()


def trace(module: nn.Module, spec: GraphSpec, weight: GetWeight) -> ir.Model:
    """The graph of `module`, its weights read by `weight` (checkpoint name -> tensor) when written.

    Raises ExportError, Specialised.
    """
    # Traced in float32 whatever the spec's precision: formats are chosen node by node afterwards.
    args = tuple(
        torch.zeros(t.resolve(TRACE_SIZES), dtype=_DTYPES.get(t.dtype, torch.float32))
        for t in spec.inputs
    )
    # A dimension of one allowed size is traced as free too: engine builders see a range of one.
    free = [
        {i: torch.export.Dim.DYNAMIC for i, axis in enumerate(t.shape) if isinstance(axis, str)}
        for t in spec.inputs
    ]
    # What is kept of each block is taken as *args, which torch.export wants as one nested entry.
    named = len([t for t in spec.inputs if not t.name.startswith(("past_", "kept_"))])
    dynamic_shapes = (*free[:named], tuple(free[named:])) if free[named:] else tuple(free)
    try:
        model = _capture(module, spec, args, dynamic_shapes)
    except Exception as error:  # torch.export and the ONNX translator raise dozens of types
        raise ExportError(f"torch cannot export graph {spec.name}: {error}") from error
    plain_products(model.graph)
    name_nodes(model.graph)
    _attach_weights(model.graph, module, weight)
    _name_dimensions(model, spec)
    _forget_notes(model)
    model.graph.name = spec.name
    model.producer_name, model.producer_version = "edge-vlm", edge_vlm.__version__
    return model


def _capture(
    module: nn.Module, spec: GraphSpec, args: tuple[Tensor, ...], dynamic_shapes: tuple[Any, ...]
) -> ir.Model:
    """What torch makes of it, its weights hollow; takes nearly all of an export's time."""
    names = {name for name, _ in module.named_parameters()}
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module,
            args,
            dynamo=True,
            optimize=False,
            dynamic_shapes=dynamic_shapes,
            opset_version=OPSET,
            input_names=[t.name for t in spec.inputs],
            output_names=[t.name for t in spec.outputs],
            verbose=False,
        )
        assert program is not None
        optimizer.optimize_ir(
            program.model,
            # Nothing may be computed from a hollow weight.
            should_fold=lambda node: (
                False if any(x is not None and x.name in names for x in node.inputs) else None
            ),
        )
    return program.model


def plain_products(graph: ir.Graph) -> None:
    """`x @ transpose(W)` and `Gemm(x, W, b)` become `MatMul(x, W)` and `Add`, W [K, N].

    A transposed initializer keeps its name; its shape says which way round it is.
    """
    for node in list(graph):
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        if weight is None:
            continue
        if node.op_type == "MatMul":
            turned = weight.producer()
            if turned is None or turned.op_type != "Transpose":
                continue
            source = turned.inputs[0]
            if source is not None and source.is_initializer() and len(source.shape or ()) == 2:
                node.replace_input_with(1, _transposed(graph, source))
        elif node.op_type == "Gemm" and weight.is_initializer():
            attributes = {name: attr.value for name, attr in node.attributes.items()}
            assert attributes.get("transA", 0) == 0 and attributes.get("alpha", 1.0) == 1.0
            _gemm_to_matmul(graph, node, weight, bool(attributes.get("transB", 0)))
    for node in list(graph):
        if node.op_type == "Transpose" and not any(output.uses() for output in node.outputs):
            graph.remove(node, safe=True)
    unused = [n for n, value in graph.initializers.items() if not value.uses()]
    for name in unused:
        del graph.initializers[name]


def _gemm_to_matmul(graph: ir.Graph, node: ir.Node, weight: ir.Value, transposed: bool) -> None:
    output, bias = node.outputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    if transposed:
        weight = _transposed(graph, weight)
    product = ir.node("MatMul", [node.inputs[0], weight], name=node.name)
    product.metadata_props.update(node.metadata_props)
    product.outputs[0].type = output.type
    new = [product]
    if bias is not None:
        total = ir.node("Add", [product.outputs[0], bias], name=f"{node.name}_bias")
        total.metadata_props.update(node.metadata_props)
        total.outputs[0].type = output.type
        new.append(total)
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], new, [output], [new[-1].outputs[0]]
    )


def _transposed(graph: ir.Graph, source: ir.Value) -> ir.Value:
    """The initializer itself, turned; a second user finds it turned already."""
    assert source.name is not None and source.const_value is not None
    turned_name = f"{source.name}{_TURNED}"
    if turned_name not in graph.initializers:
        k, n = reversed(source.const_value.shape.numpy())
        tensor = ir.LazyTensor(
            _refuse, dtype=source.const_value.dtype, shape=ir.Shape([k, n]), name=turned_name
        )
        graph.register_initializer(
            ir.Value(
                name=turned_name,
                shape=ir.Shape([k, n]),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
        )
    return graph.initializers[turned_name]


_TURNED = ":turned"


def _refuse() -> ir.TensorProtocol:
    raise AssertionError("a weight was read before it was attached")


def _attach_weights(graph: ir.Graph, module: nn.Module, weight: GetWeight) -> None:
    parameters = {name for name, _ in module.named_parameters()}
    for name, value in list(graph.initializers.items()):
        source = name.removesuffix(_TURNED)
        if source not in parameters:
            continue
        turned, ours = source != name, source.removeprefix("model.")
        assert value.shape is not None
        del graph.initializers[name]
        value.name = ours
        value.const_value = lazy(
            ours,
            value.shape,
            lambda n=ours, t=turned: _read(weight, n, t),  # type: ignore[misc]
        )
        graph.register_initializer(value)


def _read(weight: GetWeight, name: str, turned: bool) -> np.ndarray:
    tensor = weight(name).detach().float()
    return np.ascontiguousarray((tensor.T if turned else tensor).numpy())


def lazy(
    name: str,
    shape: ir.Shape,
    read: Callable[[], np.ndarray],
    dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.LazyTensor:
    """A tensor that exists only while somebody looks at it."""
    return ir.LazyTensor(
        lambda: ir.Tensor(read(), dtype=dtype, name=name), dtype=dtype, shape=shape, name=name
    )


def name_nodes(graph: ir.Graph) -> None:
    """Names each node after its module.

    What torch computes between two modules belongs to the parent of the one it follows.
    """
    modules: dict[ir.Node, str] = {}
    for i, node in enumerate(graph):
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        module = scopes[-2].removeprefix("model.") if len(scopes) > 1 else ""
        if module in ("", "model", "llm", "vit"):
            before = [x.producer() for x in node.inputs if x is not None]
            known = [modules[p] for p in before if p is not None and modules.get(p)]
            module = known[-1] if known else ""
            if module.rpartition(".")[2] in _LEAVES:
                module = module.rpartition(".")[0]
        modules[node] = module
        node.name = f"{module}/{node.op_type}_{i}"


_LEAVES = frozenset(
    [
        "q",
        "k",
        "v",
        "o",
        "fc1",
        "fc2",
        "fc3",
        "gate",
        "up",
        "down",
        "norm1",
        "norm2",
        "q_norm",
        "k_norm",
        "attn_norm",
        "mlp_norm",
        "norm",
    ]
)


def _name_dimensions(model: ir.Model, spec: GraphSpec) -> None:
    """Names the free dimensions as the spec does."""
    values = [*model.graph.inputs, *model.graph.outputs]
    for value, tensor in zip(values, spec.tensors, strict=True):
        assert value.shape is not None
        if len(value.shape) != len(tensor.shape):
            raise Specialised(f"{tensor.name} of graph {spec.name} became {value.shape}")
        pairs = zip(value.shape, tensor.shape, strict=True)
        value.shape = ir.Shape([found if isinstance(found, int) else name for found, name in pairs])


def _forget_notes(model: ir.Model) -> None:
    """Drops the exporter's notes.

    They are stack traces with file paths of this machine: they would make equal models differ.
    """
    outer = {*model.graph.inputs, *model.graph.outputs}
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
            if output not in outer:
                output.shape = None  # in the exporter's own symbols, now without meaning
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences notes of the exporter that ask nothing of the user (no torchvision, pytree)."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
