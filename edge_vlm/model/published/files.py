"""What the safetensors files of a folder hold, read from their headers alone.

A header is JSON after its length (8 bytes, little-endian) and says name, type, shape and place of
every tensor (https://github.com/huggingface/safetensors, Format). So a folder of 20 GB is checked
in milliseconds, and one error lists everything that is wrong with its files. Pickled weights are
never opened: a pickle runs code.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edge_vlm.errors import CheckpointError, WeightFilesError
from edge_vlm.json_text import MALFORMED, fault_of, parse_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SCORER = "scorer.safetensors"
"""A scorer beside a hub folder's weights, where transformers does not look."""
REMEDY = "fetch or save the folder again, as whole safetensors files"
UNFINISHED, REPLACED = ".partial", ".before"
"""What the names of folders end in that a training run is writing, or has just replaced."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER_BYTES = 100_000_000
_MODEL_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""What a hub calls a model."""
_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
_FOREIGN = {
    b"PK\x03\x04": "a pickled archive of torch.save",
    b"\x80": "a pickle",
    b"version https://git-lfs": "a git-lfs pointer, the weights were not fetched",
    b"<": "a web page, the download failed",
}


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of one tensor; `dtype` is the format's name of it, such as "BF16"."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _BYTES.get(self.dtype, 0)


