"""peft's adapter format: `adapter_config.json` and `adapter_model.safetensors`.

Written by transformers' names of Molmo2's layers, so that peft puts an adapter on that model. Read
by these or by those of the hub's own code, whose fused layers (`att_proj`, `ff_proj`) are taken
apart: a fused layer's down factor is shared, the rows of its up factor are dealt out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edge_vlm.config import ModelConfig
from edge_vlm.errors import ConfigError, WeightFilesError, WeightNamesError
from edge_vlm.json_text import MALFORMED
from edge_vlm.model.checkpoint import read_tensors, write_tensors, write_text
from edge_vlm.model.lora.layers import DOWN, UP
from edge_vlm.model.published.files import read_json
from edge_vlm.model.published.mapping import shapes
from edge_vlm.model.published.names import HUB, TRANSFORMERS, recognise

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
MOST_ALPHA = 1e9
MOST_PATTERN, MOST_REPEATS = 2000, 3
"""Characters of a pattern, and how often something is repeated in it."""
_REPEATED = re.compile(r"\)[*+{]|\(\?[^:]|\\[1-9]")
"""A group that is repeated, named, looked ahead for or referred to."""
_PREFIX = "base_model.model."
_FACTOR = re.compile(rf"{re.escape(_PREFIX)}(.+)\.({DOWN}|{UP})(?:\.default)?\.weight")
# What changes the arithmetic in a way that is not computed here, where it is not one of these.
_PLAIN: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    # Others replace the base's weights, which then do not lie in its folder.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}
_UNUSED = (
    *("use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias", "layer_replication"),
    *("modules_to_save", "trainable_token_indices", "target_parameters", "velora_config"),
    *("alora_invocation_tokens", "monteclora_config", "arrow_config", "kasa_config"),
)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """What is added to one of our layers: `scale * up @ down`."""

    down_rI: Tensor
    up_Or: Tensor
    scale: float


@dataclasses.dataclass(frozen=True)
class Adapter:
    layers: Mapping[str, Adapted]
    """By our names, without `.weight`."""
    naming: str
    """Whose names its file has."""


def base_name(folder: Path) -> str | None:
    """What an adapter's config says it belongs to: a path or a name of the hub."""
    name = read_json(folder / CONFIG).get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def write_adapter(
    folder: Path,
    cfg: ModelConfig,
    layers: Mapping[str, tuple[Tensor, Tensor]],
    rank: int,
    alpha: float,
    base: Path,
) -> None:
    """Writes both files into an existing folder, factors in float32; `layers` are of one rank."""
    theirs = _module_names(cfg)
    written = {
        f"{_PREFIX}{theirs[name]}.{kind}.weight": tensor
        for name, pair in layers.items()
        for kind, tensor in zip((DOWN, UP), pair, strict=True)
    }
    sizes = {name: tuple(tensor.shape) for name, tensor in written.items()}
    write_tensors(folder / WEIGHTS, sizes, torch.float32, written.items())
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": _pattern([theirs[name] for name in layers]),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    write_text(folder / CONFIG, json.dumps(config, indent=2))


