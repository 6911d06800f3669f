"""Runs a recipe: stage after stage, each leaving a state file from which a run can go on."""

from __future__ import annotations

import functools
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edge_vlm.config import ModelConfig, VisionAttention
from edge_vlm.errors import CheckpointError
from edge_vlm.model.checkpoint import TOKENIZER, load_checkpoint, save_checkpoint
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm_training.data.prefix_packing import Packer
from edge_vlm_training.objective.losses import feature_scale_loss
from edge_vlm_training.objective.probes.dense import (
    CELL_COVERED,
    COVERED,
    DenseHead,
    WordHead,
    dense_labels,
    dense_loss,
    whole_vit,
)
from edge_vlm_training.objective.probes.presence import PresentHead, present, present_loss
from edge_vlm_training.objective.probes.timeline import TimelineHead, timeline, timeline_loss
from edge_vlm_training.objective.step import STORY_BLOCKS, answer, keep_mask, see, to_pixel_values
from edge_vlm_training.recipes.stages import Recipe, Stage
from edge_vlm_training.trainer.master_adamw import MasterAdamW
from edge_vlm_training.world.curriculum import QuestionMix
from edge_vlm_training.world.more_words import vocabulary_of, with_more_words
from edge_vlm_training.world.questions import vocabulary
from edge_vlm_training.world.render import render_with_owner
from edge_vlm_training.world.scenes import COLOUR_NAMES, WorldConfig, sample_scenes
from edge_vlm_training.world.sprites import KINDS
from edge_vlm_training.world.vocabulary import build_tokenizer

STATE, LOG = "state.pt", "log.jsonl"
_SAVE_EVERY_S = 120.0
_LOG_EVERY_S = 20.0
_CHECKPOINT = "checkpoint"
_HEADS = "heads."
_MOST_CLIPS = 24
_MOST_FORGOTTEN = 6
_LONGEST_PAUSE_S = 40


