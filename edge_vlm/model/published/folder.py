"""Opens a folder of weights, whoever wrote it: this project, the model hub, transformers or the
training repository, with an STTS scorer inside or without; or an adapter (`edge_vlm.model.lora`).

A folder is checked by its config and its files' headers; no weight is read until it is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from edge_vlm.config import ModelConfig, Rescale, ScorerConfig
from edge_vlm.errors import CheckpointError, ConfigError
from edge_vlm.formats.usage import SECTIONS, Usage
from edge_vlm.model.checkpoint import CONFIG, TOKENIZER, assemble, read_own, read_tensors
from edge_vlm.model.published.config import RECORD, config_from_published, with_record
from edge_vlm.model.published.files import StoredTensor, read_json, read_layout
from edge_vlm.model.published.mapping import OurTensors, check_published, own_naming
from edge_vlm.model.published.names import STTS, TRAINING, TRAINING_TIED, Naming, recognise
from edge_vlm.model.published.processor import read_processors
from edge_vlm.model.published.tokens import with_tokens
from edge_vlm.model.published.torch_files import (
    SHARDED,
    UNSHARDED,
    ShardedTensors,
    layout_of,
    read_unsharded,
)
from edge_vlm.model.published.training import CONFIG as TRAINING_CONFIG
from edge_vlm.model.published.training import find_weights, read_training_config
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.text.prompt import PATCH
from edge_vlm.text.tokenizer import Tokenizer

SCORER_WIDTH = "temporal_token_scorer.mlp.w1.bias"
STTS_PRUNE_AT = 3
QUANTISED = "hf_quant_config.json"
"""Where ModelOpt says what it did, such as NVFP4."""
PATCH_PLACE = 2
"""`<im_patch>` is the third of the ids behind the base vocabulary."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A folder whose files, names, shapes and types fit its config; no weight was read yet."""

    path: Path
    """Where the weights lie: of a training run's folder, that of its last step."""
    kind: str
    """What it is, for people."""
    config: ModelConfig
    naming: Naming
    tensors: Mapping[str, StoredTensor]
    """By the names of `naming`."""
    usage: Usage
    tokenizer: Path | None
    tokenizer_name: str | None = None
    """The hub's name of a vocabulary that does not lie here."""
    patch_id: int | None = None
    """What the config says `<im_patch>` is."""
    config_file: Path
    weight_files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    """What to know about it, one line each."""
    stored: Callable[[], Mapping[str, Tensor]]
    base: ModelFolder | None = None
    """Of an adapter, the folder that it is merged into."""
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What more there is to say of it, by name."""

    @property
    def origin(self) -> ModelFolder:
        """The folder of whole weights that it is or that adapters were put on."""
        return self if self.base is None else self.base.origin

    @cached_property
    def weights(self) -> OurTensors:
        """Tensors by our names, each read when asked for, in the type they are stored in."""
        return OurTensors(self.naming, self.config, self.stored())

    def load(self, dtype: torch.dtype = torch.float32) -> VideoLM:
        """The model, on the CPU.

        Weights that are stored in `dtype` stay mapped files, which the system reads when they are
        used and may drop again; the others are converted one by one. Either way the only memory of
        its own that the model takes is that of converted or joined tensors (of a hub folder the
        embedding table), and of all tensors where they come in shards.
        """
        ours = OurTensors(self.naming, self.config, self.stored(), dtype)
        return assemble(self.config, dict(ours.items()), dtype)

    def require_tokenizer(self) -> Path:
        """The tokenizer.json, checked against the weights.

        Raises CheckpointError if there is none, ConfigError if it is that of another model,
        BundleError if it cannot be read.
        """
        if self.tokenizer is None:
            named = f", it was trained with {self.tokenizer_name!r}" if self.tokenizer_name else ""
            raise CheckpointError(
                f"the checkpoint lacks {TOKENIZER}{named}",
                where=self.path,
                remedy="name a folder that has the vocabulary, such as that of the published "
                "Molmo2 of this size: --tokenizer FOLDER (in a recipe: --set tokenizer=FOLDER)",
            )
        self._require_fit(Tokenizer.from_file(self.tokenizer), self.tokenizer)
        return self.tokenizer

    def _require_fit(self, words: Tokenizer, where: Path) -> None:
        language, style = self.config.language, self.usage.style
        faults = []
        try:
            patch = words.id_of(PATCH)
            if not language.base_vocab <= patch < language.vocab or patch != (
                self.patch_id or patch
            ):
                wanted = self.patch_id or f"{language.base_vocab}..{language.vocab - 1}"
                faults.append(f"{PATCH} is id {patch}, the weights have it at {wanted}")
            faults += [
                f"{token} is id {found}, and the weights write ids up to {language.base_vocab - 1}"
                for token in dict.fromkeys((style.begin, *style.ends))
                if (found := words.id_of(token)) >= language.base_vocab
            ]
        except KeyError as error:
            faults.append(str(error.args[0]))
        if faults:
            raise ConfigError(
                f"the tokenizer does not fit the weights: {'; '.join(faults)}",
                where=where,
                remedy=f"name the {TOKENIZER} that belongs to the weights",
            )


def open_folder(folder: Path, tokenizer: Path | None = None) -> ModelFolder:
    """A checkpoint of this project or a published folder.

    `tokenizer` is a file, or a folder that holds one with its configs; by default what lies beside
    the weights. A LoRA adapter is opened with its base (`lora.folder.open_adapter`). Raises as
    `open_published`.
    """
    from edge_vlm.model.lora.folder import is_adapter, open_adapter  # it opens its base by this

    if is_adapter(folder):
        return open_adapter(folder, tokenizer)
    if not (folder / CONFIG).is_file() or "language" not in read_json(folder / CONFIG):
        return open_published(folder, tokenizer)
    cfg, usage = read_own(folder)
    tensors, naming = read_layout(folder), own_naming(cfg)
    check_published(naming, cfg, tensors, where=folder)
    return _in_safetensors(
        folder,
        "a checkpoint of this project",
        *(cfg, naming, tensors, usage),
        tokenizer=_tokenizer(tokenizer, folder),
    )


def open_published(folder: Path, tokenizer: Path | None = None) -> ModelFolder:
    """A folder of the model hub, of transformers or of the training repository.

    Raises ConfigError (another model family, or a variant that is not computed here),
    WeightFilesError (absent, cut off or forbidden files), WeightNamesError (weights that do not fit
    the config), CheckpointError (no config); each lists all that it found.
    """
    if not (folder / CONFIG).is_file() and (step := find_weights(folder)) is not None:
        return _open_training(step, tokenizer)
    data = read_json(folder / CONFIG)
    if (folder / QUANTISED).is_file():
        data = {
            "quantization_config": read_json(folder / QUANTISED).get("quantization", {}),
            **data,
        }
    cfg = config_from_published(data, where=folder / CONFIG)
    tensors = read_layout(folder)
    naming = recognise(tensors, where=folder)
    if naming is STTS:
        raise CheckpointError(
            "these weights are a vision side without a language model",
            where=folder,
            remedy="expected are the weights of a whole model",
        )
    record = data.get(RECORD)
    widths = [t.shape for name, t in tensors.items() if name.endswith(SCORER_WIDTH)]
    try:
        if isinstance(record, Mapping):
            cfg = with_record(cfg, record, folder / CONFIG)
        elif widths:
            cfg = dataclasses.replace(cfg, scorer=stts_scorer(cfg, sum(widths[0])))
    except ValueError as error:
        raise ConfigError(f"no room for the scorer: {error}", where=folder) from error
    check_published(naming, cfg, tensors, where=folder)
    usage, notes = _usage(folder, cfg, record, tokenizer)
    patch_id = data.get("image_patch_id")
    return _in_safetensors(
        folder,
        f"a published Molmo2 folder ({naming.name} names)",
        *(cfg, naming, tensors, usage),
        tokenizer=_tokenizer(tokenizer, folder),
        patch_id=patch_id if type(patch_id) is int else None,
        notes=tuple(notes),
    )


def load_published(folder: Path, dtype: torch.dtype = torch.float32) -> VideoLM:
    """The model of a published folder, on the CPU. Raises as `open_published`."""
    return open_published(folder).load(dtype)


def stts_scorer(cfg: ModelConfig, mlp_width: int) -> ScorerConfig:
    """The scorer of the published STTS code (arXiv 2603.18004) for this vision side."""
    return ScorerConfig(
        prune_at=STTS_PRUNE_AT,
        num_heads=cfg.vision.num_heads,
        head_dim=cfg.vision.head_dim,
        mlp_width=mlp_width,
        rescale=Rescale.ROW,
    )


def _usage(
    folder: Path, cfg: ModelConfig, record: object, tokenizer: Path | None
) -> tuple[Usage, list[str]]:
    """What this project wrote into the config, or else what the folder's other files say."""
    if isinstance(record, Mapping) and SECTIONS[0] in record:
        try:
            return Usage.from_dict(record), []
        except ValueError as error:
            raise ConfigError(f"bad {RECORD!r}: {error}", where=folder / CONFIG) from error
    return with_tokens(read_processors(folder, cfg.vision), _words_folder(tokenizer) or folder)


