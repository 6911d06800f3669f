"""Weights as torch writes them: `model.pt`, and the folder of a distributed checkpoint.

Both hold pickles, and a pickle can name any function to be run. Here none can: tensors are read
with torch's `weights_only`, and the index of a distributed checkpoint (`.metadata`, a pickle of
`torch.distributed.checkpoint.metadata.Metadata`) by an unpickler that knows a short list of names
and has stand-ins for all of them, so that nothing of torch is reached either. Any other name is a
WeightFilesError that says which.

Each item of a `.distcp` file is by itself a complete `torch.save` of one shard, at an offset that
the index tells.
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
import pickletools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from edge_vlm.errors import WeightFilesError
from edge_vlm.json_text import MALFORMED
from edge_vlm.model.published.files import StoredTensor, listed

UNSHARDED = "model.pt"
SHARDED = "model_and_optim"
INDEX = ".metadata"
PREFIX = "model."
REMEDY = "copy the folder again"
NOT_RUN = "take the folder from whoever trained it: nothing of this file was run"

_DTYPES = {
    **{"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"},
    **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"},
}
_TORCH = {name: getattr(torch, dtype) for dtype, name in _DTYPES.items()}
_NAMES = {dtype: name for name, dtype in _TORCH.items()}


def read_unsharded(folder: Path) -> dict[str, Tensor]:
    """The tensors of `model.pt`, mapped rather than read.

    Raises WeightFilesError for a file that is cut off, names a global or holds anything else.
    """
    path = folder / UNSHARDED
    try:
        held = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise _unreadable(path, error) from error
    if not isinstance(held, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in held.items()
    ):
        raise _fault(path, f"{UNSHARDED} is no flat table of names and tensors", REMEDY)
    return held


def layout_of(tensors: Mapping[str, Tensor], file: str) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(file, _NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape))
        for name, t in tensors.items()
    }


@dataclass(frozen=True)
class _Shard:
    """A box of a tensor and where its bytes lie."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class ShardedTensors(Mapping[str, Tensor]):
    """The model's tensors of a distributed checkpoint; each is put together when asked for."""

    def __init__(self, folder: Path) -> None:
        """Reads the index alone. Raises WeightFilesError that lists all that is wrong with it, and
        with the sizes of the files beside it."""
        self._folder = folder
        metadata = _read_index(folder / INDEX)
        self._shards: dict[str, list[_Shard]] = {}
        self.layout: dict[str, StoredTensor] = {}
        problems: list[str] = []
        for name, found in _tensors(metadata):
            try:
                self._add(name, found, metadata)
            except MALFORMED as error:
                problems.append(f"{INDEX} is wrong about {name}: {error}")
        if not self._shards and not problems:
            problems.append(f"{INDEX} names no tensor that begins with {PREFIX!r}")
        problems += self._misfits()
        if problems:
            raise WeightFilesError(
                f"the weight files cannot be used: {listed(problems)}",
                where=folder,
                remedy=REMEDY,
                problems=tuple(problems),
            )

    def _add(self, name: str, found: Any, metadata: _Metadata) -> None:
        size, dtype = _counts(found.size), found.properties.state[0]
        if dtype not in _TORCH:
            raise ValueError(f"dtype {dtype!r}")
        shards = []
        for chunk in found.chunks:
            offsets, sizes = _counts(chunk.offsets), _counts(chunk.sizes)
            place = _place(metadata, name, offsets)
            if not len(offsets) == len(sizes) == len(size) or any(
                o + s > whole for o, s, whole in zip(offsets, sizes, size, strict=True)
            ):
                raise ValueError(f"a shard of {sizes} at {offsets} of {size}")
            path = place.relative_path
            if not isinstance(path, str) or PurePosixPath(path).name != path or "\\" in path:
                raise ValueError(f"it names {path!r}, expected a file beside it")
            if getattr(place, "transform_descriptors", None):
                raise ValueError(f"compressed by {place.transform_descriptors!r}")
            (start, length) = _counts((place.offset, place.length))
            shards.append(_Shard(offsets, sizes, path, start, length))
        overlaps = any(_overlap(a, b) for a, b in itertools.combinations(shards, 2))
        if overlaps or sum(math.prod(s.sizes) for s in shards) != math.prod(size):
            raise ValueError(f"its {len(shards)} shards do not make up {size}")
        self._shards[name] = shards
        self.layout[name] = StoredTensor(shards[0].file if shards else "", dtype, size)

    def _misfits(self) -> list[str]:
        needed: dict[str, int] = {}
        for shard in itertools.chain.from_iterable(self._shards.values()):
            needed[shard.file] = max(needed.get(shard.file, 0), shard.start + shard.length)
        problems = []
        for file, end in sorted(needed.items()):
            path = self._folder / file
            if not path.is_file():
                problems.append(f"{file} is missing")
            elif (size := path.stat().st_size) < end:
                problems.append(f"{file} is cut off: {size:,} bytes, expected at least {end:,}")
        return problems

    @property
    def files(self) -> list[str]:
        shards = itertools.chain.from_iterable(self._shards.values())
        return sorted({INDEX, *(shard.file for shard in shards)})

    def __getitem__(self, name: str) -> Tensor:
        """Raises WeightFilesError for a shard that cannot be read or is not what the index says."""
        stored = self.layout[name]
        dtype = _TORCH[stored.dtype]
        whole: Tensor | None = None
        for shard in self._shards[name]:
            part = self._read(shard)
            if part.shape != shard.sizes or part.dtype is not dtype:
                told = f"{shard.file} holds {list(part.shape)} {part.dtype} of {name}"
                raise _fault(self._folder, f"{told}, {INDEX} says {list(shard.sizes)}", REMEDY)
            if part.shape == stored.shape:
                return part
            if whole is None:
                whole = torch.empty(stored.shape, dtype=dtype)
            box = tuple(slice(o, o + s) for o, s in zip(shard.offsets, shard.sizes, strict=True))
            whole[box] = part
        return torch.empty(stored.shape, dtype=dtype) if whole is None else whole

    def _read(self, shard: _Shard) -> Tensor:
        path = self._folder / shard.file
        with path.open("rb") as opened:
            opened.seek(shard.start)
            item = io.BytesIO(opened.read(shard.length))
        try:
            part = torch.load(item, map_location="cpu", weights_only=True)
        except Exception as error:
            raise _unreadable(path, error) from error
        if not isinstance(part, Tensor):
            raise _fault(path, f"{shard.file} holds a {type(part).__name__}, not a tensor", REMEDY)
        return part

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)


