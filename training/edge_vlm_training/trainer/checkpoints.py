"""Checkpoints of a run: sharded ones to go on from, a whole one to use; each whole or not there.

A run's folder holds::

    recipe.json                 what is trained
    checkpoints/step-00000500/  weights and moments (torch.distributed.checkpoint), and for each
                                process the state of its data and of its random numbers (JSON)
    checkpoint/                 weights as one model.safetensors, as every other command reads them;
                                of a LoRA run its adapter and scorer (`edge_vlm.model.lora.folder`)

A checkpoint is written under a `.partial` name and renamed when all processes are done, so that a
killed run leaves the one before intact.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import errno
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_sharded
from torch.distributed.checkpoint.state_dict_saver import save as save_sharded

from edge_vlm.errors import CheckpointError, WeightNamesError
from edge_vlm.errors.export import NoSpaceLeft
from edge_vlm.model.published.files import REPLACED, UNFINISHED
from edge_vlm.model.published.torch_files import INDEX, require_harmless
from edge_vlm_training.data.packing.stream import merge_states
from edge_vlm_training.trainer.distributed import Ranks, whole
from edge_vlm_training.trainer.integrity import (
    RUN,
    STEP,
    before,
    process_file,
    process_text,
    read_run,
    read_states,
    require_intact,
    run_text,
)
from edge_vlm_training.trainer.optimizer import Updater

CHECKPOINTS, WHOLE = "checkpoints", "checkpoint"
MOST = 1e12
"""Steps, and seconds of training."""
_WEIGHT = "weight/"


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run has come, over all its starts."""

    step: int = 0
    seconds: float = 0.0
    """Of training."""
    stage: int = 0
    """Number of the stage that it is in."""
    stage_step: int = 0
    stage_s: float = 0.0

    def after(self, seconds: float) -> Progress:
        """One step later."""
        total, own = self.seconds + seconds, self.stage_s + seconds
        return Progress(self.step + 1, total, self.stage, self.stage_step + 1, own)


@dataclasses.dataclass(frozen=True)
class Sources:
    """State of what a run draws from."""

    stream: dict[str, Any]
    """Of the data: when saving that of this process, when loaded that of all."""
    curriculum: dict[str, Any]


def latest(folder: Path) -> Path | None:
    """The newest finished checkpoint of a run's folder."""
    return next(reversed(_finished(folder)), None)


def _finished(folder: Path) -> list[Path]:
    """A run's checkpoints, the oldest first."""
    root = folder / CHECKPOINTS
    return sorted(p for p in root.iterdir() if STEP.fullmatch(p.name)) if root.is_dir() else []


def _folder_of(step: int) -> str:
    return f"step-{step:08}"


def save(
    folder: Path,
    ranks: Ranks,
    weights: dict[str, Tensor],
    updater: Updater,
    progress: Progress,
    sources: Sources,
    keep_last: int,
) -> Path:
    """Writes a sharded checkpoint and removes all but the newest `keep_last`.

    Every process has to call this. Raises NoSpaceLeft or CheckpointError if it cannot be written;
    the one before is intact then.
    """
    root = folder / CHECKPOINTS
    final = root / _folder_of(progress.step)
    partial = final.with_suffix(".partial")
    with ranks.together(), _written_to(final):
        if ranks.leads:
            root.mkdir(parents=True, exist_ok=True)
            for left_over in root.glob("*.partial"):
                shutil.rmtree(left_over)
            partial.mkdir()
    tensors = _tensors(weights, updater, progress.stage_step)
    with _written_to(final), _without_advice():
        save_sharded(tensors, checkpoint_id=partial, no_dist=ranks.size == 1)
    own = ""
    with ranks.together(), _written_to(final):
        written = [*partial.glob(f"__{ranks.rank}_*"), *([partial / INDEX] * ranks.leads)]
        state = {**dataclasses.asdict(sources), "random": _random_state(ranks)}
        own = process_text(state, written)
        (partial / process_file(ranks.rank)).write_text(own)
    sums = ranks.gather(zlib.crc32(own.encode()))
    with ranks.together(), _written_to(final):
        if ranks.leads:
            (partial / RUN).write_text(run_text(dataclasses.asdict(progress), sums))
            if final.exists():
                shutil.rmtree(final)
            os.replace(partial, final)
            for old in _finished(folder)[:-keep_last]:
                shutil.rmtree(old)
    return final


