"""How full packed rows are: Molmo2's knapsack against simpler rules, on drawn clips.

    python -m benchmarks.training.packing
    python -m benchmarks.training.packing --frames 64 64 --keep-ratio 0.7

Clips have a number of frames drawn from a range, 88 tokens a frame unpruned (81 cells, two
markers, five of the time stamp) of whose cells the share `--keep-ratio` is kept, and one to
seven annotations of 20 to 400 tokens. No picture is made. Every rule packs the same clips into rows
of at most `--tokens` tokens and `--row-frames` frames:

- alone: each clip has a row of its own
- in order: clips follow each other until the next one does not fit
- knapsack: what training does (`edge_vlm_training.data.packing.knapsack`)

`filled` is the share of all rows' tokens that are not padding. Rows have a bound on frames, too:
where that is met first, no rule can fill the tokens.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import command_line, device_record, progress, write_result
from edge_vlm.presets import molmo2_4b
from edge_vlm.pruning.clip_budget import num_kept
from edge_vlm_training.data.packing.knapsack import fill_row

OUT = Path(__file__).parents[1] / "results" / "packing.json"
STAMP_TOKENS = 7
Clip = tuple[int, int]
"""Tokens and frames."""


def draw_clips(count: int, frames: tuple[int, int], keep_ratio: float, seed: int) -> list[Clip]:
    rng = np.random.default_rng(seed)
    cells = molmo2_4b().vision.num_cells
    clips = []
    for _ in range(count):
        length = int(rng.integers(frames[0], frames[1] + 1))
        branches = int(rng.integers(20, 401, int(rng.integers(1, 8))).sum())
        kept = num_kept(length, cells, keep_ratio, variant="first_whole")
        clips.append((1 + length * STAMP_TOKENS + kept + branches, length))
    return clips


def in_order(clips: list[Clip], max_tokens: int, max_frames: int) -> list[int]:
    """Tokens of each row."""
    rows, tokens, frames = [], 0, 0
    for clip_tokens, clip_frames in clips:
        if tokens and (tokens + clip_tokens > max_tokens or frames + clip_frames > max_frames):
            rows.append(tokens)
            tokens = frames = 0
        tokens, frames = tokens + clip_tokens, frames + clip_frames
    return [*rows, tokens]


def by_knapsack(
    clips: list[Clip], max_tokens: int, max_frames: int, window: int
) -> tuple[list[int], float]:
    """Tokens of each row, and seconds of choosing a row on average."""
    waiting, rows, started = list(clips), [], time.perf_counter()
    while waiting:
        shown = waiting[:window]
        chosen = fill_row([t for t, _ in shown], [f for _, f in shown], max_tokens, max_frames)
        rows.append(sum(shown[i][0] for i in chosen))
        waiting = [clip for i, clip in enumerate(waiting) if i not in set(chosen)]
    return rows, (time.perf_counter() - started) / len(rows)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    found = []
    for keep_ratio in args.keep_ratio:
        clips = draw_clips(args.clips, tuple(args.frames), keep_ratio, args.seed)
        total = sum(tokens for tokens, _ in clips)
        chosen, seconds = by_knapsack(clips, args.tokens, args.row_frames, args.window)
        rules = {
            "alone": [tokens for tokens, _ in clips],
            "in order": in_order(clips, args.tokens, args.row_frames),
            "knapsack": chosen,
        }
        assert all(sum(rows) == total and max(rows) <= args.tokens for rows in rules.values())
        line: dict[str, Any] = {"keep_ratio": keep_ratio, "ms_per_row": round(seconds * 1e3, 2)}
        for rule, rows in rules.items():
            line[rule] = {
                "rows": len(rows),
                "clips_per_row": round(len(clips) / len(rows), 2),
                "filled": round(total / (len(rows) * args.tokens), 4),
            }
        found.append(line)
        shares = ", ".join(f"{rule} {line[rule]['filled']:.1%}" for rule in rules)
        progress(f"{keep_ratio:.0%} kept: filled {shares}; {line['ms_per_row']} ms a row")
    return {"results": found}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=1500)
    parser.add_argument("--frames", type=int, nargs=2, default=(8, 64), metavar=("LEAST", "MOST"))
    share = parser.add_mutually_exclusive_group()
    share.add_argument("--keep-ratio", type=float, nargs="+", default=[1.0, 0.7, 0.5, 0.2])
    share.add_argument("--removed", type=float, nargs="+", help="the same as shares removed")
    parser.add_argument("--tokens", type=int, default=9686)
    parser.add_argument("--row-frames", type=int, default=256)
    parser.add_argument("--window", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    if args.removed:
        args.keep_ratio = [round(1 - share, 6) for share in args.removed]
    result = {
        "command": command_line(__file__, argv),
        **device_record(torch.device("cpu")),
        **measure(args),
    }
    write_result(args.out, result)


if __name__ == "__main__":
    main()