class Trainer:
    """One process, bf16 compute, fp32 master weights; everything it writes lies in `folder`."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        init: Path | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        """`init` is a checkpoint folder to start from, or that of a run, whose read-outs go on as
        well: fresh ones pull hard on trained features. Without it weights are random.

        Raises CheckpointError when `init` cannot be read or has another vocabulary.
        """
        self.recipe, self.folder, self.dtype, self.report = recipe, folder, dtype, report
        folder.mkdir(parents=True, exist_ok=True)
        base, extra = build_tokenizer(vocabulary(), folder / TOKENIZER)
        self.config: ModelConfig = recipe.model(base, extra)
        generator = torch.Generator().manual_seed(recipe.seed)
        self.model = VideoLM(self.config).init_weights(generator)
        read_outs: dict[str, Tensor] = {}
        if init is not None:
            if (init / STATE).is_file():
                masters = torch.load(init / STATE, weights_only=True)["masters"]
                read_outs = {name: t for name, t in masters.items() if name.startswith(_HEADS)}
                init = init / _CHECKPOINT
            self._start_from(init)
        words = Tokenizer.from_file(folder / TOKENIZER)
        self.heads = nn.ModuleDict(
            {
                "vit": DenseHead(self.config.vision.width),
                "connector": WordHead(
                    self.config.language.width,
                    [words.id_of(f" {name}") for name in KINDS],
                    [words.id_of(f" {name}") for name in COLOUR_NAMES],
                ),
                "timeline": nn.ModuleList(
                    TimelineHead(self.config.language.width) for _ in range(STORY_BLOCKS)
                ),
                "present": nn.ModuleList(
                    PresentHead(self.config.language.width) for _ in range(STORY_BLOCKS)
                ),
            }
        )
        self.packer = Packer(PromptFormat(words), recipe.attention)
        self.mix = QuestionMix(recipe.seed)
        self.rng = random.Random(recipe.seed)
        self.masters: dict[str, Tensor] = {}
        self.stage_index, self.stage_s, self.stage_steps = 0, 0.0, 0
        self.total_steps, self.total_s = 0, 0.0
        self._remember(dict(self.model.named_parameters()))
        self._remember({_HEADS + n: p for n, p in self.heads.named_parameters()})
        self._remember(read_outs)

    def _remember(self, named: dict[str, nn.Parameter] | dict[str, Tensor]) -> None:
        self.masters.update({name: p.detach().float().clone() for name, p in named.items()})

    def _start_from(self, checkpoint: Path) -> None:
        weights = load_checkpoint(checkpoint).state_dict()
        try:
            known, wanted = (vocabulary_of(f / TOKENIZER) for f in (checkpoint, self.folder))
            weights = with_more_words(weights, known, wanted, self.config.language.base_vocab)
            if self.recipe.new_scorer:
                fresh = self.model.state_dict()
                weights |= {name: fresh[name] for name in fresh if name.startswith("scorer.")}
            self.model.load_state_dict(weights)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint is not one of this recipe's models: {error}",
                where=checkpoint,
                remedy="start without --init, or from a checkpoint of this shape and world",
            ) from error

    # -- state ------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the resumable state and the checkpoint folder as it would be used."""
        state = {
            "recipe": self.recipe.name,
            "masters": self.masters,
            "stage": self.stage_index,
            "stage_s": self.stage_s,
            "stage_steps": self.stage_steps,
            "total_steps": self.total_steps,
            "total_s": self.total_s,
            "accuracy": self.mix.accuracy,
        }
        partial = self.folder / f"{STATE}.partial"
        torch.save(state, partial)
        os.replace(partial, self.folder / STATE)
        weights = {n: t for n, t in self.masters.items() if not n.startswith(_HEADS)}
        save_checkpoint(self.folder / _CHECKPOINT, self.config, weights, self.folder / TOKENIZER)

    def resume(self) -> None:
        """Goes on from the last state; the optimiser's moments start anew with a warm-up."""
        path = self.folder / STATE
        if not path.is_file():
            raise CheckpointError(
                "nothing to resume", where=path, remedy="leave out --resume to start a new run"
            )
        state = torch.load(path, weights_only=True)
        missing = self.masters.keys() - state["masters"].keys()
        if missing:
            raise CheckpointError(
                f"the state lacks {len(missing)} weights, first {min(missing)}",
                where=path,
                remedy="resume with the recipe that wrote it",
            )
        self.masters = state["masters"]
        self.stage_index, self.stage_s = state["stage"], state["stage_s"]
        self.stage_steps = state["stage_steps"]
        self.total_steps, self.total_s = state["total_steps"], state["total_s"]
        self.mix.accuracy.update(state["accuracy"])

    # -- run --------------------------------------------------------------------------------

    def run(self) -> Path:
        """Trains what is left of the recipe; returns the checkpoint folder."""
        while self.stage_index < len(self.recipe.stages):
            self._run_stage(self.recipe.stages[self.stage_index])
            self.stage_index, self.stage_s, self.stage_steps = self.stage_index + 1, 0.0, 0
            self.save()
        return self.folder / _CHECKPOINT

    def _run_stage(self, stage: Stage) -> None:
        # A different stream of clips for every stretch of work, also after a resume.
        seed = hash((self.recipe.seed, self.stage_index, self.total_steps)) % 2**31
        self.rng.seed(seed)
        self.mix.rng.seed(seed + 1)
        self._load_masters()
        optimizer = MasterAdamW(self._groups(stage))
        started, saved, logged = time.monotonic(), time.monotonic(), 0.0
        before, steps = self.stage_s, 0
        sums: dict[str, float] = {}
        while (progress := stage.progress(self.stage_s, self.stage_steps)) < 1 or steps == 0:
            rate = stage.rate_at(progress)
            rate *= min(1.0, (steps + 1) / self.recipe.warmup_steps)
            metrics = self._dense_step(stage) if stage.dense else self._clip_step(stage)
            metrics["norm"] = optimizer.step(rate, self.recipe.clip_norm)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + value
            sums["steps"] = sums.get("steps", 0.0) + 1
            steps += 1
            self.stage_steps += 1
            self.total_steps += 1
            now = time.monotonic()
            self.total_s += now - started - (self.stage_s - before)
            self.stage_s = before + now - started
            if now - logged > _LOG_EVERY_S:
                self._log(stage, sums, rate)
                sums, logged = {}, now
            if now - saved > _SAVE_EVERY_S:
                self.masters.update(optimizer.masters())
                self.save()
                saved = now
        self._log(stage, sums, 0.0)
        self.masters.update(optimizer.masters())

    def _load_masters(self) -> None:
        own = {n: t for n, t in self.masters.items() if not n.startswith(_HEADS)}
        heads = {n[len(_HEADS) :]: t for n, t in self.masters.items() if n.startswith(_HEADS)}
        self.model.load_state_dict(own)
        self.heads.load_state_dict(heads)
        self.model.to(self.dtype)
        self.heads.to(self.dtype)

    def _groups(self, stage: Stage) -> list[tuple[float, dict[str, nn.Parameter]]]:
        """Parameters by peak learning rate; what is not in a group does not change."""
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

        def part(*prefixes: str) -> dict[str, nn.Parameter]:
            named = {n: p for n, p in self.model.named_parameters() if n.startswith(prefixes)}
            for parameter in named.values():
                parameter.requires_grad_(True)
            return named

        def head(name: str) -> dict[str, nn.Parameter]:
            return {f"{_HEADS}{name}.{n}": p for n, p in self.heads[name].named_parameters()}

        if stage.dense:
            return [(stage.lr_vision, part("vit.")), (stage.lr, head("vit"))]
        read_outs = [(stage.lr, head(name)) for name in ("connector", "timeline", "present")]
        if stage.freeze_vision:
            return [(stage.lr, part("llm.")), *read_outs]
        return [
            (stage.lr, part("llm.", "scorer.")),
            *read_outs,
            (stage.lr_vision, part("vit.")),
            (stage.lr_connector, part("connector.")),
        ]

    def _dense_step(self, stage: Stage) -> dict[str, float]:
        cfg = self.config.vision
        scenes = sample_scenes(self.rng.getrandbits(40), stage.batch, WorldConfig(num_frames=1))
        frames, owner = render_with_owner(scenes, cfg.image_size)
        labels = dense_labels(scenes, owner, cfg.patch_grid, COVERED)
        pixels = to_pixel_values(frames, cfg, self.dtype)
        loss, metrics = dense_loss(self.heads["vit"](whole_vit(self.model.vit, pixels)), labels)
        loss.backward()
        return {"loss": loss.item(), **metrics}

    def _clip_step(self, stage: Stage) -> dict[str, float]:
        cfg, recipe = self.config.vision, self.recipe
        num_frames, batch = stage.num_frames, stage.batch
        if stage.shorter and self.rng.random() < 0.5:
            num_frames = self.rng.choice(stage.shorter)
            batch = min(_MOST_CLIPS, batch * stage.num_frames // num_frames)
        forgotten, pause_s = 0, 0.0
        if num_frames > 2 and self.rng.random() < recipe.forgetful_share:
            forgotten = self.rng.randint(1, _MOST_FORGOTTEN)
            pause_s = self.rng.randint(0, _LONGEST_PAUSE_S)
        at_end = recipe.attention is VisionAttention.ALL
        if at_end:  # all questions see the whole clip: only its length varies their moment
            num_frames = self.rng.randint(1, stage.num_frames)
            batch = min(_MOST_CLIPS, batch * stage.num_frames // num_frames)
            forgotten = 0
        world = WorldConfig(num_frames=num_frames + forgotten, crowded=recipe.crowded)
        scenes = sample_scenes(self.rng.getrandbits(40), batch, world)
        frames, owner = render_with_owner(scenes, cfg.image_size)
        labels = dense_labels(scenes, owner, cfg.cell_grid, CELL_COVERED)
        stories = timeline(scenes, owner, cfg.cell_grid, CELL_COVERED, forgotten)
        shown = np.array([0, *range(1 + forgotten, world.num_frames)])
        there = present(scenes, owner, cfg.cell_grid, CELL_COVERED, shown)
        frames, times_s = frames[:, shown], scenes.times_s()[:, shown]
        times_s[:, 1:] += pause_s
        asked = [
            self.mix.branches(scenes, b, stage.branches, recipe.history_share, forgotten, at_end)
            for b in range(batch)
        ]
        choose = functools.partial(
            keep_mask,
            selection=self.rng.choice(recipe.selection),
            removed=self.rng.choice(stage.removed),
            floor=self.rng.randint(0, recipe.min_cells),
            seed=self.rng.getrandbits(31),
        )
        pixels = to_pixel_values(frames, cfg, self.dtype)
        with torch.set_grad_enabled(not stage.freeze_vision):
            seen = see(self.model, pixels, num_frames, choose)
        packed = self.packer.pack(
            seen.counts_BT.numpy(),
            times_s,
            [branches for branches, _ in asked],
            self.dtype,
        )
        answered = answer(self.model, seen, packed, self.packer.prompt.patch_id)
        loss = answered.loss
        metrics = {"loss": loss.item(), "aux": seen.aux_loss.item()}
        cells = torch.arange(batch * world.num_frames * cfg.num_cells)
        cells = cells.view(batch, world.num_frames, -1)[:, shown].flatten()[seen.cell_idx_G]
        for number, (hidden, ends) in enumerate(zip(answered.hidden, answered.ends, strict=True)):
            outputs = self.heads.get_submodule(f"timeline.{number}")(hidden)
            story, read = timeline_loss(outputs, stories.at(cells))
            outputs = self.heads.get_submodule(f"present.{number}")(ends, hidden)
            now, found = present_loss(outputs, there.at(seen.cell_idx_G))
            told = recipe.timeline_weight * story + recipe.present_weight * now
            loss = loss + stage.read_outs * told
            metrics |= read | found
        read_out = self.heads["connector"](seen.features_GE, self.model.llm.embed.weight)
        dense, read = dense_loss(read_out, labels.at(cells))
        loss = loss + recipe.dense_weight * dense
        metrics |= read
        if not stage.freeze_vision:
            scale = feature_scale_loss(seen.features_GE)
            loss = loss + recipe.aux_weight * seen.aux_loss + recipe.scale_weight * scale
        loss.backward()
        self.mix.update([kind for _, kinds in asked for kind in kinds], answered.right.tolist())
        kept = float(seen.counts_BT.sum()) / (seen.counts_BT.numel() * cfg.num_cells)
        rms = float(seen.features_GE.detach().float().square().mean().sqrt())
        return metrics | {"kept": kept, "scale": rms}

    def _log(self, stage: Stage, sums: dict[str, float], rate: float) -> None:
        steps = sums.pop("steps", 0.0)
        if not steps:
            return
        line: dict[str, object] = {
            "minutes": round(self.total_s / 60, 2),
            "stage": stage.name,
            "step": self.total_steps,
            "rate": round(rate, 3),
            **{name: round(value / steps, 4) for name, value in sums.items()},
        }
        if not stage.dense:
            line["accuracy"] = {k: round(v, 3) for k, v in self.mix.accuracy.items()}
        with open(self.folder / LOG, "a") as log:
            log.write(json.dumps(line) + "\n")
        self.report(" ".join(f"{k}={v}" for k, v in line.items()))
