"""Runs on batches made by hand. As a program it is what `torchrun` starts in each process:

torchrun --nproc-per-node 2 -m tests.training.trainer.runs FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from edge_vlm.errors import CheckpointError
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import tiny
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm_training.recipes.base import Recipe
from edge_vlm_training.recipes.molmo2 import stts_smoke
from edge_vlm_training.recipes.overrides import override
from edge_vlm_training.trainer import checkpoints
from edge_vlm_training.trainer.distributed import Ranks, join_ranks
from edge_vlm_training.trainer.loop import Run
from edge_vlm_training.trainer.progress import LOG, Reporter
from edge_vlm_training.world.vocabulary import build_tokenizer
from tests.training.trainer.batches import HandStream

ALONE = Ranks(0, 1, torch.device("cpu"))
RECIPE = override(
    stts_smoke(),
    [
        *("model=tiny", "steps=4", "batch=2", "device_batch=1", "save_every=2"),
        *("sample_every=2", "sample_tokens=2", "peak_tflops=1"),
    ],
)


def make_run(folder: Path, recipe: Recipe = RECIPE, ranks: Ranks = ALONE) -> Run:
    folder.mkdir(exist_ok=True)
    if ranks.leads:
        build_tokenizer(["a few words"], folder / "tokenizer.json")
    ranks.wait()
    cfg = tiny()
    model = VideoLM(cfg).init_weights(torch.Generator().manual_seed(recipe.seed))
    prompt = PromptFormat(Tokenizer.from_file(folder / "tokenizer.json"))
    stream = HandStream(cfg, ranks.rank, ranks.size)
    return Run(recipe, cfg, model, lambda at, mix: stream, ranks, folder, prompt)


def go(run: Run) -> list[dict[str, Any]]:
    """Trains to the end; the reports of all steps."""
    reporter = None
    if run.ranks.leads:
        reporter = Reporter(run.folder, run.at.step, console=None)
    run.go(reporter)
    return reports(run.folder)


def reports(folder: Path, name: str = LOG) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def older(path: Path) -> None:
    """Makes a checkpoint one of those before there were checksums."""
    for file in path.glob("*.json"):
        data = json.loads(file.read_text())
        file.write_text(json.dumps({k: v for k, v in data.items() if not k.endswith("crc32")}))


def refuse_the_newest(run: Run) -> None:
    """Leaves what each process says of the newest checkpoint in a file, and removes it."""
    try:
        run.resume()
    except CheckpointError as error:
        (run.folder / f"refused-{run.ranks.rank}").write_text(str(error))
    run.ranks.wait()
    if run.ranks.leads and (newest := checkpoints.latest(run.folder)):
        shutil.rmtree(newest)
    run.ranks.wait()


def damage_the_newest(run: Run) -> None:
    """What the second process wrote of it."""
    file = (checkpoints.latest(run.folder) or run.folder) / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1] + b"?")


FIRST = "first.jsonl"
"""What was reported before the newest checkpoint was damaged."""


def main(folder: str) -> None:
    """Trains, then once more from the checkpoint before the newest, which is damaged by then."""
    recipe = override(RECIPE, ["activation_checkpointing=true"])
    with join_ranks("cpu") as ranks:
        run = make_run(Path(folder), recipe, ranks)
        go(run)
        run.save_whole()
        if ranks.leads:
            shutil.copyfile(run.folder / LOG, run.folder / FIRST)
            damage_the_newest(run)
        ranks.wait()
        again = make_run(run.folder, recipe, ranks)
        refuse_the_newest(again)
        again.resume()
        go(again)


if __name__ == "__main__":
    main(*sys.argv[1:])
