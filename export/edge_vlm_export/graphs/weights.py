"""Where the weights of an export come from: a folder, or chance.

Tensors are read when asked for, one at a time, from mapped files: a model never has to fit into
memory as a whole.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import edge_vlm.presets as recipes
from edge_vlm.config import ModelConfig
from edge_vlm.errors import ConfigError
from edge_vlm.formats.bundle import sha256_of_file
from edge_vlm.formats.usage import FrameRule, ModelCard
from edge_vlm.model.hollow import hollow
from edge_vlm.model.published.folder import ModelFolder, open_folder
from edge_vlm.model.published.mapping import shapes
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.pixels.stills import ImageConfig
from edge_vlm.text.prompt import PLAIN, PromptFormat, PromptStyle, has_image_tokens
from edge_vlm.text.tokenizer import Tokenizer

SMALL_PARAMETERS = 1 << 16
"""Parameters with fewer numbers than this stay in a streamed model."""
RANDOM_SHAPES = ("molmo2_4b", "molmo2_8b", "molmo2_o_7b", "tiny")


@dataclass(frozen=True, kw_only=True)
class WeightSource:
    cfg: ModelConfig
    tokenizer: Path
    name: str
    """Of the model, if the user gives none."""
    identity: Mapping[str, Any]
    """What the bundle's manifest says about where its weights came from."""
    read: Callable[[str], Tensor]
    """A tensor by our name."""
    style: PromptStyle = PLAIN
    images: ImageConfig | None = None
    """How still pictures are cut; None for a model that knows video only."""
    frames: FrameRule | None = None
    """Which frames of a whole clip it was trained on."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Settings of a session that it was trained for."""
    card: ModelCard | None = None
    """What it knows, in words."""
    notes: tuple[str, ...] = ()
    """What to tell whoever exports it."""

    def float32(self, name: str) -> Tensor:
        return self.read(name).detach().float()


def open_weights(folder: Path, tokenizer: Path | None = None) -> WeightSource:
    """A checkpoint or a published folder (`open_folder`); nothing is read yet.

    Raises what loading them raises: CheckpointError for missing, unreadable and unfitting files,
    ConfigError for a variant that is not computed here or a tokenizer that does not fit.
    """
    found = open_folder(folder, tokenizer)
    words = found.require_tokenizer()
    usage = found.usage
    return WeightSource(
        cfg=found.config,
        tokenizer=words,
        name=folder.resolve().name,
        identity=identity_of(found),
        read=found.weights.__getitem__,
        style=usage.style,
        # A vocabulary of video only has no words for pictures.
        images=usage.images if has_image_tokens(Tokenizer.from_file(words)) else None,
        frames=usage.frames,
        defaults=usage.defaults,
        card=usage.card,
        notes=found.notes,
    )


def scored_by_change(source: WeightSource, after_block: int | None = None) -> WeightSource:
    """The same weights with the scorer that has none (`edge_vlm.pruning.change`).

    Raises ConfigError for a block that is too far back.
    """
    try:
        cfg = source.cfg.scored_by_change(after_block)
    except ValueError as error:
        raise ConfigError(
            str(error), where="--scorer-block", remedy="scores come before the features are read"
        ) from error
    notes = source.notes
    if source.cfg.scorer is not None:
        notes = (*notes, "the scorer that was trained with these weights is left out")
    return replace(source, cfg=cfg, notes=notes)


def identity_of(found: ModelFolder) -> dict[str, Any]:
    """Name and hashes of a folder's files."""
    named = {os.path.relpath(path, found.path): path for path in found.weight_files}
    named[found.config_file.name] = found.config_file
    if found.tokenizer is not None:
        named[found.tokenizer.name] = found.tokenizer
    hashed = {name: sha256_of_file(path) for name, path in named.items()}
    return {"checkpoint": found.path.resolve().name, "sha256": dict(sorted(hashed.items()))}


