"""What the length of a stream costs, and what it would cost to encode the clip for each question.

    python -m benchmarks.runtime.stream_length  # 100 to 10,000 frames; some minutes
    python -m benchmarks.runtime.stream_length --lengths 30 100 --clips 16 --rounds 3

1. The served bundle (the demo's by default), one session per length: time to first token of a
   question, time of one more frame (JPEG to cache), resident memory of the process on the way of
   the longest stream. Goals, of streams whose window is full: the last time is at most 1.2 times
   the first, memory at the end at most 1.05 times that at a tenth of it.
2. The demo's weights with room for a whole clip: the same question answered from a stream that has
   been read (`frame`), by prefilling the kept features of every frame again (`exact`), by encoding
   every frame again, and by transformers' own Molmo2 of the same size, which keeps every cell and
   encodes the clip for each question.

Within a part everything is timed in turn, round by round, and ratios are medians over the rounds.
`--clock processor` (the default without a GPU) counts processor seconds: other programs on the
machine do not show. One thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import (
    CHECKPOINT,
    CLOCKS_NS,
    RESULTS,
    progress,
    result_head,
    script_parser,
    speed_up,
    summary,
    write_result,
)
from edge_vlm.config import ModelConfig
from edge_vlm.model.checkpoint import load_checkpoint, save_checkpoint
from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm.pixels.patches import patch_indices_of_cells
from edge_vlm_export.graphs.graphs import GraphLimits
from edge_vlm_export.to_onnx import ExportOptions, export_bundle
from edge_vlm_runtime import protocol
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.engine_thread.handle import SessionHandle
from edge_vlm_runtime.inference.bundle_model import LoadedBundle, warm_up
from edge_vlm_runtime.protocol.settings import Attention, ServerLimits, SessionSettings
from edge_vlm_runtime.server.gauges import resident_bytes
from edge_vlm_runtime.session.budget import default_settings
from edge_vlm_runtime.session.frames import EncodedFrame
from edge_vlm_runtime.session.session import Session

QUESTION = "How many things are there now?"
FPS = 2
NUM_PICTURES = 48
REBUILT = 200
"""Streams up to so many frames are made anew in every round, so that they keep their length."""
CLIP_POSITIONS = 8192
CLIP_TOKENS = 6144
GOAL_TIME, GOAL_MEMORY = 1.2, 1.05


def pictures(size: int) -> list[bytes]:
    """JPEGs of things that move over a cluttered background; they repeat after NUM_PICTURES."""
    rng = np.random.default_rng(0)
    ground = np.kron(rng.integers(60, 190, (12, 12, 3)), np.ones((size // 12, size // 12, 1)))
    side, made = size // 5, []
    for index in range(NUM_PICTURES):
        picture = ground + rng.normal(0, 4, ground.shape)
        for thing in range(3):
            turn = 2 * np.pi * (index / NUM_PICTURES + thing / 3)
            top, left = (
                (size - side) * (0.5 + 0.45 * np.array([np.sin(turn), np.cos(turn)]))
            ).astype(int)
            picture[top : top + side, left : left + side] = [
                [255, 40, 40],
                [40, 255, 60],
                [60, 60, 255],
            ][thing]
        made.append(encode_jpeg(picture.clip(0, 255).astype(np.uint8)))
    return made


class Stream:
    """One session, fed without a socket."""

    def __init__(
        self,
        engines: LoadedBundle,
        settings: SessionSettings,
        limits: ServerLimits,
        clock_ns: Callable[[], int],
    ) -> None:
        self._clock_ns = clock_ns
        self._done: list[protocol.ResponseDone] = []
        self._accepted = 0
        self.num_frames = 0
        self.kv_tokens = 0
        self.kept = self.seen = 0
        session = Session(
            engines=engines,
            settings=settings,
            limits=limits,
            now_ns=clock_ns(),
            stopwatch_ns=clock_ns,
        )
        self.handle = SessionHandle(session, limits, clock_ns=clock_ns, send=self._take_all)

    def _take_all(self, events: list[protocol.ServerEvent]) -> None:
        for event in events:
            self._take(event)

    def _take(self, event: protocol.ServerEvent) -> None:
        if isinstance(event, protocol.FrameAccepted):
            self._accepted += 1
            self.kv_tokens = event.kv_tokens
            self.kept += event.cells_kept
            self.seen += event.cells_seen
        elif isinstance(event, protocol.ResponseDone):
            self._done.append(event)
        elif isinstance(event, (protocol.FrameDropped, protocol.Error)):
            raise RuntimeError(f"not a clean run: {event}")

    def feed(self, jpegs: list[bytes], count: int = 1) -> float:
        """Frames until they are in the cache; seconds for all of them."""
        begin_ns = self._clock_ns()
        for _ in range(count):
            frame = EncodedFrame(
                seq=self.num_frames,
                capture_us=self.num_frames * 1_000_000 // FPS,
                received_ns=self._clock_ns(),
                data=jpegs[self.num_frames % len(jpegs)],
            )
            self.num_frames += 1
            self.handle.put_frame(frame)
            while self.handle.step():
                pass
        assert self._accepted == self.num_frames
        return (self._clock_ns() - begin_ns) * 1e-9

    def ask(self) -> float:
        """Seconds from a question to the first token of its answer; the rest is not measured."""
        self._done.clear()
        begin_ns = self._clock_ns()
        self.handle.take(protocol.ResponseCreate(text=QUESTION))
        self.handle.step()  # reads the question
        self.handle.step()  # says the first token
        took_s = (self._clock_ns() - begin_ns) * 1e-9
        while self.handle.step():
            pass
        assert self._done[0].status == "completed"
        return took_s

    def ask_anew(self) -> float:
        """As `ask`, of a memory whose frames all have to be read again first, which counts. They
        would stay until a frame comes: another mode in between lets go of them."""
        begin_ns = self._clock_ns()
        for attention in (Attention.LAST_N, Attention.EXACT):
            patch = protocol.SettingsPatch(attention=attention)
            self.handle.take(protocol.SessionUpdate(session=patch))
            while self.handle.step():
                pass
        return (self._clock_ns() - begin_ns) * 1e-9 + self.ask()

    def ask_twice(self) -> float:
        """The second question's `ask`: behind other work the first one finds cold caches."""
        self.ask()
        return self.ask()

    @property
    def keep_ratio(self) -> float:
        return self.kept / self.seen


