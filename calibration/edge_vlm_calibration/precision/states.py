"""What goes into a product on real frames: its range, channel by channel, and a sample of it.

Shape letters: S states, K channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from edge_vlm.errors import NonFinite

OUTLIER = 8.0
"""A channel that reaches so many times the median of all channels is called an outlier."""


class States:
    """Everything that passed, as numbers that do not grow with it."""

    def __init__(self, sample: int, seed: int = 0) -> None:
        """Keeps `sample` states to choose by and as many to judge by, each state with the same
        chance."""
        self.channels: Tensor | None = None
        """Largest |x| of each channel, [K]."""
        self._room, self._seen = 2 * sample, 0
        self._kept: Tensor | None = None
        self._random = torch.Generator().manual_seed(seed)

    def add(self, states_SK: Tensor) -> None:
        if not len(states_SK):
            return
        channels = states_SK.abs().amax(0)
        if self.channels is None or self._kept is None:
            self.channels = channels
            self._kept = torch.empty(self._room, states_SK.shape[1])
        self.channels = torch.maximum(self.channels, channels)
        # Reservoir sampling (algorithm R), a batch at a time.
        order = self._seen + torch.arange(len(states_SK))
        drawn = (torch.rand(len(order), generator=self._random) * (order + 1)).long()
        places = torch.where(order < self._room, order, drawn)
        for i in (places < self._room).nonzero().flatten().tolist():
            self._kept[places[i]] = states_SK[i]
        self._seen += len(states_SK)

    @property
    def chosen_by(self) -> Tensor:
        return self._sample()[::2]

    @property
    def judged_by(self) -> Tensor:
        """As `chosen_by`, of other states; the same ones where only one was seen."""
        kept = self._sample()
        return kept[1::2] if len(kept) > 1 else kept

    def _sample(self) -> Tensor:
        assert self._kept is not None, "nothing passed"
        return self._kept[: self._seen]

    @property
    def max_abs(self) -> float:
        assert self.channels is not None, "nothing passed"
        return float(self.channels.amax())

    @property
    def typical(self) -> float:
        assert self.channels is not None, "nothing passed"
        return float(self.channels.median())

    @property
    def outliers(self) -> int:
        assert self.channels is not None, "nothing passed"
        return int((self.channels > OUTLIER * self.typical).sum())


class Watcher(Protocol):
    def add(self, states_SK: Tensor) -> None: ...


@contextmanager
def watched(modules: Mapping[str, nn.Module], states: Mapping[str, Watcher]) -> Iterator[None]:
    """Adds the inputs of modules to the states of the same names. Raises NonFinite."""

    def hook(name: str, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if not bool(torch.isfinite(rows).all()):
            raise NonFinite("NaN or infinity on calibration footage", where=name)
        states[name].add(rows)

    handles = [
        module.register_forward_hook(lambda _, inputs, __, name=name: hook(name, inputs[0]))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def lost_share(got_SN: Tensor, exact_SN: Tensor) -> float:
    """Mean square of the difference by the variance of `exact`: what all states have in common
    says nothing of them, and is left out of what the difference is measured by."""
    lost = (got_SN - exact_SN).double().square().sum()
    energy = (exact_SN - exact_SN.mean(0)).double().square().sum()
    if len(exact_SN) < 2 or not energy:
        energy = exact_SN.double().square().sum()
    return float(lost / energy) if energy else float(lost > 0)
