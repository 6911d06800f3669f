"""What computing changed cells only saves in a live stream, through the exported graphs.

    python -m benchmarks.export.reuse_graphs --tokenizer FILE --clip still=FILE --clip busy=FILE

The vision side of Molmo2-4B is exported with random weights at full size (2 GB; the language model
has no part in this and is small) and run by ONNX Runtime as sessions run it, one picture at a time,
with everything computed and kept, and for each share k of cells kept with reuse, in turn over the
same pictures. Resizing, the rule about pixels and what a stream keeps are in all that is timed.
With c, the share of cells that the rule has computed, 1 / (0.2 c + 0.8 k) is the most to be had.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from benchmarks.harness import (
    CLOCKS_NS,
    RESULTS,
    in_turn,
    progress,
    result_head,
    script_parser,
    speed_up,
    summary,
    write_result,
)
from edge_vlm.config import ModelConfig
from edge_vlm.pixels.frames import Frame, Rgb
from edge_vlm.presets import molmo2_4b, tiny
from edge_vlm.pruning.policies import Cells, KeepAll, KeepPolicy, Scores, top_cells
from edge_vlm.pruning.reuse import ReuseRule
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm_export.graphs.graphs import GraphLimits
from edge_vlm_export.graphs.weights import made_up_weights
from edge_vlm_export.to_onnx import ExportOptions, export_source
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.inference.vision import VisionState


@dataclasses.dataclass
class Best(KeepPolicy):
    """So many cells of every frame."""

    count: int

    def reset(self) -> None:
        """Nothing to forget."""

    def select(self, scores: Scores, frame_rgb: Rgb | None, is_first: bool) -> Cells:
        return top_cells(scores, self.count)


def pictures(text: str, count: int, fps: float) -> tuple[str, list[Frame]]:
    """NAME=FILE or NAME=FILE@SECONDS: so many pictures."""
    name, _, place = text.partition("=")
    path, _, start = place.partition("@")
    found: list[Frame] = []
    due_s = float(start or 0)
    with av.open(path) as container:
        for frame in container.decode(video=0):
            if (frame.time or 0.0) < due_s - 1e-3:
                continue
            rgb = frame.to_ndarray(format="rgb24")
            found.append(Frame(rgb=rgb, pts_ns=int(due_s * 1e9), seq=len(found)))
            due_s += 1 / fps
            if len(found) == count:
                break
    return name, found


class Stream:
    """A stream whose first picture was seen before the clock."""

    def __init__(self, engines: LoadedBundle, frames: list[Frame], rule: ReuseRule | None) -> None:
        self._vision, self._frames, self._rule = engines.vision, frames, rule
        self.shares: list[float] = []
        self._state = self._begin()

    def _begin(self) -> VisionState:
        state = self._vision.new_state()
        self._vision.set_reuse(state, self._rule)
        self._vision.encode(self._frames[0], state, KeepAll())
        return state

    def run(self, policy: KeepPolicy) -> None:
        self.shares = [
            self._vision.encode(frame, self._state, policy).share_computed
            for frame in self._frames[1:]
        ]

    def again(self) -> None:
        """From the first picture on."""
        self._state = self._begin()


def measure(
    engines: LoadedBundle,
    clip: tuple[str, list[Frame]],
    shares: list[float],
    rule: ReuseRule,
    rounds: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    name, frames = clip
    cfg = engines.bundle.config
    num_cells, stem = cfg.vision.num_cells, cfg.whole_blocks / cfg.vision.num_layers
    streams = {"whole": Stream(engines, frames, None)}
    policies: dict[str, KeepPolicy] = {"whole": KeepAll()}
    counts = {f"reused {share:g}": round(share * num_cells) for share in shares}
    for case, count in counts.items():
        streams[case], policies[case] = Stream(engines, frames, rule), Best(count)
    seconds: dict[str, list[float]] = {case: [] for case in streams}
    for turn in range(rounds):
        if turn:
            for stream in streams.values():
                stream.again()
        cases = {case: partial(streams[case].run, policies[case]) for case in streams}
        found = in_turn(
            cases, rounds=1, warmups=0, device=torch.device("cpu"), say=progress, clock=clock
        )
        for case, times in found.items():
            seconds[case] += times
    result: dict[str, Any] = {
        "clip": name,
        "frames": len(frames) - 1,
        "c": round(float(np.mean(streams[next(iter(counts))].shares)), 4),
        "whole_s": summary(seconds["whole"]),
        "cases": [],
    }
    for case, count in counts.items():
        faster, k = speed_up(seconds["whole"], seconds[case]), count / num_cells
        bound = 1 / (stem * result["c"] + (1 - stem) * k)
        result["cases"].append(
            {
                "k": round(k, 4),
                "s": summary(seconds[case]),
                "speed_up": round(faster, 3),
                "bound": round(bound, 3),
                "of_bound": round(faster / bound, 3),
            }
        )
    return result


def with_small_language(cfg: ModelConfig, words: PromptFormat) -> ModelConfig:
    base = max(words.bos_id, *words.eos_ids, words.patch_id) + 1
    small = tiny().language
    language = dataclasses.replace(small, base_vocab=base, extra_vocab=0)
    return dataclasses.replace(cfg, language=language, attention=tiny().attention)


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "reuse_graphs.json")
    parser.add_argument("--clip", action="append", required=True, metavar="NAME=FILE[@SECONDS]")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FILE")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.5, 0.2, 0.1])
    parser.add_argument("--threshold", type=float, default=8.0, help="grey levels (8)")
    parser.add_argument("--frames", type=int, default=4, help="after the first (4)")
    parser.add_argument("--fps", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS_NS, default="wall")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    args = parser.parse_args(argv)
    words = PromptFormat(Tokenizer.from_file(args.tokenizer))
    cfg = with_small_language(tiny() if args.tiny else molmo2_4b(), words)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    results = []
    with tempfile.TemporaryDirectory() as folder:
        source = made_up_weights(cfg, 0, args.tokenizer, "the vision side of molmo2_4b")
        limits = GraphLimits(max_frames=1, max_tokens=64, max_past=256)
        options = ExportOptions(limits=limits, reuse=True, thorough=False)
        bundle = export_source(source, Path(folder) / "bundle", options)
        with LoadedBundle.open(bundle.path, threads=args.threads) as engines:
            for text in args.clip:
                clip = pictures(text, args.frames + 1, args.fps)
                rule = ReuseRule(threshold=args.threshold)
                results.append(measure(engines, clip, args.kept, rule, args.rounds, clock))
                print(f"{results[-1]['clip']}: c = {results[-1]['c']:.3f}", flush=True)
                for case in results[-1]["cases"]:
                    print(
                        f"  k = {case['k']:.3f}: {case['speed_up']:.2f}x of at most "
                        f"{case['bound']:.2f}x ({case['of_bound']:.0%})",
                        flush=True,
                    )
    head = result_head(__file__, argv, torch.device("cpu"))
    shape = "tiny" if args.tiny else "molmo2_4b"
    result = {**head, "config": shape, "dtype": "float32", "clock": args.clock}
    write_result(args.out, {**result, "threshold": args.threshold, "clips": results})
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
