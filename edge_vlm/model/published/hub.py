"""Writes a model as a folder of the model hub, which transformers loads as Molmo2.

What such a folder has no words for goes where others do not look: a scorer's weights into a file of
their own, its shape, the attention and what the model was trained to be given into `config.json`
under a key that transformers keeps and does not read.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edge_vlm.config import ModelConfig, VisionAttention
from edge_vlm.errors import CheckpointError, ConfigError
from edge_vlm.formats.usage import Usage
from edge_vlm.model.checkpoint import CONFIG, TOKENIZER, write_tensors, write_text
from edge_vlm.model.published.config import (
    RECORD,
    config_from_published,
    published_config,
    record_of,
)
from edge_vlm.model.published.files import INDEX, SCORER, WEIGHTS, read_json
from edge_vlm.model.published.folder import stts_scorer
from edge_vlm.model.published.mapping import check_fit, published_items, published_shapes, shapes
from edge_vlm.model.published.names import HUB, Naming
from edge_vlm.model.published.processor import BILINEAR, CROPS, IMAGES, PROCESSOR, VIDEOS
from edge_vlm.model.published.tokens import GENERATION
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.text.prompt import PAD
from edge_vlm.text.tokenizer import Tokenizer

MAX_SHARD_BYTES = 4_000_000_000

# What stands beside the weights of a published folder and is needed to use them.
COMPANIONS = (
    *(TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", GENERATION, IMAGES, VIDEOS, PROCESSOR),
)

_SCORER_ROWS = Naming("scorer", tuple(r for r in HUB.rows if r.ours[0].startswith("scorer.")))


def save_published(
    folder: Path,
    model: VideoLM,
    *,
    usage: Usage | None = None,
    companions: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """As `write_hub`, of a model in memory, with the config.json of `companions` too.

    Raises ConfigError if that is not the config of this model.
    """
    weights = model.state_dict()
    check_fit(shapes(model.cfg), weights)
    dtype = next(iter(weights.values())).dtype
    write_hub(
        folder,
        *(model.cfg, weights, dtype),
        usage=usage,
        config=None if companions is None else config_of(companions, model.cfg),
        companions=companions,
        max_shard_bytes=max_shard_bytes,
    )


def write_hub(
    folder: Path,
    cfg: ModelConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    usage: Usage | None = None,
    config: dict[str, Any] | None = None,
    companions: Path | None = None,
    tokenizer: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes into an empty or new folder, weights last, a tensor at a time.

    `companions` is the folder whose tokenizer and processor files are taken over; `tokenizer` a
    tokenizer.json that is taken instead of its, `config` a config.json (`config_of`). With a
    `usage` the processor and generation files are made to say it. Raises CheckpointError if the
    folder is not empty, ConfigError for a model that a published config cannot describe.
    """
    described = published_config(cfg)
    config = dict(described if config is None else config)
    record = record_of(cfg)
    if usage is not None:
        record |= usage.to_dict()
        config["use_frame_special_tokens"] = usage.style.own_frame_markers
    if usage is not None or not _is_known(cfg):
        config[RECORD] = record
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError("is in the way", where=folder, remedy="give a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name in COMPANIONS:
        if companions is not None and (companions / name).is_file():
            shutil.copyfile(companions / name, folder / name)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, folder / TOKENIZER)
    if usage is not None:
        _write_usage(folder, usage, cfg)
    write_text(folder / CONFIG, json.dumps(config, indent=2))
    _write_weights(folder, replace(cfg, scorer=None), weights, dtype, max_shard_bytes)
    if cfg.scorer is not None:
        sizes = published_shapes(_SCORER_ROWS, cfg)
        items = published_items(_SCORER_ROWS, cfg, weights, dtype)
        write_tensors(folder / SCORER, sizes, dtype, items)


def hub_notes(cfg: ModelConfig) -> list[str]:
    """What a reader of the folder other than this project will not do."""
    notes = []
    if cfg.attention is not VisionAttention.ALL:
        notes.append(
            f"transformers computes vision attention 'all' with these weights, which were trained "
            f"with {cfg.attention.value!r}: its answers differ"
        )
    if cfg.scorer is not None:
        notes.append(f"transformers does not read {SCORER}: it keeps every cell")
    return notes