# ---- 1: lengths ------------------------------------------------------------------------------


def measure_lengths(args: argparse.Namespace, clock_ns: Callable[[], int]) -> dict[str, Any]:
    """Part 1, on the bundle as it is served."""
    with LoadedBundle.open(args.bundle, threads=1) as engines:
        warm_up(engines)
        limits = ServerLimits()
        settings = default_settings(engines.bundle, limits).changed({"delivery": "wait"})
        jpegs = pictures(engines.bundle.config.vision.image_size)

        def stream(length: int) -> Stream:
            made = Stream(engines, settings, limits, clock_ns)
            if length:
                made.feed(jpegs, length)
                made.ask()  # so that all of them show an earlier turn with a question
            return made

        streams, memory = _grow(args.lengths, lambda: stream(0), jpegs)
        for length in args.lengths:
            streams.setdefault(length, stream(length))
        first_token: dict[int, list[float]] = {length: [] for length in args.lengths}
        one_frame: dict[int, list[float]] = {length: [] for length in args.lengths}
        for turn in range(-args.warmups, args.rounds):
            for length in args.lengths:
                used = streams[length] if length > REBUILT else stream(length)
                ttft_s, frame_s = used.ask_twice(), used.feed(jpegs)
                if turn >= 0:
                    first_token[length].append(ttft_s)
                    one_frame[length].append(frame_s)
            progress(f"lengths: round {turn + 1} of {args.rounds}")
        rows = {
            str(length): {
                "kv_tokens": streams[length].kv_tokens,
                "keep_ratio": round(streams[length].keep_ratio, 4),
                "time_to_first_token": summary(first_token[length]),
                "one_frame": summary(one_frame[length]),
                "resident_mb": round(memory[length] / 1e6, 1) if length in memory else None,
            }
            for length in args.lengths
        }
        first, last = args.lengths[0], args.lengths[-1]
        return {
            "bundle": engines.bundle.name,
            "settings": dataclasses.asdict(settings),
            "lengths": rows,
            "time_to_first_token_last_to_first": _ratio(first_token[last], first_token[first]),
            "one_frame_last_to_first": _ratio(one_frame[last], one_frame[first]),
            "resident_last_to_tenth": _memory_ratio(memory, args.lengths),
            "goals": {"time": GOAL_TIME, "memory": GOAL_MEMORY},
        }


