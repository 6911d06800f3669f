"""AdamW whose master weights stay fp32 while the model computes in bf16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class MasterAdamW:
    """Pure-bf16 compute without autocast: gradients are taken in bf16, updates made in fp32.

    Autocast would cast every weight anew at each use, which costs more than the small products of
    a small model. `groups` maps a peak learning rate to each list of named parameters.
    """

    def __init__(
        self,
        groups: Sequence[tuple[float, Mapping[str, nn.Parameter]]],
        *,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.05,
    ) -> None:
        self._live: list[nn.Parameter] = []
        self._master: list[Tensor] = []
        self._parts: list[list[Tensor]] = []
        self.names: list[str] = []
        param_groups = []
        for peak, named in groups:
            first = len(self._master)
            decayed: list[Tensor] = []
            plain: list[Tensor] = []
            for name, parameter in named.items():
                master = parameter.detach().float().clone().requires_grad_()
                self._live.append(parameter)
                self._master.append(master)
                self.names.append(name)
                (decayed if parameter.ndim > 1 else plain).append(master)
            self._parts.append(self._master[first:])
            for tensors, decay in ((decayed, weight_decay), (plain, 0.0)):
                if tensors:
                    param_groups.append(
                        {"params": tensors, "lr": peak, "peak": peak, "weight_decay": decay}
                    )
        self._adamw = torch.optim.AdamW(param_groups, betas=betas, fused=True)

    def step(self, rate: float, clip_norm: float) -> float:
        """One update at `rate` times the peak learning rates; returns the gradient norm.

        Each group is clipped on its own: a loss that pulls hard on one part must not shrink the
        steps of another.
        """
        for master, live in zip(self._master, self._live, strict=True):
            master.grad = torch.zeros_like(master) if live.grad is None else live.grad.float()
            live.grad = None
        norms = [nn.utils.clip_grad_norm_(part, clip_norm) for part in self._parts]
        for group in self._adamw.param_groups:
            group["lr"] = group["peak"] * rate
        self._adamw.step()
        with torch.no_grad():
            torch._foreach_copy_([*self._live], [*self._master])
        return float(torch.stack(norms).norm())

    def masters(self) -> dict[str, Tensor]:
        """The fp32 weights by name."""
        return dict(zip(self.names, (m.detach() for m in self._master), strict=True))
