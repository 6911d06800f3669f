"""A checkpoint folder: `config.json`, `model.safetensors`, `tokenizer.json`.

`config.json` holds the model's shapes and, beside them, what it was trained to be given
(`edge_vlm.formats.usage`).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from edge_vlm.config import ModelConfig
from edge_vlm.errors import CheckpointError
from edge_vlm.formats.usage import SECTIONS, Usage
from edge_vlm.json_text import MALFORMED
from edge_vlm.model.hollow import hollow
from edge_vlm.model.published.files import WEIGHTS as WEIGHTS
from edge_vlm.model.published.files import read_json, read_layout
from edge_vlm.model.published.mapping import FLOATS, check_fit, shapes
from edge_vlm.model.video_lm import VideoLM

CONFIG, TOKENIZER = "config.json", "tokenizer.json"


def save_checkpoint(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Path,
    usage: Usage | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the folder; each file appears whole or not at all.

    Weights are read one by one, so they may be a mapping that loads or converts what is asked for.
    `dtype` is what they are stored in (by default that of the first).
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = shapes(config)
    if unknown := sorted(weights.keys() - wanted.keys()):
        raise ValueError(f"weights that the model lacks: {', '.join(unknown)}")
    dtype = dtype or weights[next(iter(wanted))].dtype
    write_tensors(folder / WEIGHTS, wanted, dtype, ((name, weights[name]) for name in wanted))
    data = config.to_dict() | (Usage() if usage is None else usage).to_dict()
    write_text(folder / CONFIG, json.dumps(data, indent=1))
    if tokenizer != folder / TOKENIZER:
        shutil.copyfile(tokenizer, folder / TOKENIZER)


def load_checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> VideoLM:
    """Raises CheckpointError for a missing or unreadable file, WeightNamesError for a misfit."""
    for name in (CONFIG, WEIGHTS, TOKENIZER):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"the checkpoint lacks {name}",
                where=folder,
                remedy="point to a folder written by `edge-vlm train`",
            )
    config = read_config(folder)
    check_fit(shapes(config), read_layout(folder), folder / WEIGHTS)
    # Copied rather than mapped: training may go on from here and replace the file.
    return assemble(config, read_tensors(folder / WEIGHTS), dtype, copy=True)


def read_config(folder: Path) -> ModelConfig:
    """Raises CheckpointError for a config.json that is not one of our own."""
    return read_own(folder)[0]


def read_own(folder: Path) -> tuple[ModelConfig, Usage]:
    """As `read_config`, with what the model was trained to be given."""
    data = read_json(folder / CONFIG)
    usage = {name: data.pop(name) for name in SECTIONS if name in data}
    try:
        return ModelConfig.from_dict(data), Usage.from_dict(usage)
    except MALFORMED as error:
        raise CheckpointError(f"bad config: {error}", where=folder / CONFIG) from error


def assemble(
    config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype, *, copy: bool = False
) -> VideoLM:
    """A model that uses these tensors themselves where they are of `dtype` already.

    With `copy` none of them is shared. Nothing else is allocated.
    """
    if dtype not in FLOATS:
        raise ValueError(f"dtype = {dtype}: must be one of {', '.join(map(str, FLOATS))}")
    model = hollow(config)
    cast = {name: tensor.to(dtype, copy=copy) for name, tensor in weights.items()}
    model.load_state_dict(cast, assign=True)
    return model.eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped. Raises CheckpointError if it is not whole."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"not a whole safetensors file: {error}", where=path, remedy="copy the file again"
        ) from error
    return tensors


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Writes a safetensors file that appears whole or not at all, a tensor at a time.

    The library's own writer wants all tensors at once. `tensors` come in the order of `shapes`.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # as transformers asks
    end = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": FLOATS[dtype],
            "shape": list(shape),
            "data_offsets": [end, end := end + size],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f"{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), (given, tensor) in zip(shapes.items(), tensors, strict=True):
            if (name, shape) != (given, tuple(tensor.shape)):
                raise ValueError(f"{given} {list(tensor.shape)} in the place of {name} {shape}")
            flat = tensor.detach().to("cpu", dtype).contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy().data)
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.partial")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)
