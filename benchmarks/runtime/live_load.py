"""What video costs while the model talks, and what a scene costs that stands still.

    python -m benchmarks.runtime.live_load                           # some minutes
    python -m benchmarks.runtime.live_load --rounds 2 --answer 40 --seconds 10 --out small.json

1. An answer of 200 tokens: alone, with a camera of 2 to 30 frames a second in the same session,
   with frames as fast as they are taken, and with such a flood in three other sessions. In turn,
   round by round. Goal: at most 1.25 times as long as alone.
2. Frames that were encoded join the memory one by one or four in a prefill: time per frame.
3. The budget: share of cells kept against `keep_ratio`, tokens a second against
   `vision_tokens_per_s`, over rendered scenes and the videos named. Goal: within
   10 %.
4. A minute of a camera on a scene that stands still and on a busy one, default settings: frames
   through the engines, tokens, and processor time, JPEG decoding apart. Goal: less than a tenth.

Times are processor seconds of one thread unless `--clock wall`: other programs on the machine do
not show.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
from benchmarks.runtime.stream_length import FPS, pictures
from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm_runtime import protocol
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.engine_thread.handle import SessionHandle
from edge_vlm_runtime.engine_thread.scheduler import Scheduler
from edge_vlm_runtime.inference.bundle_model import LoadedBundle, warm_up
from edge_vlm_runtime.inference.vision import FrameTokens
from edge_vlm_runtime.protocol.settings import Attention, ModelLimits, ServerLimits, SessionSettings
from edge_vlm_runtime.session.budget import MemoryPlan, default_settings
from edge_vlm_runtime.session.context import FRAMES_PER_PREFILL, StreamContext
from edge_vlm_runtime.session.frames import EncodedFrame
from edge_vlm_runtime.session.session import Session
from edge_vlm_runtime.session.stream_clock import StreamClock
from edge_vlm_runtime.sources.video_file import FileSource

FLOOD = "flood"
RATES: tuple[float | str, ...] = (2.0, 10.0, 30.0, FLOOD)
OTHERS = 3
GOAL_ANSWER, GOAL_BUDGET, GOAL_STATIC = 1.25, 0.1, 0.1
RATIOS = (0.25, 0.5, 0.75)
TOKENS_PER_S = (6.0, 12.0)
SCENES = {"static": 0.0, "slow": 0.005, "fast": 0.12}
"""Turns that the things on the picture make from one frame to the next."""


class EndlessEngines:
    """Engines whose answers end only where they are cut."""

    def __init__(self, engines: LoadedBundle) -> None:
        self._engines = engines
        self.prompt = _EndlessPrompt(engines)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engines, name)


class _EndlessPrompt:
    def __init__(self, engines: LoadedBundle) -> None:
        self._prompt = engines.prompt
        self.eos_ids = (engines.bundle.config.language.base_vocab,)  # there is no logit for it

    def __getattr__(self, name: str) -> Any:
        return getattr(self._prompt, name)


class Camera:
    """A session that is shown pictures at a rate of the clock's, or whenever it has taken one."""

    def __init__(
        self,
        engines: Any,
        settings: SessionSettings,
        limits: ServerLimits,
        jpegs: list[bytes],
        rate: float | str | None,
        clock_ns: Callable[[], int],
    ) -> None:
        self._jpegs, self._rate, self._clock_ns = jpegs, rate, clock_ns
        self.accepted: list[protocol.FrameAccepted] = []
        self.dropped = 0
        self.done_ns: int | None = None
        self.output_tokens = 0
        self._number = 0
        self._due_ns = clock_ns()
        self.session = Session(
            engines=engines,
            settings=settings,
            limits=limits,
            now_ns=clock_ns(),
            stopwatch_ns=clock_ns,
        )
        self.handle = SessionHandle(self.session, limits, clock_ns=clock_ns, send=self._take_all)

    def _take_all(self, events: list[protocol.ServerEvent]) -> None:
        for event in events:
            self._take(event)

    def _take(self, event: protocol.ServerEvent) -> None:
        if isinstance(event, protocol.FrameAccepted):
            self.accepted.append(event)
        elif isinstance(event, protocol.FrameDropped):
            self.dropped += 1
        elif isinstance(event, protocol.ResponseDone):
            self.done_ns = self._clock_ns()
            self.output_tokens = event.usage.output_tokens
        elif isinstance(event, protocol.Error):
            raise RuntimeError(f"not a clean run: {event}")

    def begin(self) -> None:
        """Its next picture is due one interval from now."""
        if isinstance(self._rate, float):
            self._due_ns = self._clock_ns() + round(1e9 / self._rate)

    def look(self) -> None:
        """Takes the pictures that are due."""
        if isinstance(self._rate, float):
            while self._clock_ns() >= self._due_ns:
                self._due_ns += round(1e9 / self._rate)
                self.put()
        elif self._rate == FLOOD and self.handle.frames_waiting == 0:
            self.put()

    def put(self, capture_s: float | None = None) -> None:
        rate = self._rate if isinstance(self._rate, float) else 30.0
        capture_s = self._number / rate if capture_s is None else capture_s
        frame = EncodedFrame(
            seq=self._number,
            capture_us=round(capture_s * 1e6),
            received_ns=self._clock_ns(),
            data=self._jpegs[self._number % len(self._jpegs)],
        )
        self._number += 1
        self.handle.put_frame(frame)


