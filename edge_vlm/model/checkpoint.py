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
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.model.weights import check_fit, shapes

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


def save_checkpoint(
    folder: Path, config: ModelConfig, weights: Mapping[str, Tensor], tokenizer: Path
) -> None:
    """Writes the folder; each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{WEIGHTS}.partial"
    save_file({name: t.detach().contiguous() for name, t in weights.items()}, temporary)
    os.replace(temporary, folder / WEIGHTS)
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
    try:
        config = ModelConfig.from_dict(json.loads((folder / CONFIG).read_text()))
    except ValueError as error:
        raise CheckpointError(f"bad config: {error}", where=folder / CONFIG) from error
    weights = read_tensors(folder / WEIGHTS)
    check_fit(shapes(config), weights, folder / WEIGHTS)
    model = VideoLM(config)
    model.load_state_dict(weights)
    return model.to(dtype).eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises CheckpointError if it is not a whole one."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"not a whole safetensors file: {error}", where=path, remedy="copy the file again"
        ) from error