def random_weights(
    shape: str,
    seed: int,
    tokenizer: Path,
    *,
    with_scorer: bool = True,
    with_images: bool = False,
) -> WeightSource:
    """A model of a known shape with weights made up tensor by tensor: same seed, same weights.

    For trying an export, an engine build or a device without the real weights. Raises ConfigError
    for an unknown shape, and for `with_images` where shape or vocabulary are made for video only.
    """
    if shape not in RANDOM_SHAPES:
        raise ConfigError(f"no shape {shape!r}", remedy=f"one of {', '.join(RANDOM_SHAPES)}")
    if not tokenizer.is_file():
        raise ConfigError("there is no such tokenizer.json", where=tokenizer)
    cfg: ModelConfig = getattr(recipes, shape)()
    if not with_scorer:
        cfg = replace(cfg, scorer=None)
    images = ImageConfig() if with_images else None
    if images is not None and not _fits_images(images, cfg, tokenizer):
        raise ConfigError(
            f"{shape} with this tokenizer.json cannot read still pictures",
            where=tokenizer,
            remedy="take a molmo2 shape and the published tokenizer.json",
        )
    return replace(made_up_weights(cfg, seed, tokenizer, shape), images=images)


def made_up_weights(cfg: ModelConfig, seed: int, tokenizer: Path, shape: str) -> WeightSource:
    """As `random_weights`, for any configuration; `shape` is what it is called."""
    wanted = shapes(cfg)
    norms = _norm_weights(cfg)
    blocks = {"vit": cfg.vision.num_layers, "llm": cfg.language.num_layers}

    def read(name: str) -> Tensor:
        size = wanted[name]
        if name in norms:
            return torch.ones(size)
        if name.endswith(".bias"):
            return torch.zeros(size)
        generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
        std = 0.02 if name in ("vit.pos_embed", "llm.embed.weight") else size[-1] ** -0.5
        if name.endswith(("attn.o.weight", "fc2.weight", "mlp.down.weight")):
            std /= math.sqrt(2 * blocks.get(name.partition(".")[0], 1))
        return torch.randn(size, generator=generator) * std

    return WeightSource(
        cfg=cfg,
        tokenizer=tokenizer,
        name=f"random-{shape}",
        identity={"random_weights": shape, "seed": seed},
        read=read,
    )


def _fits_images(images: ImageConfig, cfg: ModelConfig, tokenizer: Path) -> bool:
    wide = cfg.vision.patch_grid > 2 * sum(images.overlap)
    return wide and has_image_tokens(Tokenizer.from_file(tokenizer))


def _norm_weights(cfg: ModelConfig) -> set[str]:
    model = hollow(cfg)
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if "norm" in name.rpartition(".")[2]
    }


def prompt_of(source: WeightSource) -> PromptFormat:
    """Raises ConfigError if the tokenizer is that of another model."""
    language = source.cfg.language
    try:
        prompt = PromptFormat(Tokenizer.from_file(source.tokenizer), source.style)
    except KeyError as error:
        raise ConfigError(str(error.args[0]), where=source.tokenizer) from error
    last_written = max(prompt.bos_id, *prompt.eos_ids)
    if prompt.patch_id >= language.vocab or last_written >= language.base_vocab:
        raise ConfigError(
            f"the tokenizer has ids up to {max(prompt.patch_id, last_written)}, the model "
            f"{language.vocab} words",
            where=source.tokenizer,
            remedy="name the tokenizer.json that belongs to the weights",
        )
    return prompt


def streamed_model(source: WeightSource) -> VideoLM:
    """The model in float32, with every large weight read when its module runs and dropped after.

    Modules must be called, not looked into: their large parameters are empty in between.
    """
    model = hollow(source.cfg)
    for prefix, module in model.named_modules():
        large: dict[str, str] = {}
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{prefix}.{name}" if prefix else name
            called = isinstance(module, nn.Linear | nn.Embedding)
            if called and parameter.numel() >= SMALL_PARAMETERS:
                large[name] = full
            else:
                setattr(module, name, _parameter(source.float32(full)))
        if large:
            _stream(module, large, source)
    return model.eval()


def _stream(module: nn.Module, names: Mapping[str, str], source: WeightSource) -> None:
    empty = {name: getattr(module, name) for name in names}

    def fill(module: nn.Module, inputs: object) -> None:
        for name, full in names.items():
            setattr(module, name, _parameter(source.float32(full)))

    def drop(module: nn.Module, inputs: object, output: object) -> None:
        for name, parameter in empty.items():
            setattr(module, name, parameter)

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(drop)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
