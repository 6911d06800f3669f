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
from edge_vlm.errors import CheckpointError, WeightNamesError
from edge_vlm.model.video_lm import VideoLM

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
                f"the checkpoint lacks {name}", where=folder,
                remedy="point to a folder written by `edge-vlm train`",
            )
    try:
        config = ModelConfig.from_dict(json.loads((folder / CONFIG).read_text()))
    except ValueError as error:
        raise CheckpointError(f"bad config: {error}", where=folder / CONFIG) from error
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise CheckpointError(
            f"not a whole safetensors file ({error})", where=folder / WEIGHTS,
            remedy="copy the file again",
        ) from error
    model = VideoLM(config)
    check_names(model, weights, folder / WEIGHTS)
    model.load_state_dict(weights)
    return model.to(dtype).eval()


def check_names(model: VideoLM, weights: Mapping[str, Tensor], where: object) -> None:
    """Raises WeightNamesError listing every missing, unknown and mis-shaped name."""
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    missing = tuple(sorted(wanted.keys() - found.keys()))
    unknown = tuple(sorted(found.keys() - wanted.keys()))
    misshaped = tuple(
        f"{name} is {found[name]}, expected {wanted[name]}"
        for name in sorted(wanted.keys() & found.keys())
        if wanted[name] != found[name]
    )
    if missing or unknown or misshaped:
        raise WeightNamesError(
            f"weights do not fit the config: {len(missing)} missing, {len(unknown)} unknown, "
            f"{len(misshaped)} mis-shaped; first: {(missing + unknown + misshaped)[0]}",
            where=where, missing=missing, unknown=unknown, misshaped=misshaped,
            remedy="use the config.json that was saved with these weights",
        )
