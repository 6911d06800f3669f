"""What each part of the demo model's training is worth: equally long trainings, one thing changed.

    edge-vlm world --benchmark --per-kind 300 --seed 7 -o questions
    python -m benchmarks.training.ablations training/checkpoints/demo questions --runs runs
    python -m benchmarks.training.ablations RUN QUESTIONS --runs runs --only stts,random_cells
    python -m benchmarks.training.ablations RUN QUESTIONS --runs runs --seeds 5,6,7
    python -m benchmarks.training.ablations RUN HARDER --runs harder_runs --set harder_share=1

All variants start from the same weights, see the same number of clips and run through the same
learning rates; a seed decides about the clips and is shared by all variants. Where the question is
how a scorer is learned, it begins with random weights. From a run's folder instead of a
checkpoint's the probes go on as well; fresh ones disturb the vision side at first. A variant
that is trained in `runs` already is only asked, and one that was interrupted goes on. Each is asked
in torch, with what it was trained for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import command_line, device_record, write_result
from benchmarks.summarise import summary_row
from edge_vlm.cli import run_command
from edge_vlm.errors import ConfigError
from edge_vlm_training.config import msgspec
from edge_vlm_training.recipes.base import Clips, Recipe, Steps
from edge_vlm_training.recipes.demo import KEEP_MIXED, demo_recipe, questions
from edge_vlm_training.recipes.overrides import override
from edge_vlm_training.trainer import checkpoints
from edge_vlm_training.trainer.distributed import Ranks
from edge_vlm_training.trainer.train import begin, train

FINISHED = "finished"
PRUNED = ("stream:0.5", "stream:0.2")


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs from the full recipe, and the rows of `edge-vlm eval` that show it."""

    runs: tuple[str, ...]
    settings: tuple[str, ...] = ()
    """As of `edge-vlm train --set`."""


ANEW = ("new_scorer=true",)
VARIANTS = {
    "stts": Variant(("keep_all:1", "stream:0.7", *PRUNED, "clip:0.5", "clip:0.2")),
    "never_pruned": Variant(("keep_all:1",), ("keep_ratio=1",)),
    "random_cells": Variant(("random:0.5", "random:0.2"), ("selection=random",)),
    "all_attention": Variant(
        ("keep_all:1:all", "stream:0.5:all", "stream:0.2:all"), ("attention=all",)
    ),
    "one_fraction": Variant(("keep_all:1", *PRUNED), ("keep_ratio=0.5",)),
    "new_scorer": Variant(PRUNED, ANEW),
    "new_scorer_no_aux_loss": Variant(PRUNED, (*ANEW, "aux_weight=0")),
    "new_scorer_row_rescale": Variant(PRUNED, (*ANEW, "rescale=row")),
    "new_scorer_frame_rescale": Variant(PRUNED, (*ANEW, "rescale=frame")),
}


def recipe_of(variant: Variant, steps: int, seed: int = 5) -> Recipe:
    """Short: everything is trained, the vision side slowly, and the rates run out."""
    data = Clips(batch=8, num_frames=16, branches=16, keep_ratio=KEEP_MIXED, history_share=0.0)
    stage = questions(
        *("compared", Steps(steps), data),
        lr=4e-4,
        vision=4e-5,
        connector=4e-5,
        timeline=0.25,
        rate=(1.0, 0.02),
        decay_from=0.3,
    )
    return override(demo_recipe("ablation", stage, seed=seed), variant.settings)


def trained(name: str, seed: int, args: argparse.Namespace) -> Path:
    folder: Path = args.runs / f"{name}-{seed}"
    recipe = override(recipe_of(VARIANTS[name], args.steps, seed), args.set)
    recipe = msgspec.structs.replace(recipe, init=args.start)
    alone = Ranks(0, 1, torch.device("cpu"))
    if (folder / FINISHED).exists():
        if json.loads((folder / FINISHED).read_text()).get("set") != args.set:
            raise ConfigError("trained with other --set", where=folder, remedy="another --runs")
        begin(recipe, folder, alone, resume=True)  # refuses another start or length
    else:
        train(recipe, folder, alone, resume=checkpoints.latest(folder) is not None)
        last = checkpoints.latest(folder)
        assert last is not None
        minutes = round(checkpoints.progress_of(last).seconds / 60, 1)  # of all its starts
        (folder / FINISHED).write_text(json.dumps({"minutes": minutes, "set": args.set}))
    return folder


def asked(folder: Path, runs: tuple[str, ...], questions: Path) -> list[dict[str, Any]]:
    result = folder / "table.json"
    rows = [argument for run in runs for argument in ("--run", run)]
    command = ["eval", str(folder / "checkpoint"), str(questions), *rows, "--json", str(result)]
    if code := run_command(command):
        raise SystemExit(code)
    return [summary_row(row) for row in json.loads(result.read_text())["rows"]]


def print_table(table: Sequence[dict[str, Any]]) -> None:
    """One line for each variant and run: the mean over the seeds, and what each seed has."""
    means: dict[tuple[str, str], list[float]] = {}
    kept: dict[tuple[str, str], float] = {}
    for entry in table:
        for row in entry["rows"]:
            key = entry["variant"], f"{row['policy']}:{row['keep_ratio']:g}:{row['attention']}"
            means.setdefault(key, []).append(row["mean_percent"])
            kept[key] = row["kept_percent"]
    print(f"{'variant':24} {'run':16} {'kept':>6} {'mean':>6}  of each seed")
    for key, percents in means.items():
        each = " ".join(f"{percent:.1f}" for percent in percents)
        mean = sum(percents) / len(percents)
        print(f"{key[0]:24} {key[1]:16} {kept[key]:5.1f}% {mean:5.1f}%  {each}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("start", type=Path, help="checkpoint or run that all variants start from")
    parser.add_argument("questions", type=Path, help="a folder written by `edge-vlm world`")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the trainings")
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--seeds", default="5", help="one training of each variant for each")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="of all trainings, as of `edge-vlm train`",
    )
    parser.add_argument("--only", help=f"some of {','.join(VARIANTS)}")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    args = parser.parse_args(argv)
    names = args.only.split(",") if args.only else list(VARIANTS)
    if unknown := set(names) - set(VARIANTS):
        parser.error(f"--only: {unknown.pop()!r} is none of {', '.join(VARIANTS)}")
    if not all(seed.isdecimal() for seed in args.seeds.split(",")):
        parser.error(f"--seeds: {args.seeds!r} must be whole numbers, with commas")
    table = []
    for seed in map(int, args.seeds.split(",")):
        for name in names:
            folder = trained(name, seed, args)
            minutes = json.loads((folder / FINISHED).read_text())["minutes"]
            rows = asked(folder, VARIANTS[name].runs, args.questions)
            entry = {"variant": name, "seed": seed, "steps": args.steps, "minutes": minutes}
            table.append({**entry, "rows": rows})
            if args.out:  # after each: the next one may be stopped
                record = {
                    "command": command_line(__file__, argv),
                    **device_record(torch.device("cpu")),
                }
                write_result(args.out, record | {"variants": table})
    print_table(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