# ---- 1: an answer under video ----------------------------------------------------------------


def measure_answer(
    engines: LoadedBundle, args: argparse.Namespace, clock_ns: Callable[[], int]
) -> dict[str, Any]:
    limits = ServerLimits()
    settings = default_settings(engines.bundle, limits).changed(
        {
            "max_answer_tokens": args.answer,
            "history_turns": 0,
            "fps_cap": 1000.0,
            "drop_duplicates": False,
            "max_frame_age_s": 1000.0,
        }
    )
    watching = settings.changed({"max_answer_tokens": 40})
    jpegs = pictures(engines.bundle.config.vision.image_size)
    endless = EndlessEngines(engines)
    frames: dict[str, list[int]] = {}

    def answer(name: str, rate: float | str | None, others: int = 0) -> None:
        cameras = [Camera(endless, settings, limits, jpegs, rate, clock_ns)]
        cameras += [  # they are not asked, so they need no room for an answer
            Camera(endless, watching, limits, jpegs, FLOOD, clock_ns) for _ in range(others)
        ]
        turns: Scheduler[Camera] = Scheduler(
            answer=lambda camera: camera.handle.answer(),
            watch=lambda camera: camera.handle.watch(),
            clock_ns=clock_ns,
            max_answer_slowdown=limits.max_answer_slowdown,
        )
        for camera in cameras:
            turns.add(camera)
        for _ in range(12):  # something to talk about
            for camera in cameras:
                camera.put()
            turns.round()
        asker = cameras[0]
        before = sum(len(camera.accepted) for camera in cameras)
        begin_ns = clock_ns()
        for camera in cameras:
            camera.begin()
        asker.handle.take(protocol.ResponseCreate(text="What is there?"))
        asker.handle.take_messages()
        while asker.done_ns is None:
            turns.round()
            for camera in cameras:
                camera.look()
        assert asker.output_tokens == args.answer
        took[name].append((asker.done_ns - begin_ns) * 1e-9)
        frames[name].append(sum(len(camera.accepted) for camera in cameras) - before)

    cases: dict[str, Callable[[], object]] = {"alone": partial(answer, "alone", None)}
    for rate in RATES:
        name = FLOOD if rate == FLOOD else f"{rate:g} fps"
        cases[name] = partial(answer, name, rate)
    elsewhere = f"{FLOOD} in {OTHERS} other sessions"
    cases[elsewhere] = partial(answer, elsewhere, None, OTHERS)
    took: dict[str, list[float]] = {name: [] for name in cases}
    frames.update({name: [] for name in cases})
    in_turn(
        cases,
        rounds=args.rounds,
        warmups=1,
        device=torch.device("cpu"),
        say=lambda line: progress(f"answer, {line}"),
        clock=lambda: clock_ns() * 1e-9,
    )
    return {
        "tokens": args.answer,
        "max_answer_slowdown": limits.max_answer_slowdown,
        "goal": GOAL_ANSWER,
        "cases": {
            name: {
                **summary(seconds[1:]),  # the first is the warm-up
                "times_alone": round(speed_up(seconds[1:], took["alone"][1:]), 3),
                "frames_encoded_meanwhile": statistics.median(frames[name][1:]),
            }
            for name, seconds in took.items()
        },
    }


