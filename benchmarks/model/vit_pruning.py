"""How much of the possible time pruning really saves in the vision side, at full size.

    python -m benchmarks.model.vit_pruning                  # every device there is
    python -m benchmarks.model.vit_pruning --device cuda --frames 64
    python -m benchmarks.model.vit_pruning --tiny --out tiny.json

Random weights of Molmo2-4B's vision transformer, scorer and connector; noise as frames. Unpruned
(no scorer, dense attention) and several keep ratios are timed in turn in one run, from patches to
features, selection included. The bound of a speed-up is the ratio of matrix-product operations
(`edge_vlm.flops`) for exactly the cells that were kept. Also stated: the bound of the published
code, which packs survivors into rows of one whole frame.

Goal: 92 % of the bound at keep 0.7, 0.5 and 0.3.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import (
    RESULTS,
    in_turn,
    progress,
    result_head,
    script_parser,
    speed_up,
    summary,
    write_result,
)
from edge_vlm.config import ModelConfig, Rescale
from edge_vlm.flops import block_flops, connector_flops, vision_flops
from edge_vlm.model.clips import EncodedClips, encode_clips
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import molmo2_4b, tiny
from edge_vlm.pruning.clip_budget import pack_rows

UNPRUNED = "unpruned"
FRAMES = {"cpu": 8, "cuda": 64}
ROUNDS = {"cpu": (3, 1), "cuda": (20, 10)}
"""Rounds and warm-ups."""
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}


def vision_only(cfg: ModelConfig) -> ModelConfig:
    """With frame-wise rescaling, and the smallest language model that takes the features."""
    assert cfg.scorer is not None
    return dataclasses.replace(
        cfg,
        scorer=dataclasses.replace(cfg.scorer, rescale=Rescale.FRAME),
        language=dataclasses.replace(
            cfg.language,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            mlp_width=8,
            base_vocab=8,
            extra_vocab=0,
        ),
    )


def encode_unpruned(model: VideoLM, pixels_FNP: Tensor) -> Tensor:
    """Every block dense on whole frames, as without a scorer."""
    layers = model.cfg.vision.feature_layers
    x, taps = model.vit.embed(pixels_FNP), {}
    for i, block in enumerate(model.vit.blocks):
        x = block(x)
        if i in layers:
            taps[i] = x
    joined = torch.cat([taps[i] for i in layers], -1)
    out: Tensor = model.connector(model.vit.cells(joined).flatten(0, 1))
    return out


def encode_pruned(model: VideoLM, pixels_FNP: Tensor, keep_ratio: float) -> EncodedClips:
    """One clip: its first frame whole, what is left of the budget to the best cells."""
    return encode_clips(model, pixels_FNP, [len(pixels_FNP)], keep_ratio=keep_ratio, min_cells=0)


def published_flops(cfg: ModelConfig, kept: list[int]) -> tuple[int, int]:
    """Operations of the published packing for the same cells, and its number of rows."""
    assert cfg.scorer is not None
    cells, later = cfg.vision.num_cells, cfg.vision.num_layers - cfg.scorer.prune_at - 2
    rows = len(pack_rows(kept, cells))
    before = vision_flops(cfg, [0] * len(kept))
    everywhere = len(kept) * cells * connector_flops(cfg)
    return before + rows * later * block_flops(cfg, cfg.vision.num_patches) + everywhere, rows


def measure(
    cfg: ModelConfig,
    device: torch.device,
    *,
    dtype: torch.dtype,
    frames: int,
    keep_ratios: list[float],
    rounds: int,
    warmups: int,
    clock: str,
) -> dict[str, Any]:
    torch.manual_seed(0)
    with device:
        model = VideoLM(cfg).init_weights().to(dtype).eval()
        shape = (frames, cfg.vision.num_patches, cfg.vision.patch_dim)
        pixels = torch.randn(shape).to(dtype)
    kept: dict[float, Tensor] = {}

    def pruned(ratio: float) -> None:
        kept[ratio] = encode_pruned(model, pixels, ratio).kept_FC

    cases: dict[str, Callable[[], object]] = {
        f"keep {ratio:g}": partial(pruned, ratio) for ratio in keep_ratios
    }
    cases = {UNPRUNED: partial(encode_unpruned, model, pixels), **cases}
    with torch.inference_mode():
        seconds = in_turn(
            cases,
            rounds=rounds,
            warmups=warmups,
            device=device,
            say=progress,
            clock=CLOCKS[clock],
        )
    whole = vision_flops(dataclasses.replace(cfg, scorer=None), [cfg.vision.num_cells] * frames)
    results: dict[str, Any] = {UNPRUNED: summary(seconds[UNPRUNED]) | {"tflop": whole / 1e12}}
    for ratio in keep_ratios:
        cells = kept[ratio].sum(1).tolist()
        ours, (theirs, rows) = vision_flops(cfg, cells), published_flops(cfg, cells)
        faster = speed_up(seconds[UNPRUNED], seconds[f"keep {ratio:g}"])
        results[f"keep {ratio:g}"] = summary(seconds[f"keep {ratio:g}"]) | {
            "cells_per_frame": cells,
            "tflop": ours / 1e12,
            "speed_up": round(faster, 3),
            "bound": round(whole / ours, 3),
            "share_of_bound": round(faster * ours / whole, 3),
            "published_packing": {"rows": rows, "bound": round(whole / theirs, 3)},
        }
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "frames": frames,
        "rounds": rounds,
        "clock": clock,
        "cases": results,
    }


def table(result: dict[str, Any]) -> str:
    head = (
        f"{'':10} {'median s':>9} {'speed-up':>9} {'bound':>7} {'share':>7} {'published bound':>16}"
    )
    lines = [f"{result['device']}, {result['dtype']}, {result['frames']} frames", head]
    for name, case in result["cases"].items():
        line = f"{name:10} {case['median_s']:9.4f}"
        if name != UNPRUNED:
            line += f" {case['speed_up']:9.2f} {case['bound']:7.2f} {case['share_of_bound']:7.1%}"
            line += f" {case['published_packing']['bound']:16.2f}"
        lines.append(line)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: every one there is")
    parser.add_argument("--frames", type=int, help="default: 8 on a CPU, 64 on a GPU")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.7, 0.5, 0.3, 0.2])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--warmups", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="processor: seconds of computing, for a CPU that others use as well",
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: does the script work?")
    args = parser.parse_args(argv)
    if args.clock == "processor" and args.device != "cpu":
        parser.error("--clock processor is for --device cpu")
    devices = [args.device] if args.device else ["cpu"] + ["cuda"] * torch.cuda.is_available()
    if args.out and len(devices) > 1:
        parser.error("--out takes one result: name the --device")
    for kind in devices:
        rounds, warmups = ROUNDS[kind]
        result = measure(
            vision_only(tiny() if args.tiny else molmo2_4b()),
            torch.device(kind),
            dtype=getattr(torch, args.dtype or DTYPE[kind]),
            frames=args.frames or FRAMES[kind],
            keep_ratios=args.keep,
            rounds=rounds if args.rounds is None else args.rounds,
            warmups=warmups if args.warmups is None else args.warmups,
            clock=args.clock,
        )
        size = "tiny" if args.tiny else "molmo2_4b"
        result = {**result_head(__file__, argv, torch.device(kind)), "config": size, **result}
        print(table(result))
        path = args.out or RESULTS / f"vit_pruning_{kind}.json"
        if args.out or not args.tiny:
            write_result(path, result)
            print(f"written to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
