"""One update of the weights: AdamW with a learning rate and a gradient limit for each part.

Masters are float32 always. Where the model computes in them they are the weights themselves; where
it computes in copies of another type, gradients are taken there and the copies follow each update:
autocast would cast every weight anew at each use, which costs more than a small model's products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from edge_vlm_training.objective.objective import Objective
from edge_vlm_training.objective.terms import probe_of
from edge_vlm_training.recipes.base import PROBES, Recipe, Stage
from edge_vlm_training.trainer.distributed import whole


@dataclasses.dataclass(frozen=True)
class Part:
    """Weights that share a learning rate and whose gradients are limited together."""

    rate: float
    """Peak learning rate."""
    names: list[str]


def named_weights(objective: Objective) -> dict[str, nn.Parameter]:
    """The weights of the model that are not frozen, and those of the probes as `probes.NAME`."""
    named = {n: p for n, p in objective.model.named_parameters() if p.requires_grad}
    return named | {f"{PROBES}.{n}": p for n, p in objective.probes.named_parameters()}


def parts_of(stage: Stage, names: Mapping[str, object]) -> dict[str, Part]:
    """What a stage trains, by the keys of `Stage.train`; each of its probes on its own."""
    probes = {probe_of(term) for term in stage.terms}
    keys = {part: key for key in stage.train for part in key.split("+")}
    found: dict[str, Part] = {}
    for name in names:
        first, second = name.split(".")[:2]
        if first not in keys or (first == PROBES and second not in probes):
            continue
        key = f"{PROBES}/{second}" if first == PROBES else keys[first]
        found.setdefault(key, Part(stage.train[keys[first]], [])).names.append(name)
    return found


class Masters:
    """The float32 weights of a run and what the model computes with."""

    def __init__(
        self, live: dict[str, nn.Parameter], computed_in: torch.dtype | None = None
    ) -> None:
        """`live` float32 weights; with `computed_in` they become copies of that type."""
        self.live = live
        self.weights = dict(live)
        if computed_in is not None:
            self.weights = {n: nn.Parameter(p.detach().clone()) for n, p in live.items()}
            for parameter in live.values():
                parameter.data = parameter.data.to(computed_in)

    def take_gradients(self, name: str) -> nn.Parameter:
        """The master with the gradient of its live weight, zero if there is none: moments of every
        weight are alike in all processes."""
        live, master = self.live[name], self.weights[name]
        if live.grad is None:
            live.grad = torch.zeros_like(live)
        if master is not live:
            master.grad, live.grad = live.grad.float(), None
        return master

    @torch.no_grad()
    def follow(self) -> None:
        """Live copies become what their masters are."""
        pairs = [(p, self.weights[n]) for n, p in self.live.items() if self.weights[n] is not p]
        if pairs:
            live, masters = zip(*pairs, strict=True)
            torch._foreach_copy_(list(live), list(masters))


class Updater:
    """AdamW on what a stage trains; its moments can be read and written by weight name."""

    MOMENTS = ("exp_avg", "exp_avg_sq")

    def __init__(self, masters: Masters, stage: Stage, recipe: Recipe) -> None:
        self._masters, self._clip_norm = masters, recipe.clip_norm
        self.parts = parts_of(stage, masters.weights)
        groups: list[dict[str, object]] = []
        trained = {name for part in self.parts.values() for name in part.names}
        for name, parameter in masters.live.items():
            parameter.requires_grad_(name in trained)
        for part in self.parts.values():
            weights = [masters.weights[name] for name in part.names]
            for decays in (True, False):
                parameters = [p for p in weights if (p.ndim > 1) is decays]
                decay = recipe.weight_decay if decays else 0.0
                if parameters:
                    group = {"params": parameters, "lr": part.rate, "peak": part.rate}
                    groups.append({**group, "weight_decay": decay})
        self._adamw = torch.optim.AdamW(groups, betas=recipe.betas, eps=recipe.eps, fused=True)

    def apply(self, factor: float) -> dict[str, float]:
        """Clips, updates at `factor` times the peak rates and clears; each part's gradient norm.

        With sharded weights every process has to call this.
        """
        norms = {}
        for key, part in self.parts.items():
            weights = [self._masters.take_gradients(name) for name in part.names]
            gradients = [p.grad for p in weights if p.grad is not None]
            norm = whole(nn.utils.get_total_norm(gradients))
            nn.utils.clip_grads_with_norm_(weights, self._clip_norm, norm)
            norms[key] = norm
        for group in self._adamw.param_groups:
            group["lr"] = group["peak"] * factor
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self._masters.follow()
        return {key: float(norm) for key, norm in norms.items()}

    def moments(self, step: int) -> dict[str, Tensor]:
        """The live moments as `exp_avg/NAME` and `exp_avg_sq/NAME`, made (zero) if there are none.

        Writing into them after `step` updates makes the optimizer go on from there.
        """
        found = {}
        for part in self.parts.values():
            for name in part.names:
                parameter = self._masters.weights[name]
                state = self._adamw.state[parameter]
                if not state:
                    device = _local(parameter).device
                    state["step"] = torch.tensor(float(step), device=device)
                    for moment in self.MOMENTS:
                        state[moment] = torch.zeros_like(parameter.detach())
                for moment in self.MOMENTS:
                    found[f"{moment}/{name}"] = state[moment]
        return found


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
