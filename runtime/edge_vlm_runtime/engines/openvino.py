"""OpenVINO on the CPU, on the same ONNX files. The only module of the runtime that imports it.

Tensors are views of the memory that was bound. On a CPU that multiplies bfloat16 itself (AMX), the
graphs of pictures of a float32 bundle compute in it: on others OpenVINO is no faster than ONNX
Runtime.
Float16 bundles have nodes that keep float32 because their values are too large, which bfloat16
would not respect: they compute in float32.

Importing the library reports nothing to anybody; only its converters would, and none is called.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edge_vlm.errors import ConfigError, EngineError, MissingExtraError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.graph_spec import TensorSpec
from edge_vlm.formats.precision import BLOCK_SIZES, KVLayout, block_size
from edge_vlm_runtime.engines.base import Engine, Shape

DEVICE = "CPU"
BFLOAT16, FLOAT32 = "bf16", "f32"


class OpenVinoEngine(Engine):
    """One graph of a bundle. `precision`: `BFLOAT16` or `FLOAT32`, by default `precision_for`.

    Raises MissingExtraError without the library, ConfigError for a bundle whose cache only ONNX
    Runtime can add to, EngineError if the graph cannot be loaded or its tensors are not those of
    its spec.
    """

    def __init__(
        self, bundle: EngineBundle, name: str, *, threads: int, precision: str | None = None
    ) -> None:
        openvino = _library()
        require_portable(bundle)
        path = bundle.graph_path(name)
        super().__init__(bundle.specs[name])
        options = {
            "INFERENCE_PRECISION_HINT": precision or precision_for(bundle, name),
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            # The cores are shared with decoding and the server: threads are not tied to some.
            "ENABLE_CPU_PINNING": False,
        }
        if bundle.precision.llm == "int4" and name.startswith("llm"):
            options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = _least_block(bundle)
        try:
            core = openvino.Core()
            compiled = core.compile_model(core.read_model(str(path)), DEVICE, options)
        except RuntimeError as error:
            raise EngineError(
                f"OpenVINO {openvino.__version__} cannot load it: {error}", where=path
            ) from error
        ports = {
            port_name: port
            for port in (*compiled.inputs, *compiled.outputs)
            for port_name in port.get_names()  # a tensor may have several
            if port_name in self._tensors
        }
        count = len(compiled.inputs) + len(compiled.outputs)
        if ports.keys() != self._tensors.keys() or count != len(ports):
            raise EngineError(
                f"the graph has {count} tensors, among them {sorted(ports)}, its spec "
                f"{sorted(self._tensors)}",
                where=path,
                remedy="export the bundle again",
            )
        self._make_tensor = openvino.Tensor
        self._ports: dict[str, Any] = ports
        self._compiled: Any = compiled
        self._request: Any = compiled.create_infer_request()
        self._dtypes = {tensor.name: np.dtype(tensor.dtype) for tensor in self.spec.tensors}

    def _bind(self, tensor: TensorSpec, pointer: int, shape: Shape) -> None:
        view = np.asarray(_Memory(pointer, shape, self._dtypes[tensor.name]))
        self._request.set_tensor(
            self._ports[tensor.name], self._make_tensor(view, shared_memory=True)
        )

    def _run(self) -> None:
        try:
            self._request.infer()
        except RuntimeError as error:
            raise EngineError(f"graph {self.spec.name} failed: {error}") from error

    def close(self) -> None:
        self._request = self._compiled = None
        self._ports.clear()
        self._kept.clear()
        self._bound.clear()


class _Memory:
    """An address for numpy, which copies nothing."""

    def __init__(self, pointer: int, shape: Shape, dtype: np.dtype[Any]) -> None:
        self.__array_interface__ = {
            "data": (pointer, False),
            "shape": shape,
            "typestr": dtype.str,
            "version": 3,
        }


def require_portable(bundle: EngineBundle) -> None:
    """Raises ConfigError. OpenVINO does read ONNX Runtime's GroupQueryAttention, but ignores the
    mask it is given and returns another cache: its answers would be wrong without a word."""
    if bundle.kv_layout is not KVLayout.TOKEN_MAJOR:
        raise ConfigError(
            f"OpenVINO cannot run a bundle of variant {bundle.variant.value}",
            where=bundle.path,
            remedy="export it with --variant portable, or take --backend ort",
        )


def precision_for(bundle: EngineBundle, name: str) -> str:
    """In what that graph of a bundle computes here. Raises MissingExtraError.

    Language graphs do in float32: in bfloat16 OpenVINO 2026.4.1 computes one token behind some
    lengths of the past wrongly without a word, in some shapes: cosines of 0.3 to 0.7, or logits
    that are not written at all. In float32 the same are right.
    """
    is_exact = bundle.precision.base != "float32" or name.startswith("llm")
    return FLOAT32 if is_exact or not multiplies_bfloat16() else BFLOAT16


def _least_block(bundle: EngineBundle) -> int:
    """Of how many int4 weights one scale is. Activations are rounded to eight bits in as large
    groups, as ONNX Runtime does it; in larger ones OpenVINO would take float32, slowly."""
    language = bundle.config.language
    inputs = (language.width, language.num_heads * language.head_dim, language.mlp_width)
    return min(block_size(size) or max(BLOCK_SIZES) for size in inputs)


def multiplies_bfloat16() -> bool:
    """Raises MissingExtraError."""
    core = _library().Core()
    return "BF16" in core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")


def openvino_version() -> str:
    """Raises MissingExtraError, EngineError if it cannot be loaded."""
    return str(_library().__version__).partition("-")[0]


def _library() -> Any:
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise MissingExtraError.for_library("openvino", "openvino") from error
    except (ImportError, OSError) as error:
        raise EngineError(
            f"openvino cannot be loaded: {error}", remedy="install it again, or take --backend ort"
        ) from error
    return openvino