def _grow(
    lengths: list[int], make: Callable[[], Stream], jpegs: list[bytes]
) -> tuple[dict[int, Stream], dict[int, int]]:
    """The longest stream, alone in the process, and the resident bytes at each length."""
    longest, memory = make(), {}
    for length in lengths:
        while longest.num_frames < length:
            longest.feed(jpegs, min(250, length - longest.num_frames))
        longest.ask()
        memory[length] = resident_bytes() or 0
        progress(f"{length} frames: {memory[length] / 1e6:.1f} MB resident")
    return {lengths[-1]: longest}, memory


def _memory_ratio(memory: Mapping[int, int], lengths: list[int]) -> float | None:
    tenth = lengths[-1] // 10
    return round(memory[lengths[-1]] / memory[tenth], 4) if memory.get(tenth) else None


def _ratio(later: list[float], earlier: list[float]) -> float:
    return round(speed_up(later, earlier), 3)


# ---- 2: encoding the clip for each question --------------------------------------------------


def roomy_bundle(folder: Path) -> Path:
    """The demo's weights with positions for a whole clip. It answers nothing sensible there: it was
    not trained that far. Its costs are those of a model of its size."""
    model = load_checkpoint(CHECKPOINT)
    config = dataclasses.replace(
        model.cfg,
        language=dataclasses.replace(model.cfg.language, max_positions=CLIP_POSITIONS),
    )
    checkpoint = folder / "checkpoint"
    save_checkpoint(checkpoint, config, model.state_dict(), CHECKPOINT / "tokenizer.json")
    limits = GraphLimits(max_tokens=CLIP_TOKENS, max_past=CLIP_POSITIONS)
    export_bundle(checkpoint, folder / "bundle", ExportOptions(limits=limits, thorough=False))
    return folder / "bundle"


def measure_clips(
    args: argparse.Namespace, clock_ns: Callable[[], int], folder: Path
) -> dict[str, Any]:
    """Part 2."""
    limits = ServerLimits(kv_capacity_tokens=CLIP_POSITIONS)
    with LoadedBundle.open(roomy_bundle(folder), threads=1) as engines:
        warm_up(engines)
        config = engines.bundle.config
        base = default_settings(engines.bundle, limits).changed(
            {"delivery": "wait", "keep_ratio": args.keep_ratio, "max_answer_tokens": 2}
        )
        exact = base.changed({"attention": Attention.EXACT})
        everything = exact.changed({"keep_ratio": 1.0, "policy": "keep_all"})
        jpegs = pictures(config.vision.image_size)
        rows = {}
        for frames in args.clips:
            streams = {
                name: Stream(engines, settings, limits, clock_ns)
                for name, settings in {
                    "streamed": base,
                    "features kept, prefilled again": exact,
                    "features kept, all cells, prefilled again": everything,
                }.items()
            }
            for stream in streams.values():
                stream.feed(jpegs, frames)
            cases: dict[str, Callable[[], float]] = {
                name: stream.ask_twice if stream is streams["streamed"] else stream.ask_anew
                for name, stream in streams.items()
            }

            def encode_again(frames: int = frames) -> float:
                again = Stream(engines, exact, limits, clock_ns)
                return again.feed(jpegs, frames) + again.ask()

            cases["every frame encoded again"] = encode_again
            peer = _peer(config, frames, clock_ns)
            if peer is not None:
                cases["transformers' Molmo2, all cells, every frame encoded again"] = peer
            seconds: dict[str, list[float]] = {name: [] for name in cases}
            for turn in range(-1, args.clip_rounds):
                for name, case in cases.items():
                    took_s = case()
                    progress(f"{frames} frames, round {turn + 1}: {name} {took_s:.4f} s")
                    if turn >= 0:
                        seconds[name].append(took_s)
            rows[str(frames)] = {
                name: {
                    **summary(seconds[name]),
                    "times_streamed": _ratio(seconds[name], seconds["streamed"]),
                    **({"kv_tokens": streams[name].kv_tokens} if name in streams else {}),
                }
                for name in cases
            }
        return {"keep_ratio": args.keep_ratio, "clips": rows}


