"""How much faster a training step is, and how much less memory it takes, with fewer cells kept.

    python -m benchmarks.training.train_step                 # the scaled-down model, on the CPU
    python -m benchmarks.training.train_step --device cuda --size molmo2_4b --clips 2 --frames 64
    python -m benchmarks.training.train_step --size tiny --out tiny.json

A step is all of it: pixels, vision side, language model, loss, backward pass, clipping, AdamW.
Unpruned (no scorer, every cell) and pruned steps of the same model on the same clips are timed in
turn in one run. The bound of the speed-up is the ratio of matrix-product operations. Peak memory is
the most that the process held during a step: on a CPU its resident set, weights and moments
included; on a GPU what torch allocated. Beside it stands what `edge-vlm train` would have estimated
for these shapes. On a CPU, which others may use as well, seconds are those of computing on one
thread, unless `--clock wall` is given.

The scaled-down model has Molmo2's proportions where they matter: 729 patches and 81 cells a frame,
25 blocks of which five see whole frames, about as much work in the vision side as in the language
model. Goal: 1.5 times at 50 % kept.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import (
    command_line,
    device_record,
    in_turn,
    progress,
    speed_up,
    summary,
    write_result,
)
from edge_vlm.config import (
    ConnectorConfig,
    LanguageConfig,
    ModelConfig,
    Rescale,
    ScorerConfig,
    VisionAttention,
    VisionConfig,
)
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import molmo2_4b, tiny
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm_training.data.packing.assemble import assemble
from edge_vlm_training.data.packing.batch import Batch, PackedBatch
from edge_vlm_training.data.packing.budget import CellBudget
from edge_vlm_training.data.packing.trees import TokenWeights, TreeBuilder
from edge_vlm_training.data.sample import Branch, Sample
from edge_vlm_training.objective.objective import SUMS
from edge_vlm_training.recipes.base import Recipe, Rows
from edge_vlm_training.recipes.molmo2 import stts
from edge_vlm_training.recipes.overrides import override
from edge_vlm_training.trainer.distributed import Ranks
from edge_vlm_training.trainer.loop import Run
from edge_vlm_training.trainer.memory import GIB, estimate
from edge_vlm_training.trainer.speed import training_flops
from edge_vlm_training.world.vocabulary import build_tokenizer

RESULTS = Path(__file__).parents[1] / "results"
UNPRUNED = "unpruned"
QUESTION, QUESTIONS = "how many things are there now?", 8
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
SIZES = ("scaled", "tiny", "molmo2_4b")


def scaled() -> ModelConfig:
    """Molmo2's vision side at a third of its width, and a language model of 16 blocks to match."""
    return ModelConfig(
        vision=VisionConfig(
            image_size=378,
            patch_size=14,
            width=384,
            num_heads=6,
            head_dim=64,
            mlp_width=1432,
            num_layers=25,
            feature_layers=(24, 18),
        ),
        scorer=ScorerConfig(prune_at=3, num_heads=6, head_dim=64, mlp_width=1432),
        connector=ConnectorConfig(width=384, num_heads=6, head_dim=64, mlp_width=3072),
        language=LanguageConfig(
            width=1024,
            num_layers=16,
            num_heads=16,
            num_kv_heads=8,
            head_dim=64,
            mlp_width=3072,
            base_vocab=4096,
            extra_vocab=128,
            rope_theta=5e6,
            max_positions=36_864,
        ),
    )


def config_of(size: str) -> ModelConfig:
    """In our mode: scores stretched by frame, past frames left alone."""
    cfg = {"scaled": scaled, "tiny": tiny, "molmo2_4b": molmo2_4b}[size]()
    assert cfg.scorer is not None
    scorer = dataclasses.replace(cfg.scorer, rescale=Rescale.FRAME)
    return dataclasses.replace(cfg, scorer=scorer, attention=VisionAttention.FRAME)


