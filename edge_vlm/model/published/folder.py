"""Loads and writes published Molmo2 folders: `config.json` and one or several safetensors files.

Folders of the model hub, of transformers' own class and of the training repository's names, with an
STTS scorer inside or without, are told apart by their weight names.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from edge_vlm.config import ModelConfig, Rescale, ScorerConfig
from edge_vlm.errors import CheckpointError, ConfigError
from edge_vlm.model.checkpoint import CONFIG, assemble, read_tensors, write_tensors
from edge_vlm.model.published.config import config_from_published, published_config
from edge_vlm.model.published.files import INDEX, WEIGHTS, StoredTensor, read_json, read_layout
from edge_vlm.model.published.mapping import (
    check_published,
    published_items,
    published_shapes,
    to_ours,
)
from edge_vlm.model.published.names import HUB, STTS, Naming, recognise
from edge_vlm.model.video_lm import VideoLM

SCORER_WIDTH = "temporal_token_scorer.mlp.w1.bias"
STTS_PRUNE_AT = 3
MAX_SHARD_BYTES = 4_000_000_000

# What stands beside the weights of a published folder and is needed to use them.
COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
)


@dataclasses.dataclass(frozen=True)
class PublishedFolder:
    """A folder whose files, names, shapes and types fit its config; no weight was read yet."""

    path: Path
    config: ModelConfig
    naming: Naming
    tensors: dict[str, StoredTensor]

    @property
    def files(self) -> list[str]:
        return sorted({tensor.file for tensor in self.tensors.values()})


def open_published(folder: Path) -> PublishedFolder:
    """Checks a folder by its config and its files' headers.

    Raises ConfigError (another model family, or a variant that is not computed here),
    WeightFilesError (absent, cut off or pickled files), WeightNamesError (weights that do not fit
    the config), CheckpointError (no config); each lists all that it found.
    """
    cfg = config_from_published(read_json(folder / CONFIG), where=folder / CONFIG)
    tensors = read_layout(folder)
    naming = recognise(tensors, where=folder)
    if naming is STTS:
        raise CheckpointError(
            "these weights are a vision side without a language model",
            where=folder,
            remedy="expected are the weights of a whole model",
        )
    widths = [t.shape for name, t in tensors.items() if name.endswith(SCORER_WIDTH)]
    if widths:
        try:
            cfg = dataclasses.replace(cfg, scorer=stts_scorer(cfg, sum(widths[0])))
        except ValueError as error:
            raise ConfigError(f"no room for the scorer: {error}", where=folder) from error
    check_published(naming, cfg, tensors, where=folder)
    return PublishedFolder(folder, cfg, naming, tensors)


def load_published(folder: Path, dtype: torch.dtype = torch.float32) -> VideoLM:
    """The model of a published folder, on the CPU. Raises as `open_published`.

    Weights that are stored in `dtype` stay mapped files, which the system reads when they are used
    and may drop again; the others are converted one by one. Either way the only memory of its own
    that the model takes is that of converted or joined tensors (of a hub folder the embedding
    table).
    """
    found = open_published(folder)
    weights: dict[str, Tensor] = {}
    for file in found.files:
        weights.update(read_tensors(folder / file))
    ours = to_ours(found.naming, found.config, weights, folder, dtype)
    return assemble(found.config, ours, dtype)


def save_published(
    folder: Path,
    model: VideoLM,
    *,
    companions: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a model as a folder of the model hub, which transformers loads as Molmo2.

    `companions` is the folder whose tokenizer, processor files and config.json are taken over.
    Written into an empty or new folder, weights last, a shard at a time. Raises CheckpointError if
    the folder is not empty, ConfigError for a model that a published config cannot describe or that
    is not the one described in `companions`.
    """
    cfg = model.cfg
    config = published_config(cfg)
    if cfg.scorer is not None and cfg.scorer != stts_scorer(cfg, cfg.scorer.mlp_width):
        raise ConfigError(
            "a published folder cannot say how this scorer differs from that of STTS",
            remedy="save it as a checkpoint of this project",
        )
    if companions is not None:
        config = read_json(companions / CONFIG)
        if config_from_published(config, companions / CONFIG) != without_scorer(cfg):
            raise ConfigError("this config is that of another model", where=companions / CONFIG)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError("is in the way", where=folder, remedy="give a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name in COMPANIONS:
        if companions is not None and (companions / name).is_file():
            shutil.copyfile(companions / name, folder / name)
    _write(folder / CONFIG, json.dumps(config, indent=2))
    weights = {name: t.detach() for name, t in model.state_dict().items()}
    width = next(iter(weights.values())).element_size()
    shards = _shards(published_shapes(HUB, cfg), max_shard_bytes // width)
    items = published_items(HUB, cfg, weights)
    weight_map: dict[str, str] = {}
    total = 0
    for i, names in enumerate(shards):
        of = f"-{i + 1:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = WEIGHTS.replace(".", f"{of}.", 1)
        shard = dict(next(items) for _ in names)
        total += sum(tensor.numel() for tensor in shard.values())
        weight_map |= dict.fromkeys(shard, file)
        write_tensors(folder / file, shard)
    if len(shards) > 1:
        sizes = {"total_parameters": total, "total_size": total * width}
        index = {"metadata": sizes, "weight_map": weight_map}
        _write(folder / INDEX, json.dumps(index, indent=2))


def stts_scorer(cfg: ModelConfig, mlp_width: int) -> ScorerConfig:
    """The scorer of the published STTS code (arXiv 2603.18004) for this vision side."""
    return ScorerConfig(
        prune_at=STTS_PRUNE_AT,
        num_heads=cfg.vision.num_heads,
        head_dim=cfg.vision.head_dim,
        mlp_width=mlp_width,
        rescale=Rescale.ROW,
    )


def without_scorer(cfg: ModelConfig) -> ModelConfig:
    return dataclasses.replace(cfg, scorer=None)


def _shards(shapes: dict[str, tuple[int, ...]], most: int) -> list[list[str]]:
    """Names in order, cut so that no part holds more than `most` numbers, or else one tensor."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        if shards[-1] and held + size > most:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.partial")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)