def read_layout(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder's weights: one file, or shards and their index.

    Raises WeightFilesError that lists all faults: absent files, pickles, files that are cut off or
    no safetensors, an index that disagrees with its shards.
    """
    problems: list[str] = []
    index: dict[str, str] | None = None
    if (folder / WEIGHTS).is_file():
        files = [WEIGHTS]
    elif (folder / INDEX).is_file():
        index = _read_index(folder / INDEX)
        files = sorted(set(index.values()))
    else:
        files = []
        problems.append(_nothing_to_read(folder))
    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            held = _read_header(folder, file)
        except ValueError as error:
            problems.append(f"{file} {error}")
            continue
        twice = [f"{name} is in {found[name].file} and in {file}" for name in held if name in found]
        problems += twice
        found.update(held)
    if index is not None and not problems:
        problems += _disagreements(index, found)
    if (folder / SCORER).is_file():
        try:
            found.update(_read_header(folder, SCORER))
        except ValueError as error:
            problems.append(f"{SCORER} {error}")
    if problems:
        raise WeightFilesError(
            f"the weight files cannot be used: {listed(problems)}",
            where=folder,
            remedy=REMEDY,
            problems=tuple(problems),
        )
    return found


def require_folder(folder: Path) -> None:
    """Raises CheckpointError if it is none."""
    if folder.is_dir():
        return
    if folder.exists():
        raise CheckpointError(
            "is a file", where=folder, remedy="name the folder that holds config.json"
        )
    remedy = "point to a model's folder"
    if _MODEL_NAME.fullmatch(str(folder)):
        remedy += f", or fetch it: edge-vlm pull {folder}"
    raise CheckpointError("there is no such folder", where=folder, remedy=remedy)


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError if there is no such file or folder, or no JSON object in it."""
    require_folder(path.parent)
    try:
        data = parse_json(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        found = [p.parent for p in sorted(path.parent.glob(f"*/{path.name}"))]
        inside = [p for p in found if p.suffix not in (UNFINISHED, REPLACED)]
        remedy = f"take {inside[0]}" if inside else "point to a model's folder"
        raise CheckpointError(
            f"there is no {path.name}", where=path.parent, remedy=remedy
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot be read as JSON: {error}", where=path, remedy="fetch or save the file again"
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError("not a JSON object", where=path, remedy=REMEDY)
    return data


def _read_index(path: Path) -> dict[str, str]:
    """Raises WeightFilesError if it does not map names to files beside it."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        fault = "the index has no weight_map"
        raise WeightFilesError(fault, where=path, remedy=REMEDY, problems=(fault,))
    outside = [
        f"the index names {file!r}, expected a safetensors file beside it"
        for file in sorted({str(file) for file in weight_map.values()})
        if PurePosixPath(file).name != file or "\\" in file or not file.endswith(".safetensors")
    ]
    if outside:
        problems = tuple(outside)
        raise WeightFilesError(listed(outside), where=path, remedy=REMEDY, problems=problems)
    return {str(name): str(file) for name, file in weight_map.items()}


def _nothing_to_read(folder: Path) -> str:
    if not folder.is_dir():
        return "there is no such folder"
    here = sorted(path.name for path in folder.iterdir() if path.is_file())
    if pickles := [name for name in here if name.endswith(PICKLES)]:
        return f"{', '.join(pickles)}: pickles are never opened, they can run code"
    if shards := [name for name in here if name.endswith(".safetensors")]:
        return f"{', '.join(shards)}: expected {WEIGHTS}, or {INDEX} that lists shards"
    return f"neither {WEIGHTS} nor {INDEX} is there"


def _read_header(folder: Path, file: str) -> dict[str, StoredTensor]:
    """Raises ValueError that says what is wrong with the file."""
    path = folder / file
    if not path.is_file():
        raise ValueError("is missing")
    size = path.stat().st_size
    with path.open("rb") as opened:
        start = opened.read(32)
        for magic, kind in _FOREIGN.items():
            # The first byte alone could also be a header's length; then its text begins with "{".
            if start.startswith(magic) and start[8:9] != b"{":
                raise ValueError(f"is {kind}")
        if size < 8:
            raise ValueError(f"is cut off: {size} bytes")
        length = int.from_bytes(start[:8], "little")
        if length > MAX_HEADER_BYTES or start[8:9] not in (b"{", b""):
            raise ValueError("is not a safetensors file")
        opened.seek(8)
        text = opened.read(length)
    if len(text) < length:
        raise ValueError(f"is cut off: {size:,} bytes, its header alone has {length:,}")
    try:
        header = parse_json(text)
        tensors = {
            str(name): (StoredTensor(file, str(item["dtype"]), _shape(item["shape"])), item)
            for name, item in header.items()
            if name != "__metadata__"
        }
        spans = sorted(_span(item["data_offsets"]) for _, item in tensors.values())
        end = spans[-1][1] if spans else 0
        if any(begin != before for (_, before), (begin, _) in itertools.pairwise([(0, 0), *spans])):
            raise ValueError("its tensors overlap or leave gaps")
        wrong = [
            name
            for name, (tensor, item) in tensors.items()
            if tensor.dtype in _BYTES
            and tensor.num_bytes != item["data_offsets"][1] - item["data_offsets"][0]
        ]
    except MALFORMED as error:
        raise ValueError(
            f"has a header that is not one of safetensors: {fault_of(error)}"
        ) from error
    if wrong:
        raise ValueError(f"has tensors of another size than their shape's: {listed(wrong)}")
    expected = 8 + length + end
    if size != expected:
        kind = "is cut off" if size < expected else "is longer than its header says"
        raise ValueError(f"{kind}: {size:,} bytes, expected {expected:,}")
    return {name: tensor for name, (tensor, _) in tensors.items()}


def _span(value: object) -> tuple[int, int]:
    begin, end = value if isinstance(value, list) and len(value) == 2 else (None, None)
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
        raise ValueError(f"data_offsets {value!r:.60}")
    return begin, end


def _shape(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError(f"shape {value!r}")
    return tuple(value)


def _disagreements(index: dict[str, str], found: dict[str, StoredTensor]) -> list[str]:
    """What the index says against what the shards hold."""
    absent = [
        f"{file} lacks {name}, which the index puts there"
        for name, file in index.items()
        if name not in found or found[name].file != file
    ]
    unlisted = [
        f"{tensor.file} holds {name}, which the index does not list"
        for name, tensor in found.items()
        if name not in index
    ]
    return absent + unlisted


def listed(problems: list[str], most: int = 8) -> str:
    more = f" and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more