def noise_batch(
    cfg: ModelConfig, prompt: PromptFormat, clips: int, frames: int, keep_ratio: float
) -> PackedBatch:
    """Rows of one clip of noise each, with short questions behind its last frame."""
    rng = np.random.default_rng(0)
    side = cfg.vision.image_size
    branches = tuple(
        Branch(kind="count", question=QUESTION, answer=str(number)) for number in range(QUESTIONS)
    )
    pictures = [rng.integers(256, size=(frames, side, side, 3), dtype=np.uint8)] * clips
    builder = TreeBuilder(prompt, cfg.attention)
    trees = [
        builder.build(
            Sample(
                name=f"noise {number}",
                times_s=np.arange(frames) / 2,
                branches=branches,
                load=lambda _: pictures[0],
            )
        )
        for number in range(clips)
    ]
    budget = CellBudget(cfg=cfg, keep_ratio=keep_ratio, min_cells=2)
    return assemble([[tree] for tree in trees], pictures, prompt, TokenWeights(), budget)


@contextlib.contextmanager
def no_scorer(run: Run) -> Iterator[None]:
    """The same weights as a model that keeps every cell."""
    model = run.model
    scorer, cfg = model.scorer, model.cfg
    model.scorer, model.cfg = None, dataclasses.replace(cfg, scorer=None)
    try:
        yield
    finally:
        model.scorer, model.cfg = scorer, cfg


class PeakMemory:
    """The most memory of each case, read behind every run of it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.most: dict[str, float] = {}

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # forgets the resident set's peak

    def stop(self, name: str) -> None:
        if self._device.type == "cuda":
            size = float(torch.cuda.max_memory_allocated(self._device))
        else:
            lines = Path("/proc/self/status").read_text().splitlines()
            size = float(next(x.split()[1] for x in lines if x.startswith("VmHWM"))) * 1024
        self.most[name] = max(self.most.get(name, 0.0), size / GIB)


def measure(
    cfg: ModelConfig,
    device: torch.device,
    recipe: Recipe,
    *,
    frames: int,
    shares: list[float],
    rounds: int,
    warmups: int,
    clock: str,
) -> dict[str, Any]:
    """Seconds and peak memory of a step, unpruned and at each share kept."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Path(folder) / "tokenizer.json"
        build_tokenizer([QUESTION], tokenizer)
        prompt = PromptFormat(Tokenizer.from_file(tokenizer))
    model = VideoLM(cfg).init_weights(torch.Generator().manual_seed(0))
    ranks = Ranks(0, 1, device)
    clips = recipe.stages[0].data.batch
    batches = {
        share: noise_batch(cfg, prompt, clips, frames, share).to(device) for share in [1.0, *shares]
    }
    run = Run(recipe, cfg, model, lambda at, mix: _NoStream(), ranks, Path(), prompt)
    run.objective.train()
    peak = PeakMemory(device)
    flops: dict[str, float] = {}
    kept: dict[str, float] = {}

    def step(name: str, share: float) -> None:
        peak.start()
        plain = no_scorer(run) if name == UNPRUNED else contextlib.nullcontext()
        with plain:
            _, parts = run.update([batches[share]])
            (part,) = parts
            trained = int(part.sums[SUMS.index("trained")])
            cells, rows = part.kept_F.tolist(), part.row_tokens_R.tolist()
            flops[name] = training_flops(run.model.cfg, cells, rows, trained)
        kept[name] = sum(cells) / (len(cells) * cfg.vision.num_cells)
        peak.stop(name)

    names = {f"kept {share:g}": share for share in shares}
    cases: dict[str, Callable[[], object]] = {UNPRUNED: partial(step, UNPRUNED, 1.0)}
    cases |= {name: partial(step, name, share) for name, share in names.items()}
    seconds = in_turn(
        cases, rounds=rounds, warmups=warmups, device=device, say=progress, clock=CLOCKS[clock]
    )
    results: dict[str, Any] = {}
    for name in cases:
        kept_share = names.get(name, 1.0)
        rows = batches[kept_share].tokens.ids_RS.shape[1]
        spared = round((1 - kept_share) * frames * cfg.vision.num_cells)
        fields = [f"sequence_length={rows - spared}", f"keep_ratio={kept_share}"]
        shape = override(recipe, [*fields, f"row_frames={frames}"])
        results[name] = summary(seconds[name]) | {
            "cells_kept": round(kept[name], 4),
            "tflop": round(flops[name] / 1e12, 4),
            "tflop_per_s": round(flops[name] / 1e12 / summary(seconds[name])["median_s"], 4),
            "peak_gib": round(peak.most[name], 3),
            "estimated_gib": round(
                estimate(shape, cfg, 1, cuda=device.type == "cuda").total / GIB, 3
            ),
        }
        if name != UNPRUNED:
            results[name] |= {
                "speed_up": round(speed_up(seconds[UNPRUNED], seconds[name]), 3),
                "bound": round(flops[UNPRUNED] / flops[name], 3),
                "share_of_unpruned_memory": round(peak.most[name] / peak.most[UNPRUNED], 3),
            }
    return {
        **device_record(device),
        "precision": recipe.precision,
        "activation_checkpointing": recipe.activation_checkpointing,
        "parameters": sum(p.numel() for p in model.parameters()),
        "clips": clips,
        "frames": frames,
        "rounds": rounds,
        "clock": clock,
        "cases": results,
    }


