"""A checkpoint becomes a bundle: graphs, embedding table, tokenizer, reference tensors, manifest.

Each graph is exported by torch.export with every free dimension left free and is then read back
from disk: opset, IR version, tensor names, dtypes and dimensions must be what its GraphSpec says.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from torch import nn

import edge_vlm
from edge_vlm.bundle import TOKENIZER, EngineBundle, sha256_of_file, write_bundle
from edge_vlm.errors import ExportError, Specialised
from edge_vlm.model.checkpoint import load_checkpoint
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.specs import GraphSpec, TensorSpec
from edge_vlm_export.graphs import GraphLimits, graph_specs
from edge_vlm_export.modules import GRAPH_MODULES
from edge_vlm_export.verify import (
    Comparison,
    compare_graph,
    require_parity,
    run_torch,
    sample_inputs,
)

OPSET = 20
"""The newest that TensorRT 10.3, the oldest engine builder we serve, reads."""
IR_VERSION = 10

# Sizes seen while tracing: different from each other and never 0 or 1, which torch.export would
# take for constants.
TRACE_SIZES = {"F": 3, "G": 11, "s": 7, "p": 13, "n": 2}
# Sizes of the reference tensors that travel in the bundle.
REFERENCE_SIZES = {"F": 2, "G": 6, "s": 5, "p": 9, "n": 1}


def export_bundle(
    checkpoint_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    name: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    limits: GraphLimits | None = None,
    overwrite: bool = False,
    on_compared: Callable[[Comparison], None] | None = None,
) -> EngineBundle:
    """Exports a checkpoint folder (config.json, model.safetensors, tokenizer.json).

    Every graph is compared with torch at several sizes, and each result is told to `on_compared`.
    Nothing appears at `out_dir` unless everything agreed. Raises CheckpointError, ExportError and
    its leaves (ParityError), BundleError if `out_dir` is taken.
    """
    checkpoint = Path(checkpoint_dir)
    model = load_checkpoint(checkpoint)
    source = {
        "checkpoint": checkpoint.resolve().name,
        "sha256": {
            path.name: sha256_of_file(path)
            for path in sorted(checkpoint.iterdir())
            if path.name in ("config.json", TOKENIZER) or path.suffix == ".safetensors"
        },
    }
    return export_model(
        model,
        checkpoint / TOKENIZER,
        out_dir,
        name=name or checkpoint.resolve().name,
        defaults=defaults,
        source=source,
        limits=limits,
        overwrite=overwrite,
        on_compared=on_compared,
    )


def export_model(
    model: VideoLM,
    tokenizer: Path,
    out_dir: str | os.PathLike[str],
    *,
    name: str,
    defaults: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
    limits: GraphLimits | None = None,
    overwrite: bool = False,
    on_compared: Callable[[Comparison], None] | None = None,
) -> EngineBundle:
    """Exports a model in memory; see `export_bundle`."""
    if model.scorer is None:
        raise ExportError(
            "the model has no token scorer", remedy="train one first: edge-vlm train --help"
        )
    model = model.float().cpu().eval()
    with write_bundle(out_dir, overwrite=overwrite) as writer:
        for spec in graph_specs(model.cfg, limits).values():
            module = GRAPH_MODULES[spec.name](model).eval()
            path = writer.graph_file(spec)
            export_graph(module, spec, path)
            results = compare_graph(path, spec, model)
            for result in results:
                if on_compared is not None:
                    on_compared(result)
            require_parity(results)
            inputs = sample_inputs(spec, REFERENCE_SIZES, model.cfg, seed=0)
            outputs = run_torch(module, spec, inputs)
            arrays = {f"inputs/{key}": value for key, value in inputs.items()}
            arrays |= {f"outputs/{key}": value for key, value in outputs.items()}
            writer.reference(spec.name, arrays)
        writer.embed_table(model.llm.embed.weight.detach().numpy())
        writer.tokenizer(tokenizer)
        versions = {"edge-vlm": edge_vlm.__version__, "torch": torch.__version__}
        writer.finish(
            name=name,
            config=model.cfg,
            defaults=defaults or {},
            source={**(source or {}), "made_with": {**versions, "onnx": onnx.__version__}},
        )
    return EngineBundle.open(out_dir)


def export_graph(module: nn.Module, spec: GraphSpec, path: Path) -> None:
    """Writes `path` (ONNX) and its tensors beside it. Raises ExportError, Specialised."""
    dtypes = {"float32": torch.float32, "int32": torch.int32, "bool": torch.bool}
    args = tuple(torch.zeros(t.resolve(TRACE_SIZES), dtype=dtypes[t.dtype]) for t in spec.inputs)
    free = [
        {i: torch.export.Dim.DYNAMIC for i, axis in enumerate(t.shape) if isinstance(axis, str)}
        for t in spec.inputs
    ]
    # The llm takes its past as *args, which torch.export wants as one nested entry.
    named = len([t for t in spec.inputs if not t.name.startswith("past_")])
    dynamic_shapes = (*free[:named], tuple(free[named:])) if free[named:] else tuple(free)
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                module,
                args,
                dynamo=True,
                dynamic_shapes=dynamic_shapes,
                opset_version=OPSET,
                input_names=[t.name for t in spec.inputs],
                output_names=[t.name for t in spec.outputs],
                verbose=False,
            )
    except Exception as error:  # torch.export and the ONNX translator raise dozens of types
        raise ExportError(f"torch cannot export graph {spec.name}: {error}") from error
    assert program is not None
    _tidy(program.model, spec)
    onnx_ir.save(program.model, path, external_data=f"{spec.name}.weights")
    check_graph(path, spec)


def _tidy(model: onnx_ir.Model, spec: GraphSpec) -> None:
    """Names the free dimensions as the spec does and drops the exporter's notes.

    The notes are stack traces with file paths of this machine: they would make equal models differ.
    """
    for value, tensor in zip(
        [*model.graph.inputs, *model.graph.outputs], spec.tensors, strict=True
    ):
        assert value.shape is not None
        if len(value.shape) != len(tensor.shape):
            raise Specialised(f"{tensor.name} of graph {spec.name} became {value.shape}")
        for axis, wanted in enumerate(tensor.shape):
            if isinstance(wanted, str) and not isinstance(value.shape[axis], int):
                value.shape[axis] = wanted
    graph_inputs = set(model.graph.inputs) | set(model.graph.outputs)
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
            if output not in graph_inputs:
                output.shape = None  # shapes in the exporter's own symbols, now without meaning
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.name = spec.name
    model.producer_name, model.producer_version = "edge-vlm", edge_vlm.__version__


def check_graph(path: Path, spec: GraphSpec) -> None:
    """Reads the graph back from disk and compares it with its spec.

    Raises Specialised if a free dimension became a constant, ExportError for any other difference.
    """
    model = onnx.load(path, load_external_data=False)
    opsets = {item.domain: item.version for item in model.opset_import}
    if set(opsets) != {""} or opsets[""] > OPSET or model.ir_version > IR_VERSION:
        raise ExportError(
            f"graph {spec.name} needs opsets {opsets} and IR {model.ir_version}, "
            f"allowed are opset {OPSET} of the standard domain and IR {IR_VERSION}"
        )
    initializers = {item.name for item in model.graph.initializer}
    values = [item for item in model.graph.input if item.name not in initializers]
    values += list(model.graph.output)
    names = [value.name for value in values]
    if names != [tensor.name for tensor in spec.tensors]:
        raise ExportError(f"graph {spec.name} has tensors {names}")
    for value, tensor in zip(values, spec.tensors, strict=True):
        _check_value(value, tensor, spec)


def _check_value(value: Any, tensor: TensorSpec, spec: GraphSpec) -> None:
    kind = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    if dtype != tensor.dtype:
        raise ExportError(f"{tensor.name} of graph {spec.name} is {dtype}, not {tensor.dtype}")
    shape = tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
    if shape != tensor.shape:
        raise Specialised(
            f"{tensor.name} of graph {spec.name} has shape {list(shape)}, "
            f"its spec says {list(tensor.shape)}"
        )


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