def _in_safetensors(
    folder: Path,
    kind: str,
    cfg: ModelConfig,
    naming: Naming,
    tensors: Mapping[str, StoredTensor],
    usage: Usage,
    *,
    tokenizer: Path | None,
    patch_id: int | None = None,
    notes: tuple[str, ...] = (),
) -> ModelFolder:
    files = sorted({folder / tensor.file for tensor in tensors.values()})

    def stored() -> dict[str, Tensor]:
        return {name: tensor for file in files for name, tensor in read_tensors(file).items()}

    return ModelFolder(
        path=folder,
        kind=kind,
        config=cfg,
        naming=naming,
        tensors=tensors,
        usage=usage,
        tokenizer=tokenizer,
        patch_id=patch_id,
        config_file=folder / CONFIG,
        weight_files=tuple(files),
        notes=notes,
        stored=stored,
    )


def _open_training(step: Path, tokenizer: Path | None) -> ModelFolder:
    found = read_training_config(step)
    sharded = step / SHARDED
    stored: Mapping[str, Tensor]
    tensors: dict[str, StoredTensor]
    if sharded.is_dir() and any(sharded.iterdir()):
        shards = ShardedTensors(sharded)
        form, stored, tensors = "sharded", shards, dict(shards.layout)
        files = [sharded / name for name in shards.files]
    else:
        stored = read_unsharded(step)
        form, tensors, files = "in one file", layout_of(stored, UNSHARDED), [step / UNSHARDED]
    notes = list(found.notes)
    if unused := list(_unused(tensors, found.unused_blocks)):
        notes.append(f"{len(unused)} tensors of ViT blocks that nothing reads are left out")
        for name in unused:
            del tensors[name]
    naming = TRAINING_TIED if found.tied else TRAINING
    check_published(naming, found.config, tensors, where=step)
    if found.tied:
        notes.append("the head is the base rows of the embedding table (weight_tying)")
    usage, more = found.usage, list[str]()
    if (words := _words_folder(tokenizer)) is not None:
        usage, more = with_tokens(usage, words)
    config = step / TRAINING_CONFIG
    return ModelFolder(
        path=step,
        kind=f"a folder of the training repository ({step.name}, {form})",
        config=found.config,
        naming=naming,
        tensors=tensors,
        usage=usage,
        tokenizer=_tokenizer(tokenizer, step),
        tokenizer_name=found.tokenizer,
        patch_id=found.config.language.base_vocab + PATCH_PLACE,
        config_file=config if config.is_file() else step.parent / TRAINING_CONFIG,
        weight_files=tuple(files),
        notes=(*notes, *more),
        stored=lambda: stored,
    )


def _unused(tensors: Mapping[str, StoredTensor], blocks: range) -> Iterator[str]:
    for block in blocks:
        prefix = f"vision_backbone.image_vit.transformer.resblocks.{block}."
        yield from (name for name in tensors if name.startswith(prefix))


def _words_folder(tokenizer: Path | None) -> Path | None:
    """Where the configs of a tokenizer lie that was named by itself."""
    return tokenizer.parent if tokenizer is not None and tokenizer.is_file() else tokenizer


def _tokenizer(given: Path | None, folder: Path) -> Path | None:
    """Raises ConfigError if what was given holds none."""
    if given is None:
        return folder / TOKENIZER if (folder / TOKENIZER).is_file() else None
    path = given / TOKENIZER if given.is_dir() else given
    if not path.is_file():
        raise ConfigError(
            "there is no such tokenizer",
            where=path,
            remedy=f"name a {TOKENIZER} or a folder that holds one",
        )
    return path
