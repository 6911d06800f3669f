"""Graphs on disk: written weight by weight, and read back to be compared with their contract."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from edge_vlm.errors.export import ExportError, NoSpaceLeft, Specialised
from edge_vlm.formats.graph_spec import GraphSpec, TensorSpec
from edge_vlm.formats.precision import Variant
from edge_vlm_export.trace.trace import IR_VERSION, OPSET

INT4_OPSET = 21
"""The first with 4-bit numbers and with scales per block."""
INLINE_BYTES = 256
"""Tensors of this size or less stay in the graph's own file."""
ALIGNMENT, SMALL_ALIGNMENT = 4096, 64
ORT_DOMAIN = "com.microsoft"

Progress = Callable[[int, int], None]
"""Bytes written and bytes in all."""


def save_graph(
    model: ir.Model,
    path: Path,
    shared: Mapping[str, ir.ExternalTensor] | None = None,
    progress: Progress | None = None,
) -> dict[str, ir.ExternalTensor]:
    """Writes `path` and its tensors beside it in NAME.weights, one at a time, and returns them.

    Initializers named in `shared` are not written again but read from where they lie already. The
    model refers to the written files afterwards. Raises NoSpaceLeft.
    """
    weights = path.with_suffix(".weights")
    shared = shared or {}
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    large = {
        name: tensor
        for name, tensor in tensors.items()
        if tensor is not None and tensor.nbytes > INLINE_BYTES and name not in shared
    }
    total = sum(tensor.nbytes for tensor in large.values())
    written: dict[str, ir.ExternalTensor] = dict(shared)
    try:
        if large:
            with weights.open("wb") as file:
                for name, tensor in large.items():
                    written[name] = _write(file, name, tensor, path.parent)
                    if progress is not None:
                        progress(file.tell(), total)
        for name, value in model.graph.initializers.items():
            small = tensors[name]
            if name in written:
                value.const_value = written[name]
            elif isinstance(small, ir.LazyTensor):
                value.const_value = ir.Tensor(small.numpy(), dtype=small.dtype, name=name)
        ir.save(model, path)
    except OSError as error:
        raise out_of_space(error, path) from error
    return written


def out_of_space(error: OSError, path: Path) -> Exception:
    """The typed error for a full disk, or `error` itself."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return NoSpaceLeft(
        f"the disk became full while {path.name} was written; nothing was left behind",
        where=path.parent,
        remedy="free some space or write to another disk",
    )


def _write(file: Any, name: str, tensor: ir.TensorProtocol, folder: Path) -> ir.ExternalTensor:
    step = ALIGNMENT if tensor.nbytes >= 1 << 20 else SMALL_ALIGNMENT
    start = -(-file.tell() // step) * step
    file.write(b"\0" * (start - file.tell()))
    file.write(tensor.tobytes())
    return ir.ExternalTensor(
        location=Path(file.name).name,
        offset=start,
        length=file.tell() - start,
        dtype=tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=name,
        base_dir=folder,
    )


def versions() -> dict[str, str]:
    """Of the libraries that make graphs, as far as they are installed under these names."""
    found = {}
    for name in ("torch", "onnx", "onnxscript", "onnxruntime"):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def load_graph(path: Path) -> ir.Model:
    """The graph with its weights still on disk."""
    return ir.load(path)


def check_graph(path: Path, spec: GraphSpec, variant: Variant = Variant.PORTABLE) -> None:
    """Reads the graph back from disk and compares it with its spec.

    Raises Specialised if a free dimension became a constant, ExportError for any other difference.
    """
    model = onnx.load(path, load_external_data=False)
    opsets = {item.domain: item.version for item in model.opset_import}
    int4 = any(item.data_type == onnx.TensorProto.INT4 for item in model.graph.initializer)
    newest = INT4_OPSET if int4 else OPSET
    domains = {"", ORT_DOMAIN} if variant is Variant.ORT else {""}
    if not set(opsets) <= domains or opsets[""] > newest or model.ir_version > IR_VERSION:
        raise ExportError(
            f"graph {spec.name} needs opsets {opsets} and IR {model.ir_version}, "
            f"allowed are opset {newest} of {sorted(domains)} and IR {IR_VERSION}"
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
