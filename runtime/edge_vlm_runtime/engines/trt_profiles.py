"""Which shapes an engine is built for: optimisation profiles made from a graph's spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edge_vlm.errors import ShapeRange
from edge_vlm.formats.graph_spec import DynamicDim, GraphSpec, TensorSpec

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """`name` is "step" (the size used most, which should be fastest) or "full" (every size)."""

    name: str
    dims: Mapping[str, DynamicDim]

    def shapes(self, tensor: TensorSpec) -> tuple[Shape, Shape, Shape]:
        """Smallest, best and largest shape of `tensor`."""
        ends = [
            {name: int(getattr(dim, which)) for name, dim in self.dims.items()}
            for which in ("min", "opt", "max")
        ]
        smallest, best, largest = (tensor.resolve(sizes) for sizes in ends)
        return smallest, best, largest

    def contains(self, sizes: Mapping[str, int]) -> bool:
        return all(dim.min <= sizes[name] <= dim.max for name, dim in self.dims.items())


def profiles_of(spec: GraphSpec) -> tuple[Profile, ...]:
    """Profiles in the order in which they are tried.

    A vision graph's step is one frame, the language graph's is one token with one row of logits.
    Past sizes keep their whole range.
    """
    full = Profile(name="full", dims=dict(spec.dims))
    one = DynamicDim(min=1, opt=1, max=1)
    dims = dict(spec.dims)
    for name in ("F", "s", "n"):
        if name in dims:
            dims[name] = one
    if "G" in dims and "F" in dims:
        cells = spec.dims["G"]
        most = max(cells.max // spec.dims["F"].max, cells.min)
        dims["G"] = DynamicDim(min=cells.min, opt=min(cells.opt, most), max=most)
    if dims == full.dims:
        return (full,)
    return (Profile(name="step", dims=dims), full)


def profile_for(profiles: tuple[Profile, ...], sizes: Mapping[str, int], graph: str) -> int:
    """Index of the first profile with room for `sizes`. Raises ShapeRange."""
    for index, profile in enumerate(profiles):
        if profile.contains(sizes):
            return index
    raise ShapeRange(
        f"no profile of graph {graph} has room for {dict(sizes)}",
        remedy="; ".join(
            f"{profile.name}: "
            + ", ".join(f"{name} {dim.min}..{dim.max}" for name, dim in profile.dims.items())
            for profile in profiles
        ),
    )
