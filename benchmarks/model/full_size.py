"""Molmo2-4B at full size with random weights: what pruning saves from frames to answer.

    python -m benchmarks.model.full_size                    # needs a GPU; 40 GB by estimate
    python -m benchmarks.model.full_size --clips 1x64 2x64 --removed 0 0.5
    python -m benchmarks.model.full_size --tiny --out tiny.json

For every workload (clips x frames) the unpruned model (no scorer) and each share of removed cells
run in turn in one run: vision, then the prompt's prefill up to the first logits, then a greedy
answer of fixed length. The language model attends with a dense mask: vision tokens see each other
both ways, as published. Such a mask excludes flash kernels, pruned or not; with a causal one the
unpruned model would gain more. Published to beat (STTS, arXiv 2603.18004, 50 % removed): 1.62x at
2x64 frames, 2.22x at 1x256, training and inference alike.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
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
from edge_vlm.config import ModelConfig, Rescale, VisionAttention
from edge_vlm.flops import language_flops, vision_flops
from edge_vlm.model.clips import encode_clips
from edge_vlm.model.llm import rope_tables
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import molmo2_4b, tiny
from edge_vlm.text.masks import CAUSAL, MASKED

STAMP_TOKENS = 5
"""Text before a frame: its time stamp."""
QUESTION_TOKENS = 24
ROW_ALIGNMENT = 16


@dataclasses.dataclass(frozen=True)
class Run:
    """One pass over a workload; seconds since its start."""

    vision_s: float
    first_logits_s: float
    answered_s: float
    cells_per_frame: list[int]
    prompt_tokens: int


class Bench:
    """The model with and without its scorer, sharing weights, and the clock."""

    def __init__(
        self, cfg: ModelConfig, device: torch.device, dtype: torch.dtype, answer: int
    ) -> None:
        assert cfg.scorer is not None
        scorer = dataclasses.replace(cfg.scorer, rescale=Rescale.FRAME)
        self.cfg = dataclasses.replace(cfg, scorer=scorer)
        self.device, self.dtype, self.answer_tokens = device, dtype, answer
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                self.pruned = VideoLM(self.cfg).init_weights().eval()
        finally:
            torch.set_default_dtype(before)
        with torch.device("meta"):
            self.plain = VideoLM(dataclasses.replace(self.cfg, scorer=None)).eval()
        self.plain.vit, self.plain.connector = self.pruned.vit, self.pruned.connector
        self.plain.llm = self.pruned.llm

    def run(self, clips: int, frames: int, removed: float) -> Run:
        """Frames to answer. Without removal: the model without a scorer."""
        vision, llm = self.cfg.vision, self.pruned.llm
        model = self.pruned if removed else self.plain
        shape = (clips * frames, vision.num_patches, vision.patch_dim)
        pixels = torch.randn(shape, device=self.device, dtype=self.dtype)
        begin = self._now()
        seen = encode_clips(model, pixels, [frames] * clips, keep_ratio=1 - removed, min_cells=0)
        vision_s = self._now() - begin

        counts = seen.kept_FC.view(clips, frames, -1).sum(-1).tolist()
        blocks = torch.tensor([prompt_blocks(row, self.cfg.attention) for row in counts])
        is_patch = torch.tensor([prompt_patches(row) for row in counts])
        ids = torch.randint(self.cfg.language.base_vocab, blocks.shape, device=self.device)
        embeds = llm.embed(ids).flatten(0, 1)
        places = is_patch.flatten().nonzero().squeeze(1).to(self.device)
        embeds = embeds.index_add(0, places, seen.features_GE).view(*ids.shape, -1)
        length = ids.shape[1]
        bias = attention_bias(blocks.to(self.device), self.dtype)
        tables = rope_tables(llm.cfg, torch.arange(length, device=self.device)[None])
        hidden, past = llm(embeds, *tables, bias)
        token = llm.head(hidden[:, -1]).argmax(-1)
        first_logits_s = self._now() - begin

        for position in range(length, length + self.answer_tokens - 1):
            tables = rope_tables(llm.cfg, torch.tensor([[position]], device=self.device))
            everything = torch.zeros(clips, 1, position + 1, device=self.device, dtype=self.dtype)
            hidden, new = llm(llm.embed(token)[:, None], *tables, everything, past)
            past = [
                (torch.cat([k, new_k], 1), torch.cat([v, new_v], 1))
                for (k, v), (new_k, new_v) in zip(past, new, strict=True)
            ]
            token = llm.head(hidden[:, -1]).argmax(-1)
        answered_s = self._now() - begin
        cells = [count for row in counts for count in row]
        return Run(vision_s, first_logits_s, answered_s, cells, length)

    def flops(self, run: Run, clips: int, removed: float) -> int:
        """Of frames to first logits; the head aside."""
        cfg = self.pruned.cfg if removed else self.plain.cfg
        language = clips * language_flops(cfg.language, run.prompt_tokens)
        return vision_flops(cfg, run.cells_per_frame) + language

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def prompt_blocks(cells_per_frame: list[int], attention: VisionAttention) -> list[int]:
    """Block of each token: begin, stamped frames between markers, question."""
    blocks = [CAUSAL]
    for frame, cells in enumerate(cells_per_frame):
        block = 0 if attention is VisionAttention.ALL else frame
        blocks += [CAUSAL] * STAMP_TOKENS + [block] * (cells + 2)
    return blocks + [CAUSAL] * QUESTION_TOKENS


def prompt_patches(cells_per_frame: list[int]) -> list[bool]:
    """Which of those tokens are patch tokens."""
    patches = [False]
    for cells in cells_per_frame:
        patches += [False] * (STAMP_TOKENS + 1) + [True] * cells + [False]
    return patches + [False] * QUESTION_TOKENS


def attention_bias(blocks_Bs: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, s, s]: everything before, and two-way inside a block.

    Its rows are aligned in memory, or the GPU's kernel would copy it in every layer.
    """
    batch, length = blocks_Bs.shape
    visible = torch.ones(length, length, dtype=torch.bool, device=blocks_Bs.device).tril()
    together = (blocks_Bs[:, :, None] == blocks_Bs[:, None, :]) & (blocks_Bs >= 0)[:, :, None]
    aligned = math.ceil(length / ROW_ALIGNMENT) * ROW_ALIGNMENT
    bias = torch.zeros(batch, length, aligned, dtype=dtype, device=blocks_Bs.device)
    bias = bias[:, :, :length]
    return bias.masked_fill_(~(visible | together), MASKED)


