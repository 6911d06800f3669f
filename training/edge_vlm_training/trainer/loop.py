"""The training loop: stage after stage, for one process or for many that share the weights."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from edge_vlm.config import ModelConfig
from edge_vlm.errors import CheckpointError, ConfigError, NonFinite
from edge_vlm.formats.usage import Usage
from edge_vlm.json_text import MALFORMED, fault_of
from edge_vlm.model.checkpoint import TOKENIZER, save_checkpoint
from edge_vlm.model.lora.folder import Base, save_adapter
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.text.prompt import PromptFormat
from edge_vlm_training.data.packing.batch import Batch, BatchStream
from edge_vlm_training.objective.objective import SUMS, BatchSums, Objective, totals_of
from edge_vlm_training.objective.terms import Totals, make_probes
from edge_vlm_training.recipes.base import PROBES, Answers, Clips, Recipe, Stage
from edge_vlm_training.trainer import checkpoints
from edge_vlm_training.trainer.checkpoints import Progress, Sources
from edge_vlm_training.trainer.distributed import Ranks, recompute_activations, shard
from edge_vlm_training.trainer.optimizer import Masters, Updater, named_weights
from edge_vlm_training.trainer.progress import Reporter
from edge_vlm_training.trainer.samples import sample_answers
from edge_vlm_training.trainer.stats import StepStats, UpdateSums
from edge_vlm_training.world.curriculum import QuestionMix

OpenStream = Callable[[Progress, QuestionMix], BatchStream]
"""The data of the stage that a run is in, as it is at the stage's begin."""


