"""A checkpoint folder: `config.json`, `model.safetensors`, `tokenizer.json`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from edge_vlm.config import ModelConfig
from edge_vlm.errors import CheckpointError
from edge_vlm.model.published.files import WEIGHTS as WEIGHTS
from edge_vlm.model.published.files import read_json, read_layout
from edge_vlm.model.published.mapping import FLOATS, check_fit, shapes
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.model.vit import cell_patch_table

CONFIG, TOKENIZER = "config.json", "tokenizer.json"


def save_checkpoint(
    folder: Path, config: ModelConfig, weights: Mapping[str, Tensor], tokenizer: Path
) -> None:
    """Writes the folder; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, {name: t.detach() for name, t in weights.items()})
    temporary = folder / f"{CONFIG}.partial"
    temporary.write_text(json.dumps(config.to_dict(), indent=1) + "\n")
    os.replace(temporary, folder / CONFIG)
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
    try:
        return ModelConfig.from_dict(read_json(folder / CONFIG))
    except ValueError as error:
        raise CheckpointError(f"bad config: {error}", where=folder / CONFIG) from error


def assemble(
    config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype, *, copy: bool = False
) -> VideoLM:
    """A model that uses these tensors themselves where they are of `dtype` already.

    With `copy` none of them is shared. Nothing else is allocated.
    """
    if dtype not in FLOATS:
        raise ValueError(f"dtype = {dtype}: must be one of {', '.join(map(str, FLOATS))}")
    with torch.device("meta"):
        model = VideoLM(config)
    cast = {name: tensor.to(dtype, copy=copy) for name, tensor in weights.items()}
    model.load_state_dict(cast, assign=True)
    # The one buffer that is computed rather than stored was computed on the meta device.
    model.vit.cell_patches_C9 = cell_patch_table(config.vision.patch_grid)
    return model.eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped. Raises CheckpointError if it is not whole."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    except SafetensorError as error:
        raise CheckpointError(
            f"not a whole safetensors file: {error}", where=path, remedy="copy the file again"
        ) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file that appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.partial")
    # "pt" tells transformers that no other framework wrote the file.
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, {"format": "pt"})
    os.chmod(temporary, 0o644)  # the library's 0600 would keep a server under another user out
    os.replace(temporary, path)