def _peer(
    cfg: ModelConfig, num_frames: int, clock_ns: Callable[[], int]
) -> Callable[[], float] | None:
    """One question to transformers' Molmo2 of this size with random weights: from patches to the
    logits after the question. None where transformers is missing."""
    try:
        import transformers
    except ImportError:
        return None
    from tests.model.peers import peer_config  # the configuration that parity is proven with

    torch.manual_seed(0)
    model = transformers.Molmo2ForConditionalGeneration(peer_config(cfg)).eval()
    inputs = _peer_inputs(cfg, num_frames)

    @torch.no_grad()
    def ask() -> float:
        begin_ns = clock_ns()
        model(**inputs, logits_to_keep=1)
        return (clock_ns() - begin_ns) * 1e-9

    return ask


def _peer_inputs(cfg: ModelConfig, num_frames: int) -> dict[str, torch.Tensor]:
    """Five tokens of time, markers and all cells for each frame; ten tokens of question."""
    vision, start = cfg.vision, cfg.language.base_vocab
    frame = [*[1] * 5, start, *[start + 2] * vision.num_cells, start + 1]
    ids = torch.tensor([*frame * num_frames, *[2] * 10])
    table = torch.from_numpy(patch_indices_of_cells(np.arange(vision.num_cells), vision))
    offsets = torch.arange(num_frames)[:, None, None] * vision.num_patches
    side = vision.cell_grid
    return {
        "input_ids": ids[None],
        "attention_mask": torch.ones_like(ids)[None],
        "pixel_values_videos": torch.randn(num_frames, vision.num_patches, vision.patch_dim),
        "video_token_pooling": (table[None] + offsets).flatten(0, 1),
        "video_grids": torch.tensor([[num_frames, side, side]]),
        "mm_token_type_ids": (ids >= start).long()[None],
    }


# ---- both ------------------------------------------------------------------------------------


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The result as text."""
    if "stream" in result:
        stream = result["stream"]
        yield f"{'frames':>7} {'cache':>6} {'TTFT ms':>9} {'frame ms':>9} {'resident MB':>12}"
        for length, row in stream["lengths"].items():
            yield (
                f"{length:>7} {row['kv_tokens']:>6} "
                f"{row['time_to_first_token']['median_s'] * 1e3:>9.2f} "
                f"{row['one_frame']['median_s'] * 1e3:>9.2f} {row['resident_mb']:>12}"
            )
        yield (
            f"last to first: TTFT {stream['time_to_first_token_last_to_first']}, frame "
            f"{stream['one_frame_last_to_first']} (goal {GOAL_TIME}); memory, last to a tenth: "
            f"{stream['resident_last_to_tenth']} (goal {GOAL_MEMORY})"
        )
    for frames, row in result.get("question", {}).get("clips", {}).items():
        yield f"a question after {frames} frames:"
        for name, case in row.items():
            yield f"  {case['median_s'] * 1e3:>10.1f} ms  {case['times_streamed']:>8.1f} x  {name}"


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "stream_length.json")
    parser.add_argument("--bundle", type=Path, default=DEMO_BUNDLE)
    parser.add_argument("--lengths", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--clips", type=int, nargs="*", default=[16, 64, 256])
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--clip-rounds", type=int, default=5)
    parser.add_argument("--warmups", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS_NS, default="processor")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.lengths.sort()
    clock_ns = CLOCKS_NS[args.clock]
    result: dict[str, Any] = {
        **result_head(__file__, argv, torch.device("cpu")),
        "clock": args.clock,
        "rounds": {"lengths": args.rounds, "clips": args.clip_rounds},
    }
    if args.lengths:
        result["stream"] = measure_lengths(args, clock_ns)
    if args.clips:
        with tempfile.TemporaryDirectory() as folder:
            result["question"] = measure_clips(args, clock_ns, Path(folder))
    write_result(args.out, result)
    print("\n".join(lines(result)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