# ---- 2: several frames in a prefill ----------------------------------------------------------


def measure_batches(
    engines: LoadedBundle, args: argparse.Namespace, clock_ns: Callable[[], int]
) -> dict[str, Any]:
    settings = default_settings(engines.bundle, ServerLimits())
    tokens: list[FrameTokens] = []
    camera = Camera(
        engines,
        settings.changed({"delivery": "wait"}),
        ServerLimits(),
        pictures(engines.bundle.config.vision.image_size),
        2.0,
        clock_ns,
    )
    context = camera.session._context
    remember = context.add

    def add(frames: Sequence[FrameTokens]) -> None:
        tokens.extend(frames)
        remember(frames)

    context.add = add  # type: ignore[method-assign]
    for _ in range(FRAMES_PER_PREFILL * 4):
        camera.put()
        while camera.handle.step():
            pass

    def prefill(group: int) -> None:
        model = ModelLimits.from_bundle(engines.bundle)
        capacity = model.max_cache_tokens
        memory = StreamContext(
            language=engines.language,
            prompt=engines.prompt,
            clock=StreamClock(),
            model=model,
            capacity=capacity,
            plan=MemoryPlan(
                attention=Attention.FRAME,
                window_tokens=capacity - 64,
                last_n=4,
                reserve_tokens=32,
            ),
        )
        for start in range(0, len(tokens), group):
            memory.add(tokens[start : start + group])

    seconds = in_turn(
        {"one by one": lambda: prefill(1), "four together": lambda: prefill(FRAMES_PER_PREFILL)},
        rounds=args.rounds * 4,
        warmups=2,
        device=torch.device("cpu"),
        say=lambda line: None,
        clock=lambda: clock_ns() * 1e-9,
    )
    single, together = seconds.values()
    return {
        "frames": len(tokens),
        "milliseconds_a_frame": {
            name: round(statistics.median(times) / len(tokens) * 1e3, 4)
            for name, times in seconds.items()
        },
        "speed_up": round(speed_up(single, together), 3),
    }


# ---- 3 and 4: the budget, and a scene that stands still --------------------------------------