def _counts(values: Any) -> tuple[int, ...]:
    counts = tuple(values)
    if not all(type(n) is int and n >= 0 for n in counts):
        raise ValueError(f"{counts!r} are no counts")
    return counts


def _overlap(a: _Shard, b: _Shard) -> bool:
    return all(
        max(low, other) < min(low + size, other + other_size)
        for low, size, other, other_size in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    )


# ---- the index -----------------------------------------------------------------------------------


class _Record:
    """Stands in for a class of the index, and does nothing but hold what was stored of it."""

    def __new__(cls, *arguments: object) -> _Record:
        return object.__new__(cls)

    def __init__(self, *arguments: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{type(self).__name__.strip('_')} without {name}")


class _Tensor(_Record):
    pass


class _Metadata(_Record):
    pass


def _tensors(metadata: _Metadata) -> Iterator[tuple[str, Any]]:
    """Names without their prefix; the optimiser's and everything else is left out."""
    for name, found in metadata.state_dict_metadata.items():
        if isinstance(found, _Tensor) and str(name).startswith(PREFIX):
            yield str(name).removeprefix(PREFIX), found


def _place(metadata: _Metadata, name: str, offsets: tuple[int, ...]) -> Any:
    try:
        return metadata.storage_data[_Key(PREFIX + name, offsets)]
    except KeyError:
        raise ValueError(f"no file for its shard at {offsets}") from None


class _Key(_Record):
    """`MetadataIndex`: a tensor's name and a shard's offsets."""

    fqn: object = None
    offset: object = None  # of what is no tensor it is not stored

    def __init__(self, fqn: object = None, offset: object = None) -> None:
        self.fqn, self.offset = fqn, offset

    def _value(self) -> tuple[object, object]:
        offset = self.offset
        return self.fqn, tuple(offset) if isinstance(offset, list | tuple) else offset

    def __hash__(self) -> int:
        return hash(self._value())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._value() == other._value()


_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED: dict[tuple[str, str], object] = {
    (_METADATA, "Metadata"): _Metadata,
    (_METADATA, "TensorStorageMetadata"): _Tensor,
    (_METADATA, "MetadataIndex"): _Key,
    **{
        (_METADATA, name): _Record
        for name in (
            *("BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "StorageMeta"),
            "_MEM_FORMAT_ENCODING",
        )
    },
    ("olmo.train.remote_filesystem", "_StorageInfo"): _Record,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    ("torch.serialization", "_get_layout"): _Record,
    **{(module, "PosixPath"): _Record for module in ("pathlib", "pathlib._local")},
    ("torch", "Size"): tuple,
    **{("torch", dtype): name for dtype, name in _DTYPES.items()},
}


class _Forbidden(Exception):
    """A global that no such index needs."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise _Forbidden(f"{module}.{name}") from None


def _require_small_memo(data: bytes) -> None:
    """Raises ValueError for a place in the table of values so far that no file of this size needs:
    the table is made that long."""
    for operation, place, _ in pickletools.genops(data):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(str(place)) > len(data):
            raise ValueError(f"it keeps a value at place {place}")


def require_harmless(index: Path) -> None:
    """Of a checkpoint that torch itself is about to read: its index names nothing that could be
    run. Raises WeightFilesError."""
    _read_index(index)


def _read_index(path: Path) -> _Metadata:
    if not path.is_file():
        raise _fault(path.parent, f"{INDEX} is missing", REMEDY)
    try:
        data = path.read_bytes()
        _require_small_memo(data)
        held = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:
        raise _unreadable(path, error) from error
    if not isinstance(held, _Metadata) or not all(
        isinstance(held.__dict__.get(field), dict)
        for field in ("state_dict_metadata", "storage_data")
    ):
        raise _fault(path, f"{INDEX} is no index of a distributed checkpoint", REMEDY)
    return held


def _unreadable(path: Path, error: Exception) -> WeightFilesError:
    named = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
    if isinstance(error, _Forbidden):
        return _fault(path, f"{path.name} names the global {error}", NOT_RUN)
    if isinstance(error, pickle.UnpicklingError) and named:
        return _fault(path, f"{path.name} names the global {named[1]}", NOT_RUN)
    told = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return _fault(path, f"{path.name} is cut off or no such file: {told}", REMEDY)


def _fault(where: Path, what: str, remedy: str) -> WeightFilesError:
    return WeightFilesError(what, where=where, remedy=remedy, problems=(what,))