def read_adapter(folder: Path, cfg: ModelConfig) -> Adapter:
    """The adapter for a model of this shape.

    Raises ConfigError for a kind of adapter that is not computed here, WeightFilesError for absent,
    pickled or damaged files, WeightNamesError listing every tensor that does not fit.
    """
    config = _checked_config(folder)
    if not (folder / WEIGHTS).is_file():
        pickled = f", and {_PICKLE} is a pickle, which can run code" * (folder / _PICKLE).is_file()
        fault = f"there is no {WEIGHTS}{pickled}"
        remedy = "save it again with peft's save_pretrained(..., safe_serialization=True)"
        raise WeightFilesError(fault, where=folder, remedy=remedy, problems=(fault,))
    tensors = read_tensors(folder / WEIGHTS)
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            unknown.append(name)
        else:
            found.setdefault(match[1], {})[match[2]] = tensor
    naming = recognise((f"{module}.weight" for module in found), where=folder / WEIGHTS)
    wanted = shapes(cfg)
    rows = {
        row.published[0].removesuffix(".weight"): [n.removesuffix(".weight") for n in row.ours]
        for row in naming.expand(cfg)
        if len(row.published) == 1 and len(wanted[row.ours[0]]) == 2
    }
    missing, misshaped = [], []
    layers: dict[str, Adapted] = {}
    for module, pair in found.items():
        if naming not in (HUB, TRANSFORMERS) or module not in rows:
            unknown += [f"{_PREFIX}{module}.{kind}.weight" for kind in pair]
            continue
        if absent := [kind for kind in (DOWN, UP) if kind not in pair]:
            missing += [f"{_PREFIX}{module}.{kind}.weight" for kind in absent]
            continue
        down, up = pair[DOWN], pair[UP]
        sizes = [wanted[f"{name}.weight"] for name in rows[module]]
        heights, rank = [size[0] for size in sizes], len(down)
        if tuple(down.shape) != (rank, sizes[0][1]) or tuple(up.shape) != (sum(heights), rank):
            expected = f"[r, {sizes[0][1]}] and [{sum(heights)}, r]"
            told = f"{list(down.shape)} and {list(up.shape)}"
            misshaped.append(f"{module} is {told}, expected {expected}")
            continue
        scale = _scale(config, module, rank)
        for name, part in zip(rows[module], torch.split(up, heights), strict=True):
            layers[name] = Adapted(down, part, scale)
    faults = {"unknown": sorted(unknown), "missing": missing, "misshaped": misshaped}
    if any(faults.values()) or not layers:
        told = "; ".join(f"{kind}: {_abridged(names)}" for kind, names in faults.items() if names)
        raise WeightNamesError(
            f"the adapter does not fit the model: {told or 'it holds nothing'}",
            where=folder / WEIGHTS,
            remedy="take the adapter's own base, with LoRA on linear layers alone",
            missing=tuple(missing),
            unknown=tuple(faults["unknown"]),
            misshaped=tuple(misshaped),
        )
    return Adapter(layers, naming.name)


def _checked_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG)
    wrong = [
        f"{key} = {config[key]!r}"
        for key, allowed in _PLAIN.items()
        if key in config and config[key] not in allowed
    ]
    wrong += [f"{key} = {config[key]!r}" for key in _UNUSED if config.get(key)]
    if config.get("peft_type") != "LORA":
        wrong.insert(0, f"peft_type = {config.get('peft_type')!r}")
    for key in ("r", "lora_alpha"):
        value: Any = config.get(key)
        if type(value) not in (int, float) or not 0 < value < MOST_ALPHA:
            wrong.append(f"{key} = {value!r}")
    if not _is_alpha_pattern(config.get("alpha_pattern") or {}):
        wrong.append(f"alpha_pattern = {config['alpha_pattern']!r}")
    if wrong:
        raise ConfigError(
            f"an adapter of a kind that is not computed here: {', '.join(wrong)}",
            where=folder / CONFIG,
            remedy="merge it into its base with peft (merge_and_unload), and name that folder",
        )
    return config


def _is_alpha_pattern(patterns: object) -> bool:
    try:
        return isinstance(patterns, dict) and all(
            _is_quick(pattern) and re.compile(pattern) and 0 < float(value) < math.inf
            for pattern, value in patterns.items()
        )
    except (re.error, *MALFORMED):
        return False


def _is_quick(pattern: str) -> bool:
    """Regular expressions that repeat groups, or repeat much, can take years to match a name."""
    repeats = sum(map(pattern.count, "*+{?"))
    return (
        len(pattern) <= MOST_PATTERN and repeats <= MOST_REPEATS and not _REPEATED.search(pattern)
    )


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """As peft has it; a pattern is a name's end, as a regular expression."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(?:.*\.)?(?:{pattern})$", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _module_names(cfg: ModelConfig) -> dict[str, str]:
    """Transformers' names of our layers."""
    return {
        row.ours[0].removesuffix(".weight"): row.published[0].removesuffix(".weight")
        for row in TRANSFORMERS.expand(cfg)
    }


def _pattern(modules: Sequence[str]) -> str:
    """A regular expression of these names, with any number of a block."""
    kinds = dict.fromkeys(re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(m)) for m in modules)
    return "|".join(kinds)


def _abridged(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
