"""The vision transformer at full size with random weights: what computing changed cells only saves.

    python -m benchmarks.model.stem_reuse --clip still=FILE --clip busy=FILE@SECONDS
    python -m benchmarks.model.stem_reuse --tiny --clip moving=FILE --out tiny.json

Real clips decide which cells change (`edge_vlm.pruning.reuse`), the weights are made up. For every
clip and each share k of cells kept, the whole transformer without a scorer, pruning alone and
pruning with reuse run in turn in one run, over the same consecutive pictures; resizing and the
scorer's own choice of cells are in none of them, the rule about pixels is in reuse. With c, the
share of cells that the rule has computed, blocks 0 to 4 of 25 cost c and the others k of their full
price at least, so no more than 1 / (0.2 c + 0.8 k) is to be had.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

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
from edge_vlm.config import ModelConfig, Rescale
from edge_vlm.model.reuse import StemState, reuse_clips, reuse_step
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.pixels.patches import to_pixel_values
from edge_vlm.presets import molmo2_4b, tiny
from edge_vlm.pruning.reuse import CellsComputed, ReuseRule

SIZE = (1, 1)
"""All pictures of a clip have one size."""


@dataclasses.dataclass(frozen=True)
class Film:
    """Consecutive pictures and which cells of each are computed; the first is before the clock."""

    name: str
    pixels_FNP: Tensor
    cells: list[Tensor]

    @property
    def share(self) -> float:
        """c: of the pictures after the first."""
        num_cells = len(self.cells[0])
        return sum(map(len, self.cells[1:])) / num_cells / (len(self.cells) - 1)


def open_film(text: str, cfg: ModelConfig, frames: int, fps: float, rule: ReuseRule) -> Film:
    """NAME=FILE or NAME=FILE@SECONDS."""
    name, _, place = text.partition("=")
    path, _, start = place.partition("@")
    pixels: list[np.ndarray] = []
    due_s = float(start or 0)
    with av.open(path) as container:
        for frame in container.decode(video=0):
            if (frame.time or 0.0) < due_s - 1e-3:
                continue
            pixels.append(to_pixel_values(frame.to_ndarray(format="rgb24"), cfg.vision))
            due_s += 1 / fps
            if len(pixels) > frames:
                break
    if len(pixels) < 2:
        raise SystemExit(f"{path}: fewer than two pictures from {start or 0} s on")
    stream, cells = CellsComputed(cfg.vision.num_cells, rule), []
    for picture in pixels:
        cells.append(stream.next(picture, SIZE))
        stream.computed(picture, SIZE, cells[-1])
    return Film(
        name,
        torch.from_numpy(np.stack(pixels)),
        [torch.from_numpy(each.astype(np.int64)) for each in cells],
    )


class Bench:
    """One set of weights in three programs; each looks at a film's pictures but the first."""

    def __init__(self, cfg: ModelConfig) -> None:
        assert cfg.scorer is not None
        scorer = dataclasses.replace(cfg.scorer, rescale=Rescale.FRAME)
        # The language model has no part in this: a small one stands in its place.
        language = dataclasses.replace(tiny().language, width=cfg.language.width)
        self.cfg = dataclasses.replace(cfg, scorer=scorer, language=language)
        torch.manual_seed(0)
        self.model = VideoLM(self.cfg).init_weights().eval()
        with torch.device("meta"):
            self.plain = VideoLM(dataclasses.replace(self.cfg, scorer=None)).eval()
        self.plain.vit, self.plain.connector = self.model.vit, self.model.connector

    def whole(self, film: Film, size: int) -> None:
        """`size` pictures at a time, as in all of these."""
        for pixels in film.pixels_FNP[1:].split(size):
            everything = torch.ones(len(pixels), self.cfg.vision.num_cells, dtype=torch.bool)
            self._trunk(self.plain, self.plain.embed_frames(pixels), everything)

    def pruned(self, film: Film, kept: int, size: int) -> None:
        vision = self.cfg.vision
        cells = torch.zeros(1, vision.num_cells, vision.width)
        for pixels in film.pixels_FNP[1:].split(size):
            later = torch.zeros(len(pixels), dtype=torch.bool)
            hidden, cells, scores = self.model.vit_stem(pixels, cells[-1:], later)
            self._trunk(self.model, hidden, best(scores, kept))

    def begin(self, film: Film) -> StemState:
        """What is kept of the first picture."""
        everything = torch.ones(1, self.cfg.vision.num_cells, dtype=torch.bool)
        first = torch.ones(1, dtype=torch.bool)
        return reuse_clips(self.model, film.pixels_FNP[:1], everything, first).state

    def reused(self, film: Film, kept: int, size: int, state: StemState, rule: ReuseRule) -> None:
        stream = CellsComputed(self.cfg.vision.num_cells, rule)
        stream.next(film.pixels_FNP[0].numpy(), SIZE)
        stream.computed(film.pixels_FNP[0].numpy(), SIZE, film.cells[0].numpy().astype(np.int32))
        for pixels in film.pixels_FNP[1:].split(size):
            computed = torch.zeros(len(pixels), self.cfg.vision.num_cells, dtype=torch.bool)
            for row, picture in zip(computed, pixels.numpy(), strict=True):
                cells = stream.next(picture, SIZE)
                stream.computed(picture, SIZE, cells)
                row[torch.from_numpy(cells.astype(np.int64))] = True
            later = torch.zeros(len(pixels), dtype=torch.bool)
            if size == 1:
                scores, state = self._step(pixels[0], computed[0], later, state)
                hidden = state.hidden_1ND
            else:
                seen = reuse_clips(self.model, pixels, computed, later, state)
                state, hidden = seen.state, seen.hidden_FND
                assert seen.scores_FC is not None
                scores = seen.scores_FC
            self._trunk(self.model, hidden, best(scores, kept))

    def _step(
        self, pixels_NP: Tensor, computed_C: Tensor, later: Tensor, state: StemState
    ) -> tuple[Tensor, StemState]:
        cells = computed_C.nonzero().squeeze(1)
        scores = state.resting_1C
        if len(cells):
            changed = pixels_NP[self.model.vit.cell_patches_C9[cells]]
            scores, state = reuse_step(self.model, changed, cells, later, state)
        assert scores is not None
        return scores, state

    def _trunk(self, model: VideoLM, hidden: Tensor, kept_FC: Tensor) -> None:
        cells = kept_FC.flatten().nonzero().squeeze(1)
        model.vit_trunk(hidden, cells, cells // kept_FC.shape[1])


def best(scores_FC: Tensor, count: int) -> Tensor:
    """Bool [F, C]: so many of each picture."""
    kept = torch.zeros_like(scores_FC, dtype=torch.bool)
    return kept.scatter(1, scores_FC.topk(count, 1).indices, True)


def measure(
    bench: Bench,
    film: Film,
    shares: list[float],
    rule: ReuseRule,
    size: int,
    rounds: int,
    warmups: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    num_cells, blocks = bench.cfg.vision.num_cells, bench.cfg.vision.num_layers
    stem = bench.cfg.whole_blocks / blocks
    counts = {share: round(share * num_cells) for share in shares}
    state = bench.begin(film)
    cases: dict[str, Callable[[], object]] = {"whole": lambda: bench.whole(film, size)}
    for share, kept in counts.items():
        cases[f"pruned {share:g}"] = partial(bench.pruned, film, kept, size)
        cases[f"reused {share:g}"] = partial(bench.reused, film, kept, size, state, rule)
    seconds = in_turn(
        cases,
        rounds=rounds,
        warmups=warmups,
        device=torch.device("cpu"),
        say=progress,
        clock=clock,
    )
    result: dict[str, Any] = {
        "clip": film.name,
        "frames": len(film.cells) - 1,
        "at_once": size,
        "c": round(film.share, 4),
        "whole_s": summary(seconds["whole"]),
        "cases": [],
    }
    for share, kept in counts.items():
        k = kept / num_cells
        case: dict[str, Any] = {"k": round(k, 4)}
        for name, c in (("pruned", 1.0), ("reused", film.share)):
            faster = speed_up(seconds["whole"], seconds[f"{name} {share:g}"])
            bound = 1 / (stem * c + (1 - stem) * k)
            case[name] = {
                "s": summary(seconds[f"{name} {share:g}"]),
                "speed_up": round(faster, 3),
                "bound": round(bound, 3),
                "of_bound": round(faster / bound, 3),
            }
        result["cases"].append(case)
    return result


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['clip']}: c = {result['c']:.3f} over {result['frames']} pictures, "
        f"{result['at_once']} at a time",
        f"{'k':>6} {'pruned':>8} {'bound':>7} {'share':>6} {'reused':>8} {'bound':>7} {'share':>6}",
    ]
    for case in result["cases"]:
        parts = [
            f"{case[name]['speed_up']:7.2f}x {case[name]['bound']:6.2f}x "
            f"{case[name]['of_bound']:6.0%}"
            for name in ("pruned", "reused")
        ]
        lines.append(f"{case['k']:6.3f} {' '.join(parts)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "stem_reuse_cpu.json")
    parser.add_argument(
        "--clip", action="append", required=True, metavar="NAME=FILE[@SECONDS]", help="repeatable"
    )
    parser.add_argument("--kept", type=float, nargs="+", default=[0.5, 0.2, 0.1])
    parser.add_argument("--threshold", type=float, default=8.0, help="grey levels (8)")
    parser.add_argument("--frames", type=int, default=4, help="after the first (4)")
    parser.add_argument(
        "--at-once", type=int, nargs="+", default=[1, 4], help="pictures: 1 is a live stream"
    )
    parser.add_argument("--fps", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmups", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS_NS, default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    bench, rule = Bench(tiny() if args.tiny else molmo2_4b()), ReuseRule(threshold=args.threshold)
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    results = []
    with torch.inference_mode():
        for text in args.clip:
            film = open_film(text, bench.cfg, args.frames, args.fps, rule)
            for size in args.at_once:
                turns = size, args.rounds, args.warmups, clock
                results.append(measure(bench, film, args.kept, rule, *turns))
                print(table(results[-1]), flush=True)
    result = {
        **result_head(__file__, argv, torch.device("cpu")),
        "config": "tiny" if args.tiny else "molmo2_4b",
        "dtype": "float32",
        "clock": args.clock,
        "threshold": args.threshold,
        "fps": args.fps,
        "files": [Path(text.partition("=")[2].partition("@")[0]).name for text in args.clip],
        "clips": results,
    }
    write_result(args.out, result)
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
