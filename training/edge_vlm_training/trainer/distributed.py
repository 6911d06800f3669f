"""Which of the processes this one is, sums over all of them, and weights sharded among them.

`torchrun` (or any launcher that sets its variables) starts the processes; weights, gradients and
moments are sharded by torch's FSDP2 (`torch.distributed.fsdp.fully_shard`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from edge_vlm.errors import ConfigError, EdgeVlmError
from edge_vlm.model.video_lm import VideoLM

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among all; one process may be all there is."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """True in the one process that reports and names files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """`values` added up over all processes; every process has to call this."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gather(self, value: _T) -> list[_T]:
        """`value` of every process, by rank; every process has to call this."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What one process raises inside, all raise, the others as an EdgeVlmError: none goes on
        alone and waits for one that has failed. Every process has to come here."""
        own: Exception | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001  handed to all who wait
            own = error
        told = own
        if own is not None and not isinstance(own, EdgeVlmError):
            told = EdgeVlmError(f"process {self.rank} of the training failed: {own!r}")
        raised = [error for error in self.gather(told) if error is not None]
        if own is not None or raised:
            raise own or raised[0]

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def join_ranks(device: str = "auto") -> Iterator[Ranks]:
    """The processes that `torchrun` started, or this one alone.

    `device` is auto, cpu or cuda. Raises ConfigError for cuda where there is none.
    """
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ConfigError(
            "the recipe wants a GPU and torch finds none", remedy="add --set device=cpu"
        )
    cuda = has_cuda and device != "cpu"
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    place = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    if size == 1:
        yield Ranks(0, 1, place)
        return
    dist.init_process_group("nccl" if cuda else "gloo", device_id=place if cuda else None)
    try:
        yield Ranks(dist.get_rank(), size, place)
    finally:
        dist.destroy_process_group()


def blocks_of(model: VideoLM) -> list[nn.Module]:
    """The transformer blocks of both sides: the units of sharding and of recomputation."""
    return [*model.vit.blocks, *model.llm.blocks]


def recompute_activations(model: VideoLM) -> None:
    """Keeps only what goes into each block; the rest is computed anew in the backward pass."""
    for block in blocks_of(model):
        for method in ("forward", "forward_ragged"):
            if hasattr(block, method):
                plain = getattr(block, method)
                setattr(block, method, functools.partial(checkpoint, plain, use_reentrant=False))


def shard(
    root: nn.Module, model: VideoLM, ranks: Ranks, dtype: torch.dtype, methods: tuple[str, ...]
) -> None:
    """Shards `model` inside `root` over all processes and moves it to their devices.

    Blocks, embedding and head are gathered one by one, the small rest with `root`, whose `methods`
    besides `forward` may then be called. Products are computed in `dtype`; the shards, the sums of
    gradients and what the optimizer sees are float32.
    """
    # A block also returns its values, which are a view; nothing here changes anything in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype is torch.float32 else dtype, reduce_dtype=torch.float32
    )
    for block in [*blocks_of(model), model.llm.embed, model.llm.head]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
        if hasattr(block, "forward_ragged"):
            register_fsdp_forward_method(block, "forward_ragged")
    fully_shard(root, mesh=mesh, mp_policy=dataclasses.replace(policy, cast_forward_inputs=False))
    for method in methods:
        register_fsdp_forward_method(root, method)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of all shards; every process has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
