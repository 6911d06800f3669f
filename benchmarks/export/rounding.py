"""Ways of rounding language weights to int4, judged by clips that none of them has seen.

    edge-vlm world -o seen --benchmark --per-kind 6 --seed 5
    edge-vlm world -o unseen --benchmark --per-kind 6 --seed 6
    python -m benchmarks.export.rounding --seen seen --unseen unseen

The demo model, and a language block of Molmo2-4B's width with made-up weights, as it is and with
loud channels (`benchmarks.export.precision_plan`): what a product computes wrongly, in percent, by
the energy of its output and by its variance. Blocks are rounded as the exporter does; AWQ
(arXiv 2306.00978) is the best of ten scales, not folded into anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.export.precision_plan import full_width
from benchmarks.harness import (
    CHECKPOINT,
    RESULTS,
    progress,
    result_head,
    script_parser,
    write_result,
)
from edge_vlm.formats.precision import block_size
from edge_vlm.model.evaluator import TorchModel
from edge_vlm.model.layers import additive_bias
from edge_vlm.model.llm import rope_tables
from edge_vlm.model.published.folder import open_folder
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm_calibration.precision.gptq import (
    inverse_factor,
    restored,
    round_nearest,
    round_weight,
)
from edge_vlm_calibration.precision.language import GROUPS
from edge_vlm_calibration.precision.states import lost_share
from edge_vlm_calibration.precision.watching import QUESTIONS, pieces_of, read, run_of
from edge_vlm_export.quantize.rounding import quantize_blocks

AWQ_SCALES = 10
JUDGED = 1024
"""States of each product."""


@torch.inference_mode()
def states_of(model: VideoLM, words: Path, clips: Sequence[Path], frames: int) -> dict[str, Tensor]:
    """What goes into the first product of each group, [S, K]."""
    opened = TorchModel(model, PromptFormat(Tokenizer.from_file(words)))
    found: dict[str, list[Tensor]] = {}
    run = run_of(model.cfg, 0.5)
    readings = [
        read(opened, piece, run)
        for clip in clips
        for piece in pieces_of(clip, 2.0, frames, QUESTIONS)
    ]
    handles = [
        block.get_submodule(group[0]).register_forward_hook(
            lambda _, inputs, __, name=f"{number}.{group[0]}": found.setdefault(name, []).append(
                inputs[0][0].clone()
            )
        )
        for number, block in enumerate(model.llm.blocks)
        for group in GROUPS
    ]
    for reading in readings:
        tables = rope_tables(model.cfg.language, reading.positions_S[None])
        model.llm(reading.embeds_SE[None], *tables, additive_bias(reading.visible_SS)[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


def exporter(weight_KN: Tensor, block: int) -> Tensor:
    """An export without a plan."""
    numbers, scale = quantize_blocks(weight_KN.numpy(), 4, block)
    return restored(torch.from_numpy(numbers), torch.from_numpy(scale))


def awq(weight_KN: Tensor, states_SK: Tensor, block: int) -> Tensor:
    size = states_SK.abs().mean(0).clamp(min=1e-8)
    sample = states_SK[:: max(1, len(states_SK) // JUDGED)]
    exact = sample @ weight_KN
    tried: list[tuple[float, Tensor]] = []
    for i in range(AWQ_SCALES):
        scale = size ** (i / AWQ_SCALES)
        scale = scale / (scale.amax() * scale.amin()).sqrt()
        rounded = exporter((weight_KN * scale[:, None]).contiguous(), block) / scale[:, None]
        tried.append((float((sample @ rounded - exact).square().sum()), rounded))
    return min(tried, key=lambda pair: pair[0])[1]


@torch.inference_mode()
def compared(
    model: VideoLM, words: Path, seen: Sequence[Path], unseen: Sequence[Path], frames: int
) -> dict[str, Any]:
    chosen_by = states_of(model, words, seen, frames)
    judged_by = states_of(model, words, unseen, frames)
    lost: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for number, block in enumerate(model.llm.blocks):
        for group in GROUPS:
            states, judges = (rows[f"{number}.{group[0]}"] for rows in (chosen_by, judged_by))
            judges = judges[:: max(1, len(judges) // JUDGED)]
            factor = inverse_factor(states.T @ states)
            for leaf in group:
                linear = block.get_submodule(leaf)
                assert isinstance(linear, nn.Linear)
                weight = linear.weight.detach().T.contiguous()
                size = block_size(len(weight))
                assert size is not None
                ways: dict[str, Callable[[], Tensor]] = {
                    "nearest": lambda w=weight, b=size: restored(*round_nearest(w, b)),  # type: ignore[misc]
                    "least error in weights": lambda w=weight, b=size: exporter(w, b),  # type: ignore[misc]
                    "awq": lambda w=weight, s=states, b=size: awq(w, s, b),  # type: ignore[misc]
                    "gptq": lambda w=weight, f=factor, b=size: restored(*round_weight(w, f, b)),  # type: ignore[misc]
                }
                kind = lost.setdefault(leaf.rpartition(".")[2], {})
                for way, rounded in ways.items():
                    got, exact = judges @ rounded(), judges @ weight
                    energy = float((got - exact).square().sum() / exact.square().sum())
                    kind.setdefault(way, []).append((energy, lost_share(got, exact)))
    tokens = {
        name: len(next(iter(s.values())))
        for name, s in (("seen", chosen_by), ("unseen", judged_by))
    }
    return {
        "tokens": tokens,
        "percent_of_energy": _means(lost, 0),
        "percent_of_variance": _means(lost, 1),
    }


def _means(lost: dict[str, dict[str, list[tuple[float, float]]]], which: int) -> dict[str, Any]:
    return {
        leaf: {
            way: float(f"{100 * mean(pair[which] for pair in pairs):.3g}")
            for way, pairs in ways.items()
        }
        for leaf, ways in lost.items()
    }


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "rounding.json")
    parser.add_argument("--seen", type=Path, nargs="+", required=True)
    parser.add_argument("--unseen", type=Path, nargs="+", required=True)
    parser.add_argument("--frames", type=int, default=64, help="of each clip, demo model")
    parser.add_argument("--wide-frames", type=int, default=24, help="of each, at full width")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    demo = open_folder(CHECKPOINT)
    words = demo.require_tokenizer()
    result = result_head(__file__, argv, torch.device("cpu"))
    cases: dict[str, tuple[Callable[[], VideoLM], int]] = {
        "demo": (demo.load, args.frames),
        "full width": (lambda: full_width(words, outliers=False), args.wide_frames),
        "full width with outliers": (lambda: full_width(words, outliers=True), args.wide_frames),
    }
    for name, (make, frames) in cases.items():
        result[name] = compared(make(), words, args.seen, args.unseen, frames)
        progress(f"{name}: {result[name]}")
        write_result(args.out, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
