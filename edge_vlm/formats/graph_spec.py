"""The contract of one graph: its tensors and how far each free dimension may go.

Written by the exporter into the bundle's manifest and read by whoever builds, verifies or runs the
graph. A shape is a tuple of whole numbers, dimension names, and sums of names ("p+s").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_vlm.config import require_numbers
from edge_vlm.errors import BundleSchemaError, ShapeRange
from edge_vlm.json_text import MALFORMED

LARGEST = 1 << 40
DTYPES = ("float32", "float16", "int32", "int64", "bool")


@dataclass(frozen=True, kw_only=True)
class DynamicDim:
    """Range of one free dimension, both ends included; `opt` is the size to be fastest at."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        require_numbers(self, LARGEST)
        if not 0 <= self.min <= self.opt <= self.max:
            raise ValueError(f"need 0 <= min <= opt <= max, got {self.min}, {self.opt}, {self.max}")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype of {self.name} must be one of {DTYPES}, got {self.dtype!r}")

    def resolve(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The concrete shape at `dims`."""
        return tuple(
            axis if isinstance(axis, int) else sum(dims[name] for name in axis.split("+"))
            for axis in self.shape
        )


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """Inputs and outputs in the graph's own order, and the range of every dimension they name."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: Mapping[str, DynamicDim]

    def __post_init__(self) -> None:
        names = [tensor.name for tensor in self.tensors]
        if len(set(names)) != len(names):
            raise ValueError(f"tensor names of {self.name} repeat: {names}")
        used = {
            name
            for tensor in self.tensors
            for axis in tensor.shape
            if isinstance(axis, str)
            for name in axis.split("+")
        }
        if used != set(self.dims):
            raise ValueError(
                f"dims of {self.name} are {sorted(self.dims)}, its shapes use {sorted(used)}"
            )

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return self.inputs + self.outputs

    def check_dims(self, dims: Mapping[str, int]) -> None:
        """Raises ShapeRange if a size lies outside its range."""
        for name, size in dims.items():
            limits = self.dims[name]
            if not limits.min <= size <= limits.max:
                raise ShapeRange(
                    f"dimension {name} of graph {self.name} is {size}",
                    remedy=f"allowed are {limits.min}..{limits.max}",
                )

    def check_shape(
        self, tensor: TensorSpec, shape: tuple[int, ...], dims: Mapping[str, int]
    ) -> None:
        """Raises ShapeRange if `shape` is not what `tensor` has at `dims`."""
        expected = tensor.resolve(dims)
        if shape != expected:
            raise ShapeRange(
                f"{tensor.name} of graph {self.name} has shape {list(shape)}",
                remedy=f"expected {list(expected)}",
            )

    def sizes(self, which: str) -> dict[str, int]:
        """All dimensions at their "min", "opt" or "max"."""
        return {name: int(getattr(limits, which)) for name, limits in self.dims.items()}

    def zeros(self, tensor: TensorSpec, dims: Mapping[str, int]) -> np.ndarray:
        return np.zeros(tensor.resolve(dims), dtype=tensor.dtype)

    def to_dict(self) -> dict[str, Any]:
        def side(tensors: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
            return [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in tensors]

        dims = {name: {"min": d.min, "opt": d.opt, "max": d.max} for name, d in self.dims.items()}
        return {
            "name": self.name,
            "inputs": side(self.inputs),
            "outputs": side(self.outputs),
            "dims": dims,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GraphSpec:
        """Raises BundleSchemaError when `data` is not what `to_dict` writes."""
        try:
            return cls(
                name=str(data["name"]),
                inputs=tuple(_tensor(item) for item in data["inputs"]),
                outputs=tuple(_tensor(item) for item in data["outputs"]),
                dims={name: DynamicDim(**limits) for name, limits in data["dims"].items()},
            )
        except MALFORMED as error:
            raise BundleSchemaError(f"graph spec is malformed: {error}") from error


def _tensor(item: Mapping[str, Any]) -> TensorSpec:
    shape = tuple(axis if isinstance(axis, int) else str(axis) for axis in item["shape"])
    return TensorSpec(name=str(item["name"]), dtype=str(item["dtype"]), shape=shape)
