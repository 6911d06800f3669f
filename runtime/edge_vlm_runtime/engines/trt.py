"""One graph on an NVIDIA GPU, as an engine of TensorRT or TensorRT for RTX.

Tensors may be bound in device memory, which is used as it is, or in host memory, which is copied in
before a run and out after it. A cache that lives in host memory is copied whole at every run: keep
it on the device, with rows that end at multiples of ALIGNMENT bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edge_vlm.errors import (
    EngineError,
    EngineStale,
    GpuMissing,
    OutOfDeviceMemory,
    ShapeRange,
)
from edge_vlm.formats.graph_spec import GraphSpec, TensorSpec
from edge_vlm_runtime.engines.base import Engine, Shape
from edge_vlm_runtime.engines.trt_library import TrtLibrary
from edge_vlm_runtime.engines.trt_profiles import profile_for, profiles_of

ALIGNMENT = 256
"""Of the address of every tensor, in bytes, as the libraries demand it."""
Move = Callable[[int, int, int], None]
"""Target, source and number of bytes."""
OLD_DRIVER = ("cudaError 35", "driver version is insufficient")


class DeviceMemory(Protocol):
    """What an engine asks of `engines.cuda.Cuda`."""

    stream: int

    def enter(self) -> None: ...
    def memory(self) -> tuple[int, int]: ...
    def alloc(self, num_bytes: int) -> int: ...
    def free(self, pointer: int) -> None: ...
    def copy(self, target: int, source: int, num_bytes: int) -> None: ...
    def to_device(self, target: int, source: int, num_bytes: int) -> None: ...
    def to_host(self, target: int, source: int, num_bytes: int) -> None: ...
    def synchronize(self) -> None: ...
    def is_device_memory(self, pointer: int) -> bool: ...


class TrtEngine(Engine):
    """An engine file whose entry `EngineStore.checked` has approved.

    Raises EngineStale if the library will not have it, GpuMissing if the driver is too old for the
    library, OutOfDeviceMemory if its scratch memory does not fit the GPU.
    """

    def __init__(
        self, spec: GraphSpec, path: Path, library: TrtLibrary, device: DeviceMemory
    ) -> None:
        super().__init__(spec)
        self._library = library
        self._device = device
        self._pointers: dict[str, int] = {}
        self._staging: dict[str, tuple[int, int]] = {}  # address and size of our device buffers
        self._profiles = profiles_of(spec)
        self._profile = -1
        trt = library.module
        library.clear()
        self._runtime: Any = trt.Runtime(library.logger)
        self._engine: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise self._refusal(path)
        self._check_tensors(path)
        needed, (free, _) = int(self._engine.device_memory_size_v2), device.memory()
        if needed > free:
            raise OutOfDeviceMemory(
                f"graph {spec.name} needs {needed / 1e6:.0f} MB of scratch memory, "
                f"{free / 1e6:.0f} MB of the GPU is free",
                where=path,
                remedy="close other programs, or export with smaller limits",
            )
        self._context: Any = self._engine.create_execution_context()
        if self._context is None:
            raise OutOfDeviceMemory(f"no room for graph {spec.name}: {self._said()}", where=path)

    def _refusal(self, path: Path) -> EngineError:
        what = f"{self._library.name} {self._library.version}"
        said = self._said()
        if any(mark in said for mark in OLD_DRIVER):
            return GpuMissing(
                f"the NVIDIA driver is missing or too old for {what}: {said}",
                remedy="install the driver that this version asks for",
            )
        return EngineStale(
            f"{what} refuses the engine: {said}",
            where=path,
            remedy="build it here: edge-vlm build BUNDLE",
        )

    def _check_tensors(self, path: Path) -> None:
        engine = self._engine
        found = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        if found != self._tensors.keys() or engine.num_optimization_profiles != len(self._profiles):
            raise EngineStale(
                f"the engine has {engine.num_optimization_profiles} profiles and tensors "
                f"{sorted(found)}, the spec {len(self._profiles)} and {sorted(self._tensors)}",
                where=path,
                remedy="build it here: edge-vlm build BUNDLE",
            )

    def _bind(self, tensor: TensorSpec, pointer: int, shape: Shape) -> None:
        self._pointers[tensor.name] = pointer

    def _run(self) -> None:
        device, context = self._device, self._context
        device.enter()
        self._library.clear()
        self._choose_profile()
        outputs = []
        for tensor in self.spec.inputs:
            shape = self._bound[tensor.name]
            if not context.set_input_shape(tensor.name, shape):
                raise ShapeRange(f"{tensor.name} {list(shape)} is refused: {self._said()}")
            address, move = self._address(tensor, device.to_device)
            if move is not None and (size := self._size(tensor)):
                move(address, self._pointers[tensor.name], size)
            self._set_address(tensor, address)
        for tensor in self.spec.outputs:
            address, move = self._address(tensor, device.to_host)
            self._set_address(tensor, address)
            if move is not None:
                outputs.append((tensor, address, move))
        if not context.execute_async_v3(device.stream):
            raise EngineError(f"graph {self.spec.name} failed: {self._said()}")
        for tensor, address, move in outputs:
            if size := self._size(tensor):
                move(self._pointers[tensor.name], address, size)
        device.synchronize()

    def _choose_profile(self) -> None:
        sizes = {name: self._bound[tensor][axis] for name, (tensor, axis) in self._sources.items()}
        profile = profile_for(self._profiles, sizes, self.spec.name)
        if profile != self._profile:
            if not self._context.set_optimization_profile_async(profile, self._device.stream):
                raise EngineError(
                    f"graph {self.spec.name} cannot use profile {profile}: {self._said()}"
                )
            self._profile = profile

    def _address(self, tensor: TensorSpec, across: Move) -> tuple[int, Move | None]:
        """Where the GPU finds `tensor`, and how it gets there or back if that is a buffer of ours:
        by `across` from or to the host."""
        pointer, move = self._pointers[tensor.name], across
        if self._device.is_device_memory(pointer):
            if pointer % ALIGNMENT == 0:
                return pointer, None
            move = self._device.copy
        address, capacity = self._staging.get(tensor.name, (0, 0))
        size = max(self._size(tensor), 1)  # an empty tensor needs an address too
        if size > capacity:
            if address:
                del self._staging[tensor.name]
                self._device.free(address)
            # Half as much again, so that a growing past does not mean a new buffer every token.
            capacity = size + size // 2
            address = self._device.alloc(capacity)
            self._staging[tensor.name] = (address, capacity)
        return address, move

    def _set_address(self, tensor: TensorSpec, address: int) -> None:
        if not self._context.set_tensor_address(tensor.name, address):
            raise EngineError(f"{tensor.name} cannot be bound: {self._said()}")

    @contextmanager
    def profiled(self) -> Iterator[list[tuple[str, float]]]:
        """Layers of the runs inside, name and milliseconds each; those runs are slower."""
        profiler, layers = self._library.profiler()
        self._context.profiler = profiler
        yield layers  # a context keeps its profiler: the engine is closed afterwards

    def _size(self, tensor: TensorSpec) -> int:
        count = 1
        for length in self._bound[tensor.name]:
            count *= length
        return count * np.dtype(tensor.dtype).itemsize

    def _said(self) -> str:
        return "; ".join(self._library.errors) or "it gives no reason"

    def close(self) -> None:
        self._context = self._engine = self._runtime = None
        for address, _ in self._staging.values():
            self._device.free(address)
        for kept in (self._staging, self._pointers, self._kept, self._bound):
            kept.clear()
