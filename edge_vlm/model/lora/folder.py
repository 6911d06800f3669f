"""A folder with an adapter: peft's two files, and what a run of this project adds to them.

A run also writes `tokenizer.json`, the whole scorer in `scorer.safetensors`, and `edge_vlm.json`:
what other checkpoints have in `config.json` (without which transformers looks for the base), and by
a fingerprint what the adapter was trained on. Opened, such a folder is the base's weights with the
adapter merged in, each when it is asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from edge_vlm.config import ModelConfig, VisionAttention
from edge_vlm.errors import CheckpointError, ConfigError, WeightFilesError
from edge_vlm.formats.usage import SECTIONS, Usage
from edge_vlm.json_text import MALFORMED
from edge_vlm.model.checkpoint import TOKENIZER, read_tensors, write_tensors, write_text
from edge_vlm.model.lora import peft_format
from edge_vlm.model.lora.layers import factors, merged
from edge_vlm.model.published.files import INDEX, SCORER, WEIGHTS, StoredTensor, read_json
from edge_vlm.model.published.folder import ModelFolder, open_folder
from edge_vlm.model.published.mapping import check_fit, own_naming, shapes

RECORD = "edge_vlm.json"
_SAMPLES = 32
P = TypeVar("P")


@dataclasses.dataclass(frozen=True)
class Base:
    """What an adapter was trained on."""

    path: Path
    fingerprint: str
    """Of its weights, whatever format they are stored in (`fingerprint`)."""
    frozen_as: str
    """float32, bfloat16 or nf4."""

    def to_dict(self) -> dict[str, str]:
        return {name: str(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def read(cls, path: Path) -> Base:
        """Of a file that holds nothing else. Raises CheckpointError if it is not whole."""
        return _parsed(path, read_json(path), cls.from_dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Base:
        return cls(Path(data["path"]), str(data["fingerprint"]), str(data["frozen_as"]))


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run knows of its adapter beyond peft's format."""

    base: Base
    config: ModelConfig
    usage: Usage

    def to_dict(self) -> dict[str, Any]:
        model = self.config.to_dict() | self.usage.to_dict()
        return {"base": self.base.to_dict(), "model": model}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        model = dict(data["model"])
        usage = {name: model.pop(name) for name in SECTIONS if name in model}
        base = Base.from_dict(data["base"])
        return cls(base, ModelConfig.from_dict(model), Usage.from_dict(usage))


