"""ONNX Runtime, on the CPU or on an NVIDIA GPU. The only module of the runtime that imports it.

Tensors are bound where they are. On a GPU those in its memory, the cache above all, are used there;
those in host memory the library copies in and out at every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from edge_vlm.errors import CudaError, EngineError, MissingExtraError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.graph_spec import TensorSpec
from edge_vlm.telemetry import refuse_telemetry
from edge_vlm_runtime.engines.base import CacheMemory, Engine, Shape
from edge_vlm_runtime.engines.cuda import Gpu

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
SPIN_US = 50
SPINS_SHORTLY = (1, 32)
"""Of the library: older ones may not know SPIN_US and would spin for milliseconds."""


class GpuMemory(CacheMemory, Protocol):
    """What is asked of `engines.cuda.Cuda`."""

    gpu: Gpu

    def is_device_memory(self, pointer: int) -> bool: ...


@dataclass(frozen=True)
class OrtDevice:
    memory: GpuMemory
    place: str = "cuda"
    """What the library calls that memory."""


class OrtEngine(Engine):
    """One graph of a bundle in one inference session.

    Raises MissingExtraError without the library or without its part for GPUs, CudaError if that
    cannot start, EngineError if the graph cannot be loaded or its tensors are not those of its
    spec.
    """

    def __init__(
        self,
        bundle: EngineBundle,
        name: str,
        *,
        threads: int,
        provider: str = CPU,
        device: OrtDevice | None = None,
    ) -> None:
        """`device`: whose memory tensors may be bound in besides the host's."""
        onnxruntime = require_provider(provider)
        path = bundle.graph_path(name)
        super().__init__(bundle.specs[name])
        options = _options(onnxruntime, threads)
        # Weights that have one scale a row (the head) are given one for so many numbers when they
        # are fused with their product; by default for 32, and the scales are read at every token.
        options.add_session_config_entry("session.qdq_matmulnbits_block_size", "128")
        self._adjust(options)
        try:
            session = onnxruntime.InferenceSession(
                str(path), options, providers=list(dict.fromkeys([provider, CPU]))
            )
        except Exception as error:  # the library's exceptions share no public base
            raise EngineError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load it: {error}", where=path
            ) from error
        if provider not in session.get_providers():  # it goes on without one it cannot start
            raise CudaError(
                f"ONNX Runtime {onnxruntime.__version__} cannot start {provider}",
                remedy="its log says why: no GPU, or a driver, CUDA or cuDNN of another version",
            )
        found = {item.name for item in (*session.get_inputs(), *session.get_outputs())}
        if found != self._tensors.keys():
            raise EngineError(
                f"the graph has tensors {sorted(found)}, its spec {sorted(self._tensors)}",
                where=path,
                remedy="export the bundle again",
            )
        self._session: Any = session
        self._binding: Any = session.io_binding()
        self._device = device
        self._inputs = {tensor.name for tensor in self.spec.inputs}
        self._dtypes = {t.name: np.dtype(t.dtype).type for t in self.spec.tensors}

    def _adjust(self, options: Any) -> None:
        """What a kind of engine changes of a session's options."""

    def _bind(self, tensor: TensorSpec, pointer: int, shape: Shape) -> None:
        name = tensor.name
        bind = self._binding.bind_input if name in self._inputs else self._binding.bind_output
        place = "cpu"
        if self._device is not None and self._device.memory.is_device_memory(pointer):
            place = self._device.place
        bind(name, place, 0, self._dtypes[name], shape, pointer)

    def _run(self) -> None:
        if self._device is not None:  # the library has a stream of its own, which knows not of this
            self._device.memory.synchronize()
        try:
            self._session.run_with_iobinding(self._binding)
            if self._device is not None:
                self._binding.synchronize_outputs()
        except Exception as error:
            raise EngineError(f"graph {self.spec.name} failed: {error}") from error

    def close(self) -> None:
        self._binding = self._session = None
        self._kept.clear()
        self._bound.clear()


def _options(onnxruntime: Any, threads: int) -> Any:
    """For a graph on so many threads.

    Waiting threads soon sleep: three graphs share the cores with decoding and the server, and a
    pool that spins between calls takes their time. Between two nodes of a graph they spin, because
    to wake one takes as long as a small node.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    spins = _version(onnxruntime.__version__) >= SPINS_SHORTLY
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    options.log_severity_level = 3
    return options


def _version(text: str) -> tuple[int, ...]:
    """(1, 32) of 1.32.0.dev1."""
    return tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())


def ort_library() -> tuple[str, tuple[str, ...]]:
    """Version and execution providers. Raises MissingExtraError, EngineError if it cannot load."""
    refuse_telemetry()
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtraError.for_library("onnxruntime", "ort") from error
    except (ImportError, OSError) as error:  # a shared library of it is not there, or another one
        raise EngineError(f"onnxruntime cannot be loaded: {error}") from error
    return str(onnxruntime.__version__), tuple(onnxruntime.get_available_providers())


class ProfiledOrtEngine(OrtEngine):
    """One that notes every node of every run, which slows it down."""

    def __init__(
        self, bundle: EngineBundle, name: str, *, threads: int, provider: str, profile_to: str
    ) -> None:
        """`profile_to`: begin of the name of a file for `end_profile`."""
        self._profile_to = profile_to
        super().__init__(bundle, name, threads=threads, provider=provider)

    def _adjust(self, options: Any) -> None:
        options.enable_profiling = True
        options.profile_file_prefix = self._profile_to

    def end_profile(self) -> str:
        """The file in which every run's nodes and times stand, as trace events."""
        return str(self._session.end_profiling())


class ModelInMemory:
    """A small model of one's own on the CPU, to measure the library itself. Raises
    MissingExtraError without it."""

    def __init__(self, data: bytes, threads: int) -> None:
        onnxruntime = require_provider(CPU)
        self._session: Any = onnxruntime.InferenceSession(
            data, _options(onnxruntime, threads), providers=[CPU]
        )

    def run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        outputs: list[np.ndarray] = self._session.run(None, inputs)
        return outputs

    def close(self) -> None:
        self._session = None


def require_provider(provider: str) -> Any:
    """The library. Raises MissingExtraError without it or without its part for GPUs."""
    refuse_telemetry()
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError.for_library("onnxruntime", "ort") from error
    if provider not in onnxruntime.get_available_providers():
        raise MissingExtraError(
            f"this onnxruntime {onnxruntime.__version__} has no {provider}",
            remedy="uninstall onnxruntime, then: pip install 'edge-vlm[gpu]'",
        )
    return onnxruntime