class _NoStream:
    """`Run.update` is given its batches."""

    def __iter__(self) -> Iterator[Batch]:
        return iter(())

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['device']}, {result['precision']}, {result['parameters'] / 1e6:.0f} M parameters,"
        f" {result['clips']} x {result['frames']} frames",
        f"{'':12} {'median s':>9} {'speed-up':>9} {'bound':>7} {'peak GiB':>9} {'estimate':>9}",
    ]
    for name, case in result["cases"].items():
        faster = f"{case['speed_up']:9.2f} {case['bound']:7.2f}" if "bound" in case else " " * 17
        lines.append(
            f"{name:12} {case['median_s']:9.3f} {faster} {case['peak_gib']:9.2f} "
            f"{case['estimated_gib']:9.2f}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=SIZES, default="scaled")
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--frames", type=int, default=8)
    share = parser.add_mutually_exclusive_group()
    share.add_argument("--keep-ratio", type=float, nargs="+", default=[0.7, 0.5])
    share.add_argument("--removed", type=float, nargs="+", help="the same as shares removed")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--clock", choices=list(CLOCKS), help="default: processor on a CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmups", type=int, default=1)
    parser.add_argument("--out", type=Path, help="default: results/train_step_DEVICE.json")
    args = parser.parse_args(argv)
    clock = args.clock or ("wall" if args.device == "cuda" else "processor")
    if clock == "processor":
        if args.device == "cuda":
            parser.error("--clock processor is for --device cpu")
        torch.set_num_threads(1)  # threads that wait for each other would count, too
    if args.removed:
        args.keep_ratio = [round(1 - share, 6) for share in args.removed]
    rows = Rows(
        batch=args.clips, device_batch=args.clips, sequence_length=9686, max_frames=args.frames
    )
    recipe = Recipe(
        name="train_step",
        stages=(stts(1_000_000, rows),),
        precision=args.precision,
        activation_checkpointing=args.activation_checkpointing,
    )
    result = measure(
        config_of(args.size),
        torch.device(args.device),
        recipe,
        frames=args.frames,
        shares=args.keep_ratio,
        rounds=args.rounds,
        warmups=args.warmups,
        clock=clock,
    )
    print(table(result))
    path = args.out or RESULTS / f"train_step_{args.device}.json"
    record = {"command": command_line(__file__, argv), "config": args.size, **result}
    if args.out or args.size != "tiny":
        write_result(path, record)
        print(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