def _is_known(cfg: ModelConfig) -> bool:
    """Whether a reader finds out by itself, as with the released models."""
    scorer = cfg.scorer
    usual = scorer is None or scorer == stts_scorer(cfg, scorer.mlp_width)
    return usual and cfg.attention is VisionAttention.ALL


def config_of(folder: Path, cfg: ModelConfig) -> dict[str, Any]:
    """A hub folder's own config.json. Raises ConfigError if it is that of another model."""
    found = read_json(folder / CONFIG)
    plain = replace(cfg, scorer=None, attention=VisionAttention.ALL)
    if config_from_published(found, folder / CONFIG) != plain:
        raise ConfigError("this config is that of another model", where=folder / CONFIG)
    found.pop(RECORD, None)
    return found


def _write_weights(
    folder: Path,
    cfg: ModelConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    sizes = published_shapes(HUB, cfg)
    shards = _shards(sizes, max_shard_bytes // dtype.itemsize)
    items = published_items(HUB, cfg, weights, dtype)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        of = f"-{i + 1:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = WEIGHTS.replace(".", f"{of}.", 1)
        held = {name: sizes[name] for name in names}
        write_tensors(folder / file, held, dtype, (next(items) for _ in names))
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(map(math.prod, sizes.values()))
        metadata = {"total_parameters": total, "total_size": total * dtype.itemsize}
        index = {"metadata": metadata, "weight_map": weight_map}
        write_text(folder / INDEX, json.dumps(index, indent=2))


def _write_usage(folder: Path, usage: Usage, cfg: ModelConfig) -> None:
    """The processor and generation files, with what they said beyond it."""
    style, vision = usage.style, cfg.vision
    pictures = {
        "size": {"height": vision.image_size, "width": vision.image_size},
        "patch_size": vision.patch_size,
        "resample": BILINEAR,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_convert_rgb": True,
        "processor_class": "Molmo2Processor",
    }
    flags = {
        "processor_class": "Molmo2Processor",
        "image_use_col_tokens": True,
        "use_single_crop_col_tokens": style.low_res_columns,
        "use_single_crop_start_token": style.low_res_start,
        "video_use_col_tokens": False,
        "use_frame_special_tokens": style.own_frame_markers,
    }
    whole = _stored(folder / PROCESSOR) | flags
    images = {
        **pictures,
        "image_processor_type": "Molmo2ImageProcessor",
        "crop_mode": CROPS,
    }
    if usage.images is not None:
        images |= {
            "max_crops": usage.images.max_crops,
            "overlap_margins": list(usage.images.overlap),
            "pooling_size": [usage.images.pool] * 2,
        }
    videos = {**pictures, "video_processor_type": "Molmo2VideoProcessor", "pooling_size": [3, 3]}
    if usage.frames is not None:
        videos |= {
            "num_frames": usage.frames.num_frames,
            "max_fps": usage.frames.max_fps,
            "frame_sample_mode": usage.frames.mode,
        }
    for key, file, settings in (
        ("image_processor", IMAGES, images),
        ("video_processor", VIDEOS, videos),
    ):
        if key in whole:  # as transformers 5 has it, all in one file
            whole[key] = {**whole[key], **settings}
        else:
            write_text(folder / file, json.dumps(_stored(folder / file) | settings, indent=2))
    write_text(folder / PROCESSOR, json.dumps(whole, indent=2))
    _write_generation(folder, usage)


def _write_generation(folder: Path, usage: Usage) -> None:
    words = Tokenizer.from_file(folder / TOKENIZER)
    ends = [words.id_of(token) for token in usage.style.ends]
    settings: dict[str, Any] = {
        "bos_token_id": words.id_of(usage.style.begin),
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": words.id_of(PAD),
    }
    if usage.defaults.get("temperature"):
        settings |= {
            "do_sample": True,
            "temperature": usage.defaults["temperature"],
            "top_p": usage.defaults.get("top_p", 1.0),
        }
    path = folder / GENERATION
    write_text(path, json.dumps(_stored(path) | settings, indent=2))


def _stored(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


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
