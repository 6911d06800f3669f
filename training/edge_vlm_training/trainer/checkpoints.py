"""Checkpoints of a run: sharded ones to go on from, a whole one to use; each whole or not there.

A run's folder holds::

    recipe.json                 what is trained
    checkpoints/step-00000500/  weights and moments (torch.distributed.checkpoint), and for each
                                process the state of its data and of its random numbers (JSON)
    checkpoint/                 weights as one model.safetensors, as every other command reads them

A checkpoint is written under a `.partial` name and renamed when all processes are done, so that a
killed run leaves the one before intact.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from edge_vlm.config import ModelConfig
from edge_vlm.errors import CheckpointError, NoSpaceLeft, WeightNamesError
from edge_vlm.formats.usage import Usage
from edge_vlm.model.checkpoint import save_checkpoint
from edge_vlm_training.data.stream import merge_states
from edge_vlm_training.trainer.distributed import Ranks, whole
from edge_vlm_training.trainer.optimizer import Updater

CHECKPOINTS, WHOLE, RUN = "checkpoints", "checkpoint", "run.json"
_STEP = re.compile(r"step-(\d{8})")
_WEIGHT = "weight/"


@dataclasses.dataclass(frozen=True)
class Progressed:
    """How far a checkpoint's run had come."""

    step: int
    seconds: float
    """Of training, over all its processes' starts."""
    stream: dict[str, Any]
    """State of the data: when saving that of this process, when loaded that of all."""


def latest(folder: Path) -> Path | None:
    """The newest finished checkpoint of a run's folder."""
    root = folder / CHECKPOINTS
    found = [p for p in root.iterdir() if _STEP.fullmatch(p.name)] if root.is_dir() else []
    return max(found, default=None, key=lambda path: path.name)


def save(
    folder: Path,
    world: Ranks,
    weights: dict[str, Tensor],
    updater: Updater,
    progressed: Progressed,
    keep_last: int,
) -> Path:
    """Writes a sharded checkpoint and removes all but the newest `keep_last`.

    Every process has to call this. Raises NoSpaceLeft or CheckpointError if it cannot be written;
    the one before is intact then.
    """
    root = folder / CHECKPOINTS
    final = root / f"step-{progressed.step:08}"
    partial = final.with_suffix(".partial")
    try:
        if world.leads:
            root.mkdir(parents=True, exist_ok=True)
            for left_over in root.glob("*.partial"):
                shutil.rmtree(left_over)
            partial.mkdir()
        world.wait()
        tensors = _tensors(weights, updater, progressed.step)
        with _without_advice():
            dcp.save(tensors, checkpoint_id=partial, no_dist=world.size == 1)
        own = {"stream": progressed.stream, "random": _random_state(world)}
        (partial / _process_file(world.rank)).write_text(json.dumps(own))
        if world.leads:
            run = {"step": progressed.step, "seconds": progressed.seconds, "processes": world.size}
            (partial / RUN).write_text(json.dumps(run))
        world.wait()
        if world.leads:
            if final.exists():
                shutil.rmtree(final)
            os.replace(partial, final)
            finished = sorted(p for p in root.iterdir() if _STEP.fullmatch(p.name))
            for old in finished[:-keep_last]:
                shutil.rmtree(old)
        world.wait()
    except (OSError, CheckpointException) as error:
        causes = _causes(error)
        full = any(isinstance(c, OSError) and c.errno == errno.ENOSPC for c in causes)
        kind = NoSpaceLeft if full else CheckpointError
        raise kind(
            f"a checkpoint could not be written: {causes[0]}",
            where=final,
            remedy="the one before is intact: make room, then go on with --resume",
        ) from error
    return final


def load(path: Path, world: Ranks, weights: dict[str, Tensor], updater: Updater) -> Progressed:
    """Fills weights and moments in place, sets the random numbers, and says how far the run was.

    The number of processes may differ from that which wrote it; dropout then draws other numbers.

    Raises WeightNamesError listing what the checkpoint lacks, holds beyond the model or has in
    another shape; CheckpointError if it cannot be read.
    """
    run = _read_json(path / RUN)
    states = [_read_json(path / _process_file(rank)) for rank in range(run["processes"])]
    tensors = _tensors(weights, updater, run["step"])
    _check_names(path, tensors)
    try:
        with _without_advice():
            dcp.load(tensors, checkpoint_id=path, no_dist=world.size == 1)
    except (Exception, CheckpointException) as error:  # whatever a damaged file provokes
        raise CheckpointError(
            f"the checkpoint cannot be read: {_causes(error)[0]}",
            where=path,
            remedy=f"remove it to resume from the one before in {path.parent}",
        ) from error
    if run["processes"] == world.size:
        _set_random_state(states[world.rank]["random"], world)
    stream = merge_states([state["stream"] for state in states])
    return Progressed(run["step"], run["seconds"], stream)


def save_whole(
    folder: Path,
    world: Ranks,
    config: ModelConfig,
    weights: dict[str, Tensor],
    tokenizer: Path,
    usage: Usage | None = None,
) -> Path:
    """Writes the folder that other commands read; every process has to call this."""
    final = folder / WHOLE
    gathered: dict[str, Tensor] = {}
    for name, tensor in weights.items():  # one at a time: only one process keeps them
        full = whole(tensor.detach())
        if world.leads:
            gathered[name] = full.float().cpu()
    if world.leads:
        partial, before = folder / f"{WHOLE}.partial", folder / f"{WHOLE}.before"
        for left_over in (partial, before):
            shutil.rmtree(left_over, ignore_errors=True)
        save_checkpoint(partial, config, gathered, tokenizer, usage)
        if final.exists():
            os.replace(final, before)
        os.replace(partial, final)
        shutil.rmtree(before, ignore_errors=True)
    world.wait()
    return final


def _tensors(weights: dict[str, Tensor], updater: Updater, step: int) -> dict[str, Tensor]:
    named = {f"{_WEIGHT}{name}": tensor.detach() for name, tensor in weights.items()}
    return named | updater.moments(step)


def _check_names(path: Path, expected: dict[str, Tensor]) -> None:
    try:
        stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:  # absent, cut off, or not such a file at all
        raise CheckpointError(
            f"the checkpoint's index cannot be read: {error}",
            where=path,
            remedy=f"remove it to resume from the one before in {path.parent}",
        ) from error
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


def _process_file(rank: int) -> str:
    return f"process-{rank:05}.json"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint's {path.name} cannot be read: {error}",
            where=path,
            remedy=f"remove {path.parent.name} to resume from the one before",
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path.name} holds no object", where=path)
    return data


def _random_state(world: Ranks) -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(world.device)
    return {k: base64.b64encode(bytes(v.tolist())).decode() for k, v in states.items()}


def _set_random_state(states: dict[str, str], world: Ranks) -> None:
    read = {
        k: torch.tensor(list(base64.b64decode(v)), dtype=torch.uint8) for k, v in states.items()
    }
    torch.set_rng_state(read["cpu"])
    if world.device.type == "cuda" and "cuda" in read:
        torch.cuda.set_rng_state(read["cuda"], world.device)