def measure(
    bench: Bench, clips: int, frames: int, shares: list[float], rounds: int, warmups: int
) -> dict[str, Any]:
    """One workload; the first share is the baseline."""
    runs: dict[str, list[Run]] = {f"removed {share:g}": [] for share in shares}
    cases = {
        name: lambda name=name, share=share: runs[name].append(bench.run(clips, frames, share))
        for name, share in zip(runs, shares, strict=True)
    }
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(bench.device)
    with torch.inference_mode():
        in_turn(cases, rounds=rounds, warmups=warmups, device=bench.device, say=progress)
    kept = {name: found[warmups:] for name, found in runs.items()}
    baseline = kept[f"removed {shares[0]:g}"]
    most = bench.flops(baseline[0], clips, shares[0])
    results: dict[str, Any] = {}
    for name, share in zip(kept, shares, strict=True):
        mine = kept[name]
        flops = bench.flops(mine[0], clips, share)
        results[name] = {
            "cells_kept": sum(mine[0].cells_per_frame),
            "prompt_tokens": mine[0].prompt_tokens,
            "tflop_to_first_logits": round(flops / 1e12, 4),
            "bound": round(most / flops, 3),
        }
        for field in ("vision_s", "first_logits_s", "answered_s"):
            times = [getattr(run, field) for run in mine]
            reference = [getattr(run, field) for run in baseline]
            faster = round(speed_up(reference, times), 3)
            results[name][field] = summary(times) | {"speed_up": faster}
        language = statistics.median(run.first_logits_s - run.vision_s for run in mine)
        results[name]["language_prefill_s"] = round(language, 5)
    workload: dict[str, Any] = {"clips": clips, "frames": frames, "cases": results}
    if bench.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(bench.device)
        workload["peak_memory_gib"] = round(peak / 2**30, 1)
    return workload


def table(workload: dict[str, Any]) -> str:
    columns = ("tokens", "vision", "to first logits", "bound", "answered")
    widths = (7, 9, 16, 8, 16)
    lines = [
        f"{workload['clips']} x {workload['frames']} frames",
        f"{'':12}" + "".join(f" {c:>{w}}" for c, w in zip(columns, widths, strict=True)),
    ]
    for name, case in workload["cases"].items():
        first, answered = case["first_logits_s"], case["answered_s"]
        lines.append(
            f"{name:12} {case['prompt_tokens']:7} {case['vision_s']['median_s']:8.4f}s"
            f" {first['median_s']:8.4f}s {first['speed_up']:5.2f}x {case['bound']:7.2f}x"
            f" {answered['median_s']:8.4f}s {answered['speed_up']:5.2f}x"
        )
    return "\n".join(lines)


def parse_clips(text: str) -> tuple[int, int]:
    clips, _, frames = text.partition("x")
    return int(clips), int(frames)


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "full_size_cuda.json")
    parser.add_argument(
        "--clips",
        type=parse_clips,
        nargs="+",
        default=[(1, 64), (2, 64), (1, 128), (1, 256)],
        metavar="CLIPSxFRAMES",
    )
    parser.add_argument(
        "--removed", type=float, nargs="+", default=[0.0, 0.5, 0.7], help="the first is compared to"
    )
    parser.add_argument("--answer", type=int, default=32, help="tokens of the answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument("--attention", choices=[a.value for a in VisionAttention], default="all")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU")
    args = parser.parse_args(argv)
    if not args.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use; --tiny tries the script on a CPU")
    device = torch.device("cpu" if args.tiny else "cuda")
    dtype = torch.float32 if args.tiny else torch.bfloat16
    cfg = tiny() if args.tiny else molmo2_4b()
    cfg = dataclasses.replace(cfg, attention=VisionAttention(args.attention))
    bench = Bench(cfg, device, dtype, args.answer)
    workloads = []
    for clips, frames in args.clips:
        workloads.append(measure(bench, clips, frames, args.removed, args.rounds, args.warmups))
        print(table(workloads[-1]))
    result = {
        **result_head(__file__, argv, device),
        "config": "tiny" if args.tiny else "molmo2_4b",
        "dtype": str(dtype).removeprefix("torch."),
        "attention": args.attention,
        "language_kernel": "scaled_dot_product_attention with a dense additive mask",
        "answer_tokens": args.answer,
        "published_to_beat": {"2x64": 1.62, "1x256": 2.22},
        "workloads": workloads,
    }
    write_result(args.out, result)
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