@contextlib.contextmanager
def _written_to(final: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, CheckpointException) as error:
        causes = _causes(error)
        full = any(isinstance(c, OSError) and c.errno == errno.ENOSPC for c in causes)
        kind = NoSpaceLeft if full else CheckpointError
        raise kind(
            f"a checkpoint could not be written: {causes[0]}",
            where=final,
            remedy="the one before is intact: make room, then go on with --resume",
        ) from error


def progress_of(path: Path) -> Progress:
    """How far the run of a checkpoint was. Raises CheckpointError if it cannot be read."""
    run = read_run(path)
    try:
        found = {name: run[name] for name in Progress.__dataclass_fields__}
    except KeyError as error:
        raise CheckpointError(
            f"its {RUN} lacks {error}", where=path, remedy=before(path)
        ) from error
    for name, value in found.items():
        kinds = (int, float) if name in ("seconds", "stage_s") else (int,)
        if type(value) not in kinds or not 0 <= value <= MOST:
            raise CheckpointError(
                f"its {RUN} says {name} = {value!r:.60}", where=path, remedy=before(path)
            )
    if path.name != _folder_of(found["step"]):
        raise CheckpointError(
            f"its {RUN} is of step {found['step']}", where=path, remedy=before(path)
        )
    return Progress(**found)


def load(path: Path, ranks: Ranks, weights: dict[str, Tensor], updater: Updater) -> Sources:
    """Fills weights and moments in place, sets the random numbers, and gives the data's state.

    `updater` is that of the stage that the run was in. The number of processes may differ from that
    which wrote it; dropout then draws other numbers.

    Raises WeightNamesError listing what the checkpoint lacks, holds beyond the model or has in
    another shape; CheckpointError if it cannot be read. All processes raise what one of them found.
    """
    with ranks.together():
        states = read_states(path)
        require_intact(path, states, INDEX)
        tensors = _tensors(weights, updater, progress_of(path).stage_step)
        _check_names(path, tensors)
        require_intact(path, states[ranks.rank :: ranks.size])
    _fill(tensors, path, one=ranks.size == 1)
    if len(states) == ranks.size:
        _set_random_state(states[ranks.rank]["random"], ranks)
    return Sources(merge_states([s["stream"] for s in states]), states[0]["curriculum"])