def scene(turn: float, num_frames: int, size: int) -> list[bytes]:
    """Three things on a cluttered ground, with a camera's noise."""
    random = np.random.default_rng(7)
    ground = np.kron(random.integers(60, 190, (12, 12, 3)), np.ones((size // 12, size // 12, 1)))
    side, made = size // 5, []
    for index in range(num_frames):
        rgb = ground + random.normal(0, 1, ground.shape)
        for thing, colour in enumerate([(255, 40, 40), (40, 255, 60), (60, 60, 255)]):
            angle = 2 * np.pi * (turn * index + thing / 3)
            place = (size - side) * (0.5 + 0.45 * np.array([np.sin(angle), np.cos(angle)]))
            top, left = place.astype(int)
            rgb[top : top + side, left : left + side] = colour
        made.append(encode_jpeg(rgb.clip(0, 255).astype(np.uint8)))
    return made


def clips(num_frames: int, size: int, videos: Sequence[Path]) -> dict[str, list[bytes]]:
    found = {name: scene(turn, num_frames, size) for name, turn in SCENES.items()}
    for path in videos:
        found[path.stem] = [encode_jpeg(shown.rgb) for shown in FileSource(path, 8.0).pictures()]
    return found


def show(camera: Camera, count: int, fps: float) -> None:
    for index in range(count):
        camera.put(index / fps)
        while camera.handle.step():
            pass


def measure_budget(
    engines: LoadedBundle, args: argparse.Namespace, clock_ns: Callable[[], int]
) -> dict[str, Any]:
    limits = ServerLimits()
    settings = default_settings(engines.bundle, limits).changed({"delivery": "wait"})
    shown = clips(args.seconds * FPS, engines.bundle.config.vision.image_size, args.videos)
    rows: dict[str, dict[str, float]] = {}
    for name, jpegs in shown.items():
        rows[name] = {}
        for field, targets in (("keep_ratio", RATIOS), ("vision_tokens_per_s", TOKENS_PER_S)):
            for target in targets:
                changed = settings.changed({field: target})
                camera = Camera(engines, changed, limits, jpegs, None, clock_ns)
                show(camera, len(jpegs), FPS)
                assert len(camera.accepted) == len(jpegs)
                kept = sum(event.cells_kept for event in camera.accepted)
                seen = sum(event.cells_seen for event in camera.accepted)
                spent = kept / seen if field == "keep_ratio" else kept * FPS / len(jpegs)
                rows[name][f"{field} {target:g}"] = round(spent / target, 4)
        progress(f"budget: {name}, {len(jpegs)} frames: {rows[name]}")
    return {
        "frames": {name: len(jpegs) for name, jpegs in shown.items()},
        "spent_to_target": rows,
        "worst": max(abs(1 - value) for row in rows.values() for value in row.values()),
        "goal": GOAL_BUDGET,
    }


def measure_static(
    engines: LoadedBundle, args: argparse.Namespace, clock_ns: Callable[[], int]
) -> dict[str, Any]:
    limits = ServerLimits()
    settings = default_settings(engines.bundle, limits)
    size = engines.bundle.config.vision.image_size
    count = args.seconds * FPS
    rows: dict[str, dict[str, float]] = {}
    for name in ("static", "fast"):
        jpegs = scene(SCENES[name], count, size)
        camera = Camera(engines, settings, limits, jpegs, None, clock_ns)
        engine_s = 0.0
        for index in range(count):
            camera.put(index / FPS)
            before, begin_ns = len(camera.accepted), clock_ns()
            while camera.handle.step():
                pass
            if len(camera.accepted) > before:
                decode_s = camera.accepted[-1].stage_ms["decode"] * 1e-3
                engine_s += (clock_ns() - begin_ns) * 1e-9 - decode_s
        rows[name] = {
            "frames_shown": count,
            "frames_encoded": len(camera.accepted),
            "tokens": sum(event.cells_kept for event in camera.accepted),
            "seconds": round(engine_s, 4),
        }
    still, busy = rows["static"], rows["fast"]
    return {
        **rows,
        "static_to_busy": {
            name: round(still[name] / busy[name], 4)
            for name in ("frames_encoded", "tokens", "seconds")
        },
        "heartbeat_s": settings.heartbeat_s,
        "goal": GOAL_STATIC,
    }


# ---- all -------------------------------------------------------------------------------------


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The result as text."""
    answer = result["answer"]
    yield f"an answer of {answer['tokens']} tokens (goal: {answer['goal']} times alone)"
    for name, case in answer["cases"].items():
        yield (
            f"  {case['median_s'] * 1e3:>9.1f} ms {case['times_alone']:>6.2f} x  {name}, "
            f"{case['frames_encoded_meanwhile']:g} frames meanwhile"
        )
    batches = result["batches"]
    yield f"prefill, ms a frame: {batches['milliseconds_a_frame']}, {batches['speed_up']} x"
    yield f"spent to target (goal: within {result['budget']['goal']:.0%})"
    for name, row in result["budget"]["spent_to_target"].items():
        yield f"  {name:>12}: " + ", ".join(f"{what} {value:.3f}" for what, value in row.items())
    yield f"static to busy: {result['static']['static_to_busy']} (goal {GOAL_STATIC})"


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "live_load.json")
    parser.add_argument("--bundle", type=Path, default=DEMO_BUNDLE)
    parser.add_argument("--answer", type=int, default=200, help="tokens of the answer")
    parser.add_argument("--seconds", type=int, default=60, help="length of a rendered scene")
    parser.add_argument("--videos", type=Path, nargs="*", default=[], help="more than scenes")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clock", choices=CLOCKS_NS, default="processor")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    clock_ns = CLOCKS_NS[args.clock]
    with LoadedBundle.open(args.bundle, threads=1) as engines:
        warm_up(engines)
        result: dict[str, Any] = {
            **result_head(__file__, argv, torch.device("cpu")),
            "clock": args.clock,
            "rounds": args.rounds,
            "bundle": engines.bundle.name,
            "answer": measure_answer(engines, args, clock_ns),
            "batches": measure_batches(engines, args, clock_ns),
            "budget": measure_budget(engines, args, clock_ns),
            "static": measure_static(engines, args, clock_ns),
        }
    write_result(args.out, result)
    print("\n".join(lines(result)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
