"""One compiled graph with bound buffers.

The caller owns every buffer, inputs and outputs alike, and must keep it alive until `run` has
returned: nothing is allocated, copied or converted on the way. An output may be bound inside the
same allocation as an input as long as the two ranges do not overlap, or, where a graph adds to a
cache in place (`present_*`), exactly where its input is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np

from edge_vlm.errors import EngineError
from edge_vlm.formats.graph_spec import GraphSpec, TensorSpec

Shape = tuple[int, ...]


class Engine(ABC):
    """Bind every tensor of `spec`, then `run`; bindings stay until bound anew. One thread."""

    def __init__(self, spec: GraphSpec) -> None:
        self.spec = spec
        self._tensors = {tensor.name: tensor for tensor in spec.tensors}
        self._bound: dict[str, Shape] = {}
        self._kept: dict[str, np.ndarray] = {}
        # Where to read each free dimension: the first axis that is exactly that dimension, or
        # else a sum of it and another.
        self._sources: dict[str, tuple[str, int]] = {}
        self._sums: dict[str, tuple[str, int, str]] = {}
        for tensor in spec.tensors:
            for axis, size in enumerate(tensor.shape):
                if isinstance(size, str) and size in spec.dims:
                    self._sources.setdefault(size, (tensor.name, axis))
        for tensor in spec.tensors:
            for axis, size in enumerate(tensor.shape):
                first, plus, second = str(size).partition("+")
                if plus and first not in self._sources:
                    self._sums.setdefault(first, (tensor.name, axis, second))

    def bind(self, name: str, pointer: int, shape: Shape) -> None:
        """Binds contiguous memory at address `pointer`, of the spec's dtype."""
        self._bind(self._tensors[name], pointer, shape)
        self._bound[name] = shape

    def bind_array(self, name: str, array: np.ndarray) -> None:
        """Binds a numpy array and keeps a reference; ValueError for a wrong dtype or layout."""
        if array.dtype != self._tensors[name].dtype or not array.flags.c_contiguous:
            raise ValueError(
                f"{name} must be contiguous {self._tensors[name].dtype}, got {array.dtype} "
                f"with strides {array.strides}"
            )
        self.bind(name, array.__array_interface__["data"][0], array.shape)
        self._kept[name] = array

    def run(self) -> None:
        """Computes the bound outputs.

        Raises ShapeRange if the bound shapes do not fit each other or the spec's ranges,
        EngineError if a tensor was never bound or the backend fails.
        """
        self._check_shapes()
        self._run()

    def _check_shapes(self) -> None:
        bound = self._bound
        missing = self._tensors.keys() - bound.keys()
        if missing:
            raise EngineError(f"graph {self.spec.name} runs with {sorted(missing)} not bound")
        dims = {name: bound[source][axis] for name, (source, axis) in self._sources.items()}
        for name, (source, axis, other) in self._sums.items():
            dims[name] = bound[source][axis] - dims[other]
        self.spec.check_dims(dims)
        # The many past tensors share one shape: resolve it once per run.
        resolved: dict[tuple[int | str, ...], Shape] = {}
        for name, tensor in self._tensors.items():
            expected = resolved.get(tensor.shape)
            if expected is None:
                expected = resolved[tensor.shape] = tensor.resolve(dims)
            if bound[name] != expected:
                self.spec.check_shape(tensor, bound[name], dims)

    @abstractmethod
    def _bind(self, tensor: TensorSpec, pointer: int, shape: Shape) -> None: ...

    @abstractmethod
    def _run(self) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Frees the engine. Using it afterwards is an error; closing twice is not."""


class CacheMemory(Protocol):
    """Memory of a device. What is asked of it happens in the order in which it is asked."""

    def alloc(self, num_bytes: int) -> int: ...
    def free(self, pointer: int) -> None: ...
    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Between places that do not overlap."""

    def to_host(self, target: int, source: int, num_bytes: int) -> None: ...
    def synchronize(self) -> None: ...