def stored_weights(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Weights of a run's newest checkpoint whose names begin so, without the prefix; none if the
    folder holds no run. Raises CheckpointError if it cannot be read."""
    path = latest(folder)
    return {} if path is None else _weights_of(path, prefix)


def mean_weights(folder: Path, number: int) -> dict[str, Tensor]:
    """Of a run's `number` newest checkpoints in one stage, or of as many as there are, f32 by name.

    Averages along a training end where a falling learning rate would, or better (arXiv 1803.05407).
    Raises CheckpointError if one cannot be read or holds other weights than the rest.
    """
    paths: list[Path] = []
    stages = set()
    for path in reversed(_finished(folder)):
        stages.add(progress_of(path).stage)
        if len(stages) > 1:
            break
        paths.insert(0, path)
        if len(paths) == number:  # older ones need not be readable
            break
    mean: dict[str, Tensor] = {}
    for count, path in enumerate(paths, 1):
        found = _weights_of(path, "")
        if count > 1 and found.keys() != mean.keys():
            raise CheckpointError("other weights than in the checkpoints before", where=path)
        for name, tensor in found.items():
            if count == 1:
                mean[name] = tensor.float()
            else:
                mean[name] += (tensor.float() - mean[name]) / count
    return mean


def _weights_of(path: Path, prefix: str) -> dict[str, Tensor]:
    states = read_states(path)
    require_intact(path, states, INDEX)
    key = f"{_WEIGHT}{prefix}"
    stored = {n: m for n, m in _stored(path).items() if n.startswith(key)}
    tensors = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in stored.items()
        if isinstance(meta, TensorStorageMetadata)
    }
    if tensors:
        require_intact(path, states)
        _fill(tensors, path, one=True)
    return {name.removeprefix(key): tensor for name, tensor in tensors.items()}


def _fill(tensors: dict[str, Tensor], path: Path, *, one: bool) -> None:
    """`one` process reads it alone. Raises CheckpointError."""
    try:
        with _without_advice():
            load_sharded(tensors, checkpoint_id=path, no_dist=one)
    except (Exception, CheckpointException) as error:
        raise CheckpointError(
            f"the checkpoint cannot be read: {_causes(error)[0]!r}",
            where=path,
            remedy=before(path),
        ) from error


def save_whole(
    folder: Path,
    ranks: Ranks,
    weights: dict[str, Tensor],
    write: Callable[[Path, dict[str, Tensor]], None],
) -> Path:
    """Writes the folder that other commands read, by `write`; every process has to call this."""
    final = folder / WHOLE
    gathered: dict[str, Tensor] = {}
    for name, tensor in weights.items():  # one at a time: only one process keeps them
        full = whole(tensor.detach())
        if ranks.leads:
            gathered[name] = full.float().cpu()
    with ranks.together():
        if ranks.leads:
            partial, old = folder / f"{WHOLE}{UNFINISHED}", folder / f"{WHOLE}{REPLACED}"
            for left_over in (partial, old):
                shutil.rmtree(left_over, ignore_errors=True)
            write(partial, gathered)
            if final.exists():
                os.replace(final, old)
            os.replace(partial, final)
            shutil.rmtree(old, ignore_errors=True)
    return final


def _tensors(weights: dict[str, Tensor], updater: Updater, step: int) -> dict[str, Tensor]:
    named = {f"{_WEIGHT}{name}": tensor.detach() for name, tensor in weights.items()}
    return named | updater.moments(step)


def _stored(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, by name."""
    require_harmless(path / INDEX)
    try:
        stored = dict(FileSystemReader(path).read_metadata().state_dict_metadata)
        for meta in stored.values():  # without checksums nothing else says that it is in order
            if isinstance(meta, TensorStorageMetadata):
                torch.empty(meta.size, dtype=meta.properties.dtype, device="meta")
        return {str(name): meta for name, meta in stored.items()}
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint's index cannot be read: {error}",
            where=path,
            remedy=before(path),
        ) from error


def _check_names(path: Path, expected: dict[str, Tensor]) -> None:
    stored = _stored(path)
    missing = tuple(sorted(expected.keys() - stored.keys()))
    unknown = tuple(sorted(stored.keys() - expected.keys()))
    shapes = {n: tuple(m.size) for n, m in stored.items() if isinstance(m, TensorStorageMetadata)}
    misshaped = tuple(
        f"{name}: {shapes.get(name)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in stored and shapes.get(name) != tuple(tensor.shape)
    )
    faults = {"lacks": missing, "has unknown": unknown, "has misshapen": misshaped}
    if any(faults.values()):
        told = "; ".join(f"{verb} {', '.join(names)}" for verb, names in faults.items() if names)
        raise WeightNamesError(
            f"the checkpoint {told if len(told) < 600 else told[:600] + ' ...'}",
            where=path,
            remedy="resume with the recipe that wrote it, or from another checkpoint",
            missing=missing,
            unknown=unknown,
            misshaped=misshaped,
        )


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """A single process is told that it is one; it knows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _causes(error: BaseException) -> list[BaseException]:
    """What went wrong in each process; the library gathers it in an exception of its own."""
    if isinstance(error, CheckpointException):
        return [cause for cause, _ in error.failures.values()]
    return [error]


def _random_state(ranks: Ranks) -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return {k: base64.b64encode(bytes(v.tolist())).decode() for k, v in states.items()}


def _set_random_state(states: dict[str, str], ranks: Ranks) -> None:
    read = {
        k: torch.tensor(list(base64.b64decode(v)), dtype=torch.uint8) for k, v in states.items()
    }
    torch.set_rng_state(read["cpu"])
    if ranks.device.type == "cuda" and "cuda" in read:
        torch.cuda.set_rng_state(read["cuda"], ranks.device)