class Run:
    """A model in training and how far it has come."""

    def __init__(
        self,
        recipe: Recipe,
        cfg: ModelConfig,
        model: VideoLM,
        open_stream: OpenStream,
        ranks: Ranks,
        folder: Path,
        prompt: PromptFormat,
        usage: Usage | None = None,
        base: Base | None = None,
    ) -> None:
        """A stream yields this process's batches of `device_batch` rows; `usage` is what will be
        recorded with the trained model, `base` what its adapters are on.

        Raises ConfigError if a stage's batch cannot be shared among the processes.
        """
        for stage in recipe.stages:
            _check_shared(stage, ranks)
        self.recipe, self.cfg, self.ranks, self.folder = recipe, cfg, ranks, folder
        self.prompt, self.usage, self.base = prompt, usage or Usage(), base
        self._open_stream = open_stream
        half = recipe.precision != "float32"
        self.dtype = torch.bfloat16 if half else torch.float32
        self.model = model
        if recipe.activation_checkpointing:
            recompute_activations(model)
        copies = recipe.precision == "bfloat16_weights" and ranks.size == 1
        self.objective = Objective(
            model,
            recipe.stages[0].terms,
            make_probes(recipe.stages, cfg, prompt.tokenizer),
            residual_dropout=recipe.residual_dropout,
            dtype=self.dtype,
            autocast=ranks.size == 1 and not copies,
        )
        if recipe.init is not None:
            stored = checkpoints.stored_weights(recipe.init, f"{PROBES}.")
            self.objective.probes.load_state_dict(stored, strict=False)
        if ranks.size > 1:
            shard(self.objective, model, ranks, self.dtype, Objective.METHODS)
        else:
            self.objective.to(ranks.device)
        self.masters = Masters(named_weights(self.objective), self.dtype if copies else None)
        self.mix = QuestionMix(recipe.seed)
        self.at = Progress()
        self._enter(0)
        torch.manual_seed(recipe.seed + 1 + ranks.rank)  # of dropout

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[self.at.stage]

    @property
    def done(self) -> float:
        """The share of the stage that is done."""
        return self.stage.length.progress(self.at.stage_step, self.at.stage_s)

    @property
    def finished(self) -> bool:
        return self.at.stage == len(self.recipe.stages) - 1 and self.done >= 1

    def _enter(self, stage: int) -> None:
        """Fresh moments, what the stage trains, and its data from the begin."""
        self.at = dataclasses.replace(self.at, stage=stage, stage_step=0, stage_s=0.0)
        self.objective.terms = self.stage.terms
        self.objective.vision_learns = not self.stage.parts.isdisjoint(
            {"vit", "connector", "scorer"}
        )
        self.updater = Updater(self.masters, self.stage, self.recipe)
        self.stream = self._open_stream(self.at, self.mix)
        self.accumulated = _accumulated(self.stage, self.ranks)

    def weights(self) -> dict[str, Tensor]:
        """Those that are not frozen, float32, by name, those of probes too; shards where there are
        several processes."""
        return dict(self.masters.weights)

    def resume(self) -> None:
        """Goes on from the folder's newest checkpoint."""
        path = checkpoints.latest(self.folder)
        if path is None:
            raise CheckpointError("nothing to resume", where=self.folder)
        try:
            self._go_on_from(path)
        except (RuntimeError, *MALFORMED) as error:
            raise CheckpointError(
                f"not a checkpoint of this run: {fault_of(error)}",
                where=path,
                remedy=f"remove it to resume from the one before in {path.parent}",
            ) from error

    def _go_on_from(self, path: Path) -> None:
        with self.ranks.together():
            at = checkpoints.progress_of(path)
        self.at = dataclasses.replace(at, step=at.step - at.stage_step)
        self._close()
        self._enter(at.stage)
        found = checkpoints.load(path, self.ranks, self.weights(), self.updater)
        self.masters.follow()
        self.at = at
        self.mix.load_state_dict(found.curriculum)
        # Batches are counted in this run's size, whatever number of processes went before.
        batches = at.stage_step * self.accumulated
        self.stream.load_state_dict({**found.stream, "batches": batches})

    def save(self) -> Path:
        """Every process has to call this."""
        return checkpoints.save(
            self.folder,
            self.ranks,
            self.weights(),
            self.updater,
            self.at,
            Sources(self.stream.state_dict(), self.mix.state_dict()),
            self.recipe.keep_last,
        )

    def save_whole(self) -> Path:
        """The checkpoint folder that other commands read; every process has to call this."""
        own = {n: t for n, t in self.weights().items() if not n.startswith(f"{PROBES}.")}
        return checkpoints.save_whole(self.folder, self.ranks, own, self._write)

    def _write(self, folder: Path, weights: dict[str, Tensor]) -> None:
        if self.recipe.average_last > 1:
            mean = checkpoints.mean_weights(self.folder, self.recipe.average_last)
            weights = {name: mean.get(name, weight) for name, weight in weights.items()}
        tokenizer, lora = self.folder / TOKENIZER, self.recipe.lora
        if lora is None:
            save_checkpoint(folder, self.cfg, weights, tokenizer, self.usage)
        else:
            assert self.base is not None
            form = lora.rank, lora.alpha, self.base
            save_adapter(folder, self.cfg, weights, *form, tokenizer, self.usage)

    def go(self, reporter: Reporter | None = None) -> None:
        """Trains what is left of the recipe; the end of every stage is saved.

        Raises KeyboardInterrupt after an interrupt, when the step that it came in is done and
        saved; where there are several processes at once.
        """
        if self.finished:
            return
        stats = None
        if reporter is not None:
            stats = StepStats(self.recipe, self.cfg, self.ranks, self.dtype)
        self.objective.train()
        one = self.ranks.size == 1
        try:
            with reporter or contextlib.nullcontext(), _deferred(one) as interrupted:
                self._go_stage(reporter, stats, interrupted)
                while not self.finished:
                    self._close()
                    self._enter(self.at.stage + 1)
                    self._go_stage(reporter, stats, interrupted)
        finally:
            self._close()

    def _go_stage(
        self, reporter: Reporter | None, stats: StepStats | None, interrupted: list[int]
    ) -> None:
        recipe = self.recipe
        batches = iter(self.stream)
        mark = logged = saved = time.monotonic()
        while self.done < 1:
            started = time.monotonic()
            mine = [next(batches).to(self.ranks.device) for _ in range(self.accumulated)]
            if recipe.sample_every and self.at.step % recipe.sample_every == 0:
                paused = time.monotonic()
                self._sample(mine[0], reporter)
                started += time.monotonic() - paused
            factor = self.stage.rate_at(self.at.stage_step, self.done)
            sums, parts = self.update(mine, factor)
            if isinstance(self.stage.data, Clips):
                for batch, part in zip(mine, parts, strict=True):
                    self.mix.update(batch.branch_kinds, part.right.tolist())
            now = time.monotonic()
            self.at = self.at.after(now - mark)
            step, ends, mark = self.at.step, self.done >= 1, now
            if reporter is not None and stats is not None:
                stats.add(sums, parts, now - started)
                reporter.advance(step, self.done, self.stage.name)
                if ends or _due(step, recipe.log_every, now - logged, recipe.log_every_s):
                    asked = isinstance(self.stage.data, Clips) and bool(self.stage.data.branches)
                    accuracy = self.mix.accuracy if asked else None
                    report = stats.report(self.at, self.updater.parts, factor, accuracy)
                    reporter.numbers(step, report)
                    logged = now
            whole = recipe.whole_every > 0 and step % recipe.whole_every == 0
            if (
                ends
                or interrupted
                or _due(step, recipe.save_every, now - saved, recipe.save_every_s)
                or (whole and recipe.average_last > 1)  # of which the newest is to be one
            ):
                self.save()
                saved = now
            if whole:
                self.save_whole()
            if interrupted:
                raise KeyboardInterrupt

    def update(
        self, batches: list[Batch], factor: float = 1.0
    ) -> tuple[UpdateSums, list[BatchSums]]:
        """One step of the weights on this process's share of the batch."""
        device = self.ranks.device
        mine = totals_of(batches, self.cfg.vision.num_cells).to(device)
        weight, aux_cells, number = self.ranks.sum(mine)
        totals = Totals(weight, aux_cells, float(number))
        parts = []
        for batch in batches:
            found = self.objective(batch, totals, self.ranks.size)
            found.loss.backward()
            parts.append(dataclasses.replace(found, loss=found.loss.detach()))
        added = self.ranks.sum(torch.stack([p.sums for p in parts]).sum(0))
        sums = dict(zip(SUMS, added.tolist(), strict=True))
        terms = {type(term): term for term in self.stage.terms}
        answers, weights = terms.get(Answers), max(float(weight), 1e-30)
        losses = {
            "loss": sums["loss"],
            "answer_loss": sums["answer"] / weights,
            "z_loss": answers.z_loss * sums["z"] / weights if isinstance(answers, Answers) else 0.0,
            "aux_loss": sums["aux"] / max(1.0, float(aux_cells)),
        }
        if not math.isfinite(losses["loss"]):  # the same sums, and so the same end, everywhere
            names = sorted({name for batch in batches for name in batch.clip_names})
            raise NonFinite(
                f"the loss of step {self.at.step + 1} is {losses['loss']}",
                where=", ".join(names[:4]),
                remedy="the last checkpoint is intact: resume, with lower learning rates if it "
                "happens again",
            )
        norms = self.updater.apply(factor)
        return UpdateSums(sums, losses, norms), parts

    def _sample(self, batch: Batch, reporter: Reporter | None) -> None:
        lines = sample_answers(
            self.objective,
            batch,
            self.prompt.tokenizer,
            self.prompt.eos_id,
            self.recipe.sample_tokens,
        )
        if reporter is not None and lines:
            reporter.text(self.at.step, "answers", lines)

    def _close(self) -> None:
        """Ends the stream's threads, if it has any."""
        close = getattr(self.stream, "close", None)
        if close is not None:
            close()


