"""Weights under published names to ours and back; what does not fit is one error.

`to_ours` and `to_published` are inverses, and both refuse anything that does not fit, listing all
of it. What is checked are names, shapes and types alone, so that a folder can be checked by its
files' headers before a single weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from edge_vlm.config import ModelConfig
from edge_vlm.errors import WeightNamesError
from edge_vlm.model.hollow import hollow
from edge_vlm.model.published.names import Naming, Row

FLOATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""The types that weights may be stored in, and what safetensors calls them."""


class Shaped(Protocol):
    """A tensor, or what a file's header says of one: `dtype` is a type of torch or its name."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


def shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our names and their shapes, without allocating anything."""
    return dict(_shapes(cfg))


@lru_cache(maxsize=4)  # making the modules of a large model takes a second, allocated or not
def _shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in hollow(cfg).state_dict().items()}


def own_naming(cfg: ModelConfig) -> Naming:
    """Our names as a naming, so that every folder is read in one way."""
    return Naming("own", tuple(Row((name,), (name,)) for name in shapes(cfg)))


def published_shapes(naming: Naming, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every published name of such a model and its shape, in the order of the tables."""
    wanted = shapes(cfg)
    return {
        name: shape
        for row in naming.expand(cfg)
        for name, shape in _row_shapes(row, wanted, cfg).items()
    }


def check_published(
    naming: Naming, cfg: ModelConfig, found: Mapping[str, Shaped], where: object = None
) -> None:
    """Raises WeightNamesError listing every missing, unknown, mis-shaped and mistyped tensor."""
    expected = published_shapes(naming, cfg)
    for row in naming.expand(cfg):
        if len(row.published) > 1 and all(name in found for name in row.published):
            # transformers saves the joined table cut in two halves: only the sum is certain.
            sizes = {name: sum(found[name].shape[:1]) for name in row.published}
            if sum(sizes.values()) == sum(expected[name][0] for name in row.published):
                expected |= {name: (sizes[name], *expected[name][1:]) for name in sizes}
    check_fit(expected, found, where)


def to_ours(
    naming: Naming,
    cfg: ModelConfig,
    weights: Mapping[str, Tensor],
    where: object = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Renames a published state dict: every name of ours that the naming covers.

    Tensors are views where nothing has to be joined or, with a `dtype`, converted; those that have
    to be are written once, in their new type. Raises as `check_published`.
    """
    check_published(naming, cfg, weights, where)
    return dict(OurTensors(naming, cfg, weights, dtype).items())


class OurTensors(Mapping[str, Tensor]):
    """Published weights that fit, under our names; each is read when asked for.

    What is joined or cut is kept until another published tensor is asked for, so whoever goes
    through all of it in order reads everything once.
    """

    def __init__(
        self,
        naming: Naming,
        cfg: ModelConfig,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
    ) -> None:
        self._weights, self._dtype = weights, dtype
        self._wanted = shapes(cfg)
        self._rows = {name: row for row in naming.expand(cfg) for name in row.ours}
        self._last: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._last:
            row = self._rows[name]
            joined = _join([self._weights[part] for part in row.published], self._dtype)
            sizes = [self._wanted[part][0] for part in row.ours]
            self._last = dict(zip(row.ours, torch.split(joined, sizes), strict=True))
        return self._last[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def to_published(
    naming: Naming, cfg: ModelConfig, weights: Mapping[str, Tensor], where: object = None
) -> dict[str, Tensor]:
    """The inverse of `to_ours`; names of ours that the naming does not cover must be absent."""
    wanted, rows = shapes(cfg), naming.expand(cfg)
    check_fit({name: wanted[name] for row in rows for name in row.ours}, weights, where)
    return dict(published_items(naming, cfg, weights))


def published_items(
    naming: Naming,
    cfg: ModelConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """As `to_published` of weights that fit, in the order of `published_shapes`: each is read and
    joined when its turn comes, so a model is written without being held.
    """
    wanted = shapes(cfg)
    for row in naming.expand(cfg):
        joined = _join([weights[name] for name in row.ours], dtype)
        sizes = [shape[0] for shape in _row_shapes(row, wanted, cfg).values()]
        yield from zip(row.published, torch.split(joined, sizes), strict=True)


def _join(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    first, dtype = tensors[0], dtype or tensors[0].dtype
    if len(tensors) == 1:
        return first.to(dtype)
    joined = first.new_empty((sum(len(t) for t in tensors), *first.shape[1:]), dtype=dtype)
    for part, tensor in zip(torch.split(joined, [len(t) for t in tensors]), tensors, strict=True):
        part.copy_(tensor)
    return joined


def _row_shapes(
    row: Row, wanted: Mapping[str, tuple[int, ...]], cfg: ModelConfig
) -> dict[str, tuple[int, ...]]:
    rest = wanted[row.ours[0]][1:]
    if len(row.published) == 1:
        return {row.published[0]: (sum(wanted[name][0] for name in row.ours), *rest)}
    # The only tensor that is published in two pieces is the embedding table.
    language = cfg.language
    rows = (language.base_vocab, language.extra_vocab)
    return {name: (size, *rest) for name, size in zip(row.published, rows, strict=True)}


def check_fit(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Shaped], where: object = None
) -> None:
    """Raises WeightNamesError with every name that does not fit; does nothing if all do."""
    known = [(name, found[name], shape) for name, shape in expected.items() if name in found]
    allowed = (*FLOATS, *FLOATS.values())
    problems = {
        "missing": [name for name in expected if name not in found],
        "unknown": sorted(found.keys() - expected.keys()),
        "misshaped": [
            f"{name} is {list(tensor.shape)}, expected {list(shape)}"
            for name, tensor, shape in known
            if tuple(tensor.shape) != shape
        ],
        "mistyped": [
            f"{name} is {tensor.dtype}, expected {', '.join(FLOATS.values())}"
            for name, tensor, _ in known
            if tensor.dtype not in allowed
        ],
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{kind}: {_abridged(names)}" for kind, names in problems.items() if names
        )
        raise WeightNamesError(
            f"weights do not fit the model: {listed}",
            where=where,
            remedy="load them with the config that was published with them",
            **{kind: tuple(names) for kind, names in problems.items()},
        )


def _abridged(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