def fingerprint(found: ModelFolder) -> str:
    """A digest of a folder's weights but the scorer's, which an adapter's run keeps itself.

    Of every tensor name, shape and some numbers all over it, rounded to bfloat16: the same for the
    same model in another format, another for any model that was trained further. Reading whole
    files would take a minute for each start.
    """
    digest = hashlib.sha256()
    for name, shape in shapes(found.config).items():
        if name.startswith("scorer."):
            continue
        flat = found.weights[name].flatten()
        some = flat[:: max(1, len(flat) // _SAMPLES)].to(torch.bfloat16)
        digest.update(f"{name} {shape} ".encode())
        digest.update(some.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def identify(found: ModelFolder, frozen_as: str) -> Base:
    return Base(found.path.resolve(), fingerprint(found), frozen_as)


def save_adapter(
    folder: Path,
    cfg: ModelConfig,
    weights: Mapping[str, Tensor],
    rank: int,
    alpha: float,
    base: Base,
    tokenizer: Path,
    usage: Usage,
) -> None:
    """Writes the folder; `weights` are the adapters' factors and the scorer, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    scorer = {n: t for n, t in weights.items() if n.startswith("scorer.")}
    if scorer:
        sizes = {name: tuple(tensor.shape) for name, tensor in scorer.items()}
        write_tensors(folder / SCORER, sizes, torch.float32, scorer.items())
    write_text(folder / RECORD, json.dumps(Record(base, cfg, usage).to_dict(), indent=1))
    shutil.copyfile(tokenizer, folder / TOKENIZER)
    peft_format.write_adapter(folder, cfg, factors(weights), rank, alpha, base.path)


def is_adapter(folder: Path) -> bool:
    """Raises CheckpointError for a folder that holds whole weights too."""
    if not (folder / peft_format.CONFIG).is_file():
        return False
    if whole := [name for name in (WEIGHTS, INDEX) if (folder / name).is_file()]:
        raise CheckpointError(
            f"holds an adapter ({peft_format.CONFIG}) and whole weights ({whole[0]})",
            where=folder,
            remedy="move the one that is not meant to another folder",
        )
    return True


def open_adapter(folder: Path, tokenizer: Path | None = None) -> ModelFolder:
    """The base that the adapter names, with the adapter merged in.

    Raises as `open_folder` does for the base, CheckpointError if it cannot be found or is not what
    the adapter was trained on, ConfigError if it is a model of another shape, and as
    `peft_format.read_adapter`.
    """
    base = _open_base(folder, tokenizer)
    cfg, usage, own_scorer = base.config, base.usage, dict[str, Tensor]()
    named = [f"base {base.path}"]
    if (folder / RECORD).is_file():
        record = _parsed(folder / RECORD, read_json(folder / RECORD), Record.from_dict)
        trained_on, cfg, usage = record.base, record.config, record.usage
        if fingerprint(base) != trained_on.fingerprint:
            raise CheckpointError(
                f"the base is not what the adapter was trained on: {base.path} has other weights",
                where=folder,
                remedy=_REMEDY,
            )
        named.append(f"the weights that it was trained on, kept in {trained_on.frozen_as}")
        if _bare(cfg) != _bare(base.config):
            raise ConfigError("the base is a model of another shape", where=base.path)
        if cfg.scorer is not None:
            if not (folder / SCORER).is_file():
                fault = f"there is no {SCORER}, which the run trained"
                remedy = "copy the whole folder again"
                raise WeightFilesError(fault, where=folder, remedy=remedy, problems=(fault,))
            own_scorer = read_tensors(folder / SCORER)
            wanted = {n: s for n, s in shapes(cfg).items() if n.startswith("scorer.")}
            check_fit(wanted, own_scorer, folder / SCORER)
    else:
        named.append("nothing says which weights it was trained on")
    adapter = peft_format.read_adapter(folder, cfg)
    tensors = _layout(base, own_scorer)
    numbers = sum(a.down_rI.numel() + a.up_Or.numel() for a in adapter.layers.values())
    ranks = sorted({len(a.down_rI) for a in adapter.layers.values()})
    words = folder / TOKENIZER
    return dataclasses.replace(
        base,
        path=folder,
        kind="a LoRA adapter, opened as its base with the adapter merged in",
        config=cfg,
        naming=own_naming(cfg),
        tensors=tensors,
        usage=usage,
        tokenizer=words if tokenizer is None and words.is_file() else base.tokenizer,
        config_file=folder / peft_format.CONFIG,
        weight_files=tuple(_files(folder, base)),
        stored=lambda: _Merged(base, adapter, own_scorer),
        base=base,
        facts={
            "adapter": f"rank {', '.join(map(str, ranks))} on {len(adapter.layers)} matrices, "
            f"{numbers:,} numbers ({adapter.naming} names)"
            + f", and a scorer of its own, {sum(map(torch.numel, own_scorer.values())):,}"
            * bool(own_scorer),
            "base": "; ".join(named),
        },
    )


class _Merged(Mapping[str, Tensor]):
    """Weights by our names, each read and merged when asked for."""

    def __init__(
        self, base: ModelFolder, adapter: peft_format.Adapter, scorer: Mapping[str, Tensor]
    ) -> None:
        self._base, self._adapter, self._scorer = base.weights, adapter, scorer
        old = [name for name in self._base if not scorer or not name.startswith("scorer.")]
        self._names = [*old, *scorer]

    def __getitem__(self, name: str) -> Tensor:
        if name in self._scorer:
            return self._scorer[name]
        weight = self._base[name]
        part = self._adapter.layers.get(name.removesuffix(".weight"))
        if part is None or not name.endswith(".weight"):
            return weight
        return merged(weight, part.down_rI, part.up_Or, part.scale)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


_REMEDY = (
    f"write the folder of the base that belongs to it into {peft_format.CONFIG}, as "
    "base_model_name_or_path"
)


def _parsed(path: Path, data: Mapping[str, Any], make: Callable[[Mapping[str, Any]], P]) -> P:
    try:
        return make(data)
    except MALFORMED as error:
        raise CheckpointError(
            f"not what a LoRA run writes: {error}", where=path, remedy="copy the file again"
        ) from error


def _open_base(folder: Path, tokenizer: Path | None) -> ModelFolder:
    name = peft_format.base_name(folder)
    if name is None:
        raise CheckpointError("the adapter names no base", where=folder, remedy=_REMEDY)
    path = folder / name  # an absolute one stands for itself
    if not path.is_dir():
        raise CheckpointError(
            f"the adapter's base is not here: {name}",
            where=folder,
            remedy=f"fetch it if that is a name of the hub, and {_REMEDY}",
        )
    _require_end(folder)
    return open_folder(path, tokenizer)


def _require_end(folder: Path) -> None:
    """Raises CheckpointError for adapters that name each other and no whole weights."""
    chain: list[Path] = []
    link = folder
    while is_adapter(link) and (name := peft_format.base_name(link)) is not None:
        chain.append(link.resolve())
        link = link / name
        if link.resolve() in chain:
            names = " -> ".join(path.name for path in [*chain, link.resolve()])
            raise CheckpointError(
                f"the adapter is its own base ({names})", where=folder, remedy=_REMEDY
            )


def _bare(cfg: ModelConfig) -> ModelConfig:
    return dataclasses.replace(cfg, scorer=None, attention=VisionAttention.ALL)


def _files(folder: Path, base: ModelFolder) -> Iterator[Path]:
    """The adapter's first: its own is what tells one from another."""
    for name in (peft_format.WEIGHTS, SCORER, RECORD):
        if (folder / name).is_file():
            yield folder / name
    yield from base.weight_files


def _layout(base: ModelFolder, scorer: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    """What is stored of the base under our names, and a scorer in the place of its own."""
    sizes = shapes(base.config)
    found = {}
    for row in base.naming.expand(base.config):
        stored = base.tensors[row.published[0]]
        for name in row.ours:
            if not (scorer and name.startswith("scorer.")):
                found[name] = dataclasses.replace(stored, shape=sizes[name])
    own = {name: StoredTensor(SCORER, "F32", tuple(t.shape)) for name, t in scorer.items()}
    return found | own