def _accumulated(stage: Stage, ranks: Ranks) -> int:
    """Batches of an update in each process."""
    return stage.data.batch // (stage.data.device_batch * ranks.size)


def _check_shared(stage: Stage, ranks: Ranks) -> None:
    data = stage.data
    if ranks.size > 1 and (isinstance(data, Clips) or data.form == "prefix"):
        raise ConfigError(
            f"stage {stage.name}: rendered clips with their truth and prefix batches are for one "
            f"process, and there are {ranks.size}",
            remedy="start it without torchrun, or take a recipe with packed rows",
        )
    if isinstance(data, Clips) and ranks.device.type != "cpu":
        raise ConfigError(
            f"stage {stage.name}: rendered clips with their truth are trained on the CPU",
            remedy="add --set device=cpu",
        )
    rows = data.device_batch * ranks.size
    if data.batch % rows:
        raise ConfigError(
            f"batch = {data.batch} is no multiple of device_batch = {data.device_batch} "
            f"times {ranks.size} processes",
            remedy=f"add --set batch={math.ceil(data.batch / rows) * rows}",
        )


def _due(step: int, every: int, seconds: float, every_s: float) -> bool:
    return bool(every and step % every == 0) or bool(every_s and seconds > every_s)


@contextlib.contextmanager
def _deferred(wanted: bool) -> Iterator[list[int]]:
    """Holds the first interrupt back: it is in the list, for whoever can stop at a better time.

    The second one interrupts at once. Only a main thread can do so.
    """
    caught: list[int] = []
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, _frame: object) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)
