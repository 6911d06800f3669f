"""What a run reports: means over the steps since the last report, and how fast they were.

One set of columns for every recipe; a column is there where it means something.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from edge_vlm.config import ModelConfig
from edge_vlm_training.objective.objective import SUMS, BatchSums
from edge_vlm_training.recipes.base import Answers, Recipe, Similarity
from edge_vlm_training.trainer.checkpoints import Progress
from edge_vlm_training.trainer.distributed import Ranks
from edge_vlm_training.trainer.optimizer import Part
from edge_vlm_training.trainer.speed import peak_tflops, training_flops


@dataclasses.dataclass(frozen=True)
class UpdateSums:
    """What an update was, over all processes."""

    sums: dict[str, float]
    losses: dict[str, float]
    norms: dict[str, float]


class StepStats:
    """What happened since the last report."""

    def __init__(self, recipe: Recipe, cfg: ModelConfig, ranks: Ranks, dtype: torch.dtype) -> None:
        self._recipe, self._cfg = recipe, cfg
        self._peak = (recipe.peak_tflops or peak_tflops(ranks.device, dtype)) * 1e12
        self._reset()

    def _reset(self) -> None:
        self.steps, self._seconds, self._flops = 0, 0.0, 0.0
        self._values: dict[str, float] = {}

    def add(self, update: UpdateSums, parts: Sequence[BatchSums], seconds: float) -> None:
        """`parts` are this process's; the others' are taken to have cost as much."""
        self.steps += 1
        self._seconds += seconds
        for part in parts:
            if len(part.row_tokens_R):
                self._flops += training_flops(
                    self._cfg,
                    part.kept_F.tolist(),
                    part.row_tokens_R.tolist(),
                    int(part.sums[SUMS.index("trained")]),
                    frozen=self._recipe.lora is not None,
                )
        shares = {n: v / len(parts) for part in parts for n, v in part.numbers.items()}
        norms = {f"norm/{name}": value for name, value in update.norms.items()}
        for name, value in (update.sums | update.losses | shares | norms).items():
            self._values[name] = self._values.get(name, 0.0) + value

    def report(
        self,
        at: Progress,
        parts: Mapping[str, Part],
        factor: float,
        accuracy: Mapping[str, float] | None,
    ) -> dict[str, Any]:
        """Means since the last report, and starts anew. `accuracy` is that of each kind."""
        stage = self._recipe.stages[at.stage]
        means = {name: value / self.steps for name, value in self._values.items()}
        counts = {name: means.pop(name) for name in SUMS if name != "loss"}
        terms = {type(term) for term in stage.terms}
        for name, term in (("answer_loss", Answers), ("z_loss", Answers), ("aux_loss", Similarity)):
            if term not in terms:
                means.pop(name)
        a_step = self._seconds / self.steps
        report: dict[str, Any] = {"stage": stage.name, "minutes": at.seconds / 60, **means}
        if Answers in terms:
            report |= {
                "tokens_right": counts["right"] / max(1.0, counts["trained"]),
                "tokens_per_s": counts["tokens"] / a_step,
                "mfu": self._flops / self._seconds / self._peak,
            }
        if counts["cells"]:
            report["kept"] = counts["kept"] / counts["cells"]
        if accuracy is not None:
            report["accuracy"] = dict(accuracy)
        report |= {"step_s": a_step, "eta_s": self._seconds_left(at, a_step)}
        report |= {f"lr/{name}": part.rate * factor for name, part in parts.items()}
        self._reset()
        return report

    def _seconds_left(self, at: Progress, a_step_s: float) -> float:
        """Later stages are taken to be as fast as this one."""
        now, *later = (stage.length for stage in self._recipe.stages[at.stage :])
        left = now.seconds_left(at.stage_step, at.stage_s, a_step_s)
        return left + sum(length.seconds_left(0, 0.0, a_step_s) for length in later)
