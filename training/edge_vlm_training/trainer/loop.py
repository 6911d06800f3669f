"""The training loop by steps, for one process or for many that share the weights."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from edge_vlm.config import ModelConfig
from edge_vlm.errors import CheckpointError, ConfigError, NonFinite
from edge_vlm.formats.usage import Usage
from edge_vlm.model.checkpoint import TOKENIZER
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.text.prompt import PromptFormat
from edge_vlm_training.data.batch import BatchStream, PackedBatch
from edge_vlm_training.objective.objective import SUMS, BatchSums, Objective, Totals, totals_of
from edge_vlm_training.recipes.base import StepRecipe
from edge_vlm_training.trainer import checkpoints
from edge_vlm_training.trainer.checkpoints import Progressed
from edge_vlm_training.trainer.distributed import Ranks, recompute_activations, shard
from edge_vlm_training.trainer.optimizer import Updater
from edge_vlm_training.trainer.progress import Reporter
from edge_vlm_training.trainer.samples import sample_answers
from edge_vlm_training.trainer.stats import StepStats, UpdateSums


class Run:
    """A model in training and how far it has come."""

    def __init__(
        self,
        recipe: StepRecipe,
        cfg: ModelConfig,
        model: VideoLM,
        stream: BatchStream,
        world: Ranks,
        folder: Path,
        prompt: PromptFormat,
        usage: Usage | None = None,
    ) -> None:
        """`stream` yields this process's batches of `device_batch` rows; `usage` is what will be
        recorded with the trained model.

        Raises ConfigError if the recipe's batch cannot be shared among the processes.
        """
        rows = recipe.device_batch * world.size
        if recipe.batch % rows:
            raise ConfigError(
                f"batch = {recipe.batch} is no multiple of device_batch = {recipe.device_batch} "
                f"times {world.size} processes",
                remedy=f"add --set batch={math.ceil(recipe.batch / rows) * rows}",
            )
        self.recipe, self.cfg, self.world, self.folder = recipe, cfg, world, folder
        self.prompt, self.stream, self.usage = prompt, stream, usage
        self.accumulated = recipe.batch // rows
        self.dtype = getattr(torch, recipe.precision)
        self.model = model
        if recipe.activation_checkpointing:
            recompute_activations(model)
        self.objective = Objective(
            model,
            z_loss=recipe.z_loss,
            aux_weight=recipe.aux_weight,
            residual_dropout=recipe.residual_dropout,
            dtype=self.dtype,
            autocast=world.size == 1,
        )
        if world.size > 1:
            shard(self.objective, model, world, self.dtype, Objective.METHODS)
        else:
            self.objective.to(world.device)
        self.updater = Updater(model, recipe)
        self.step, self.seconds = 0, 0.0
        torch.manual_seed(recipe.seed + 1 + world.rank)  # of dropout

    def weights(self) -> dict[str, Tensor]:
        """By name; a shard of each where there are several processes."""
        return dict(self.model.named_parameters())

    def resume(self) -> None:
        """Goes on from the folder's newest checkpoint."""
        path = checkpoints.latest(self.folder)
        if path is None:
            raise CheckpointError("nothing to resume", where=self.folder)
        found = checkpoints.load(path, self.world, self.weights(), self.updater)
        self.step, self.seconds = found.step, found.seconds
        # Batches are counted in this run's size, whatever number of processes went before.
        self.stream.load_state_dict({**found.stream, "batches": self.step * self.accumulated})

    def save(self) -> Path:
        """Every process has to call this."""
        progressed = Progressed(self.step, self.seconds, self.stream.state_dict())
        return checkpoints.save(
            self.folder,
            self.world,
            self.weights(),
            self.updater,
            progressed,
            self.recipe.keep_last,
        )

    def save_whole(self) -> Path:
        """The checkpoint folder that other commands read; every process has to call this."""
        tokenizer = self.folder / TOKENIZER
        return checkpoints.save_whole(
            self.folder, self.world, self.cfg, self.weights(), tokenizer, self.usage
        )

    def go(self, reporter: Reporter | None = None) -> None:
        """Trains until the recipe's last step; the last one is always saved."""
        recipe = self.recipe
        if self.step >= recipe.steps:
            return
        batches = iter(self.stream)
        tally = (
            StepStats(recipe, self.cfg, self.world, self.dtype) if reporter is not None else None
        )
        self.objective.train()
        with reporter or contextlib.nullcontext():
            while self.step < recipe.steps:
                started = time.monotonic()
                mine = [next(batches).to(self.world.device) for _ in range(self.accumulated)]
                if recipe.sample_every and self.step % recipe.sample_every == 0:
                    paused = time.monotonic()
                    self._sample(mine[0], reporter)
                    started += time.monotonic() - paused
                sums, parts = self.update(mine)
                self.step += 1
                took = time.monotonic() - started
                self.seconds += took
                if reporter is not None and tally is not None:
                    tally.add(sums, parts, took)
                    reporter.advance(self.step)
                    if self.step % recipe.log_every == 0 or self.step == recipe.steps:
                        reporter.numbers(self.step, tally.report(self.step))
                if self.step % recipe.save_every == 0 or self.step == recipe.steps:
                    self.save()
                if recipe.whole_every and self.step % recipe.whole_every == 0:
                    self.save_whole()

    def update(self, batches: list[PackedBatch]) -> tuple[UpdateSums, list[BatchSums]]:
        """One step of the weights on this process's share of the batch."""
        device = self.world.device
        mine = totals_of(batches, self.cfg.vision.num_cells).to(device)
        weight, aux_cells = self.world.sum(mine)
        totals = Totals(weight, aux_cells)
        parts = []
        for batch in batches:
            found = self.objective(batch, totals, self.world.size)
            found.loss.backward()
            parts.append(dataclasses.replace(found, loss=found.loss.detach()))
        added = self.world.sum(torch.stack([p.sums for p in parts]).sum(0))
        sums = dict(zip(SUMS, added.tolist(), strict=True))
        losses = {
            "answer_loss": sums["answer"] / float(weight),
            "z_loss": self.recipe.z_loss * sums["z"] / float(weight),
            "aux_loss": sums["aux"] / max(1.0, float(aux_cells)),
        }
        losses["loss"] = (
            losses["answer_loss"] + losses["z_loss"] + self.recipe.aux_weight * losses["aux_loss"]
        )
        if not math.isfinite(losses["loss"]):  # the same sums, and so the same end, everywhere
            names = sorted({name for batch in batches for name in batch.clip_names})
            raise NonFinite(
                f"the loss of step {self.step + 1} is {losses['loss']}",
                where=", ".join(names[:4]),
                remedy="the last checkpoint is intact: resume, with lower learning rates if it "
                "happens again",
            )
        norms = self.updater.apply(self.step)
        return UpdateSums(sums, losses, norms), parts

    def _sample(self, batch: PackedBatch, reporter: Reporter | None) -> None:
        lines = sample_answers(
            self.objective,
            batch,
            self.prompt.tokenizer,
            self.prompt.eos_id,
            self.recipe.sample_tokens,
        )
        if reporter is not None:
            reporter.text(self.step, "answers", lines)
