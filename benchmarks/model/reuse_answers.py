"""What computing changed cells only costs in right answers: reuse off and on, over the same clips.

    python -m benchmarks.model.reuse_answers --clips 200
    python -m benchmarks.model.reuse_answers CHECKPOINT --threshold 8 --run stream:0.5

Held-out clips of the rendered world are looked at twice by the same weights in torch, whole and by
the rule of a session with `reuse`, and asked the same questions. They are tabled by c, the share of
cells that the rule has computed of the frames after the first: little changes, about half, most.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import (
    CHECKPOINT,
    RESULTS,
    progress,
    result_head,
    script_parser,
    write_result,
)
from edge_vlm.config import VisionConfig
from edge_vlm.evaluation.grading import judge
from edge_vlm.evaluation.runs import Run
from edge_vlm.formats.qa_set import ClipQuestions
from edge_vlm.model.evaluator import TorchEvaluator
from edge_vlm.model.published.folder import open_folder
from edge_vlm.pixels.frames import decode_jpeg
from edge_vlm.pixels.patches import to_pixel_values
from edge_vlm.pruning.reuse import ReuseRule, computed_cells
from edge_vlm_training.world.heldout import heldout_clips

GROUPS = (("still", 0.0, 1 / 3), ("half-moving", 1 / 3, 2 / 3), ("busy", 2 / 3, 1.01))
"""By c."""


def share(clip: ClipQuestions, vision: VisionConfig, rule: ReuseRule) -> float:
    """c of a clip."""
    pixels = np.stack([to_pixel_values(decode_jpeg(jpeg), vision) for jpeg in clip.jpegs])
    return float(computed_cells([pixels], vision.num_cells, rule)[1:].mean())


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "reuse_answers.json")
    parser.add_argument("checkpoint", type=Path, nargs="?", default=CHECKPOINT)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--per-clip", type=int, default=2, help="questions of each kind (2)")
    parser.add_argument("--seed", type=int, default=20_021)
    parser.add_argument("--threshold", type=float, default=8.0, help="grey levels (8)")
    parser.add_argument("--run", action="append", dest="runs", metavar="POLICY:KEEP")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    runs = [Run.parse(text) for text in args.runs or ("keep_all", "stream:0.5", "stream:0.2")]
    result = {
        **result_head(__file__, argv, torch.device("cpu")),
        "checkpoint": args.checkpoint.resolve().name,
        "threshold": args.threshold,
        "seed": args.seed,
        "groups": measure(args, runs),
    }
    for name, group in result["groups"].items():
        print(f"{name}: {group['clips']} clips, c = {group['c']:.2f}")
        for run, figures in group["runs"].items():
            print(
                f"  {run:16} {figures['questions']:5} questions: off {figures['off']:6.2f} %, "
                f"on {figures['on']:6.2f} %, difference {figures['difference']:+.2f} "
                f"(95 %: {figures['low']:+.2f} to {figures['high']:+.2f})"
            )
    write_result(args.out, result)
    print(f"written to {args.out}")
    return 0


def measure(args: argparse.Namespace, runs: list[Run]) -> dict[str, Any]:
    rule = ReuseRule(threshold=args.threshold)
    off, on = (TorchEvaluator(args.checkpoint, reuse=r) for r in (0.0, args.threshold))
    vision = open_folder(args.checkpoint).config.vision
    pairs: dict[str, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    shares: dict[str, list[float]] = defaultdict(list)
    clips = heldout_clips(args.seed, 1 << 30, per_clip=args.per_clip)
    for number, clip in enumerate(itertools.islice(clips, args.clips), start=1):
        c = share(clip, vision, rule)
        group = next(name for name, low, high in GROUPS if low <= c < high)
        shares[group].append(c)
        for (run, plain), (_, reused) in zip(
            off.answers(clip, runs), on.answers(clip, runs), strict=True
        ):
            right = [
                [
                    judge(question, text).right
                    for question, text in zip(clip.questions, texts, strict=True)
                ]
                for texts in (plain.texts, reused.texts)
            ]
            pairs[group][run.name].append(np.array(right, np.float64))
        if number % 10 == 0:
            progress(f"{number} of {args.clips} clips")
    names = [name for name, _, _ in GROUPS if name in shares]
    return {
        name: {
            "clips": len(shares[name]),
            "c": round(float(np.mean(shares[name])), 4),
            "runs": {run: figures(found) for run, found in pairs[name].items()},
        }
        for name in names
    }


def figures(clips: list[np.ndarray]) -> dict[str, float]:
    """Right answers in percent, and the difference on minus off with its interval; questions of a
    clip hang together, so whole clips are drawn anew."""
    rng = np.random.default_rng(0)
    sums = np.array([[len(each[0]), *each.sum(1)] for each in clips])
    total = sums.sum(0)
    drawn = sums[rng.integers(0, len(sums), (2000, len(sums)))].sum(1)
    spread = 100 * (drawn[:, 2] - drawn[:, 1]) / drawn[:, 0]
    low, high = np.percentile(spread, [2.5, 97.5])
    off, on = 100 * total[1] / total[0], 100 * total[2] / total[0]
    return {
        "questions": int(total[0]),
        "off": round(off, 3),
        "on": round(on, 3),
        "difference": round(on - off, 3),
        "low": round(float(low), 3),
        "high": round(float(high), 3),
    }


if __name__ == "__main__":
    raise SystemExit(main())
