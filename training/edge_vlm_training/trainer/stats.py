"""What a run reports: means over the steps since the last report, and how fast they were."""

from __future__ import annotations

import dataclasses

import torch

from edge_vlm.config import ModelConfig
from edge_vlm_training.objective.objective import SUMS, BatchSums
from edge_vlm_training.recipes.base import StepRecipe
from edge_vlm_training.trainer.distributed import Ranks
from edge_vlm_training.trainer.speed import peak_tflops, training_flops


@dataclasses.dataclass(frozen=True)
class UpdateSums:
    """What an update was, over all processes."""

    sums: dict[str, float]
    losses: dict[str, float]
    norms: dict[str, float]


class StepStats:
    """What happened since the last report."""

    def __init__(
        self, recipe: StepRecipe, cfg: ModelConfig, world: Ranks, dtype: torch.dtype
    ) -> None:
        self._recipe, self._cfg, self._world = recipe, cfg, world
        peak = recipe.peak_tflops or peak_tflops(world.device, dtype)
        self._peak = peak * 1e12
        self._reset()

    def _reset(self) -> None:
        self._steps, self._seconds, self._flops = 0, 0.0, 0.0
        self._values: dict[str, float] = {}

    def add(self, update: UpdateSums, parts: list[BatchSums], seconds: float) -> None:
        """`parts` are this process's; the others' are taken to have cost as much."""
        self._steps += 1
        self._seconds += seconds
        for part in parts:
            self._flops += training_flops(
                self._cfg,
                part.kept_F.tolist(),
                part.row_tokens_R.tolist(),
                int(part.sums[SUMS.index("trained")]),
            )
        norms = {f"norm/{name}": value for name, value in update.norms.items()}
        for name, value in (update.sums | update.losses | norms).items():
            self._values[name] = self._values.get(name, 0.0) + value

    def report(self, step: int) -> dict[str, float]:
        """Means since the last report, and starts anew."""
        means = {name: value / self._steps for name, value in self._values.items()}
        counts = {name: means.pop(name) for name in SUMS}
        a_step = self._seconds / self._steps
        rates = self._recipe.learning_rates()
        factor = self._recipe.rate_at(step - 1)
        report = means | {
            "tokens_right": counts["right"] / max(1.0, counts["trained"]),
            "kept": counts["kept"] / max(1.0, counts["cells"]),
            "tokens_per_s": counts["tokens"] / a_step,
            "step_s": a_step,
            "mfu": self._flops / self._seconds / self._peak,
            "eta_s": (self._recipe.steps - step) * a_step,
            **{f"lr/{part}": peak * factor for part, peak in rates.items()},
        }
        self._reset()
        return report
