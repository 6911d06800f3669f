"""One update of the weights: AdamW with a learning rate and a gradient limit for each part."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from edge_vlm.model.video_lm import VideoLM
from edge_vlm_training.recipes.base import PARTS, StepRecipe
from edge_vlm_training.trainer.distributed import whole


def parts_of(model: VideoLM) -> dict[str, dict[str, nn.Parameter]]:
    """Named parameters of each part that the model has."""
    parts: dict[str, dict[str, nn.Parameter]] = {part: {} for part in PARTS}
    for name, parameter in model.named_parameters():
        parts[name.partition(".")[0]][name] = parameter
    return {part: named for part, named in parts.items() if named}


class Updater:
    """AdamW whose moments can be read and written by weight name."""

    MOMENTS = ("exp_avg", "exp_avg_sq")

    def __init__(self, model: VideoLM, recipe: StepRecipe) -> None:
        self._recipe = recipe
        self._parts = parts_of(model)
        rates = recipe.learning_rates()
        groups: list[dict[str, object]] = []
        for part, named in self._parts.items():
            for decays in (True, False):
                parameters = [p for p in named.values() if (p.ndim > 1) is decays]
                decay = recipe.weight_decay if decays else 0.0
                if parameters:
                    peak = rates[part]
                    group = {"params": parameters, "lr": peak, "peak": peak, "weight_decay": decay}
                    groups.append(group)
        self._adamw = torch.optim.AdamW(groups, betas=recipe.betas, eps=recipe.eps, fused=True)

    def apply(self, step: int) -> dict[str, float]:
        """Clips, updates at the rate of `step` and clears; the gradient norm of each part.

        With sharded weights every process has to call this.
        """
        norms = {}
        for part, named in self._parts.items():
            for parameter in named.values():
                if parameter.grad is None:  # moments of every weight are alike in all processes
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [p.grad for p in named.values() if p.grad is not None]
            norm = whole(nn.utils.get_total_norm(gradients))
            nn.utils.clip_grads_with_norm_(list(named.values()), self._recipe.clip_norm, norm)
            norms[part] = norm
        rate = self._recipe.rate_at(step)
        for group in self._adamw.param_groups:
            group["lr"] = group["peak"] * rate
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        return {part: float(norm) for part, norm in norms.items()}

    def moments(self, step: int) -> dict[str, Tensor]:
        """The live moments as `exp_avg/NAME` and `exp_avg_sq/NAME`, made (zero) if there are none.

        Writing into them after `step` updates makes the optimizer go on from there.
        """
        found = {}
        for named in self._parts.values():
            for name, parameter in named.items():
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
