"""`edge-vlm demo`: a held-out clip at real speed through a real server, answers beside truth."""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from edge_vlm.errors import ConfigError, EdgeVlmError
from edge_vlm.json_text import MALFORMED, fault_of, parse_json
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.client import Answer, Client
from edge_vlm_runtime.client.run import Outcome, PlannedQuestion, stream
from edge_vlm_runtime.client.terminal import LineOutput, answer_times, frame_line, summary_line
from edge_vlm_runtime.demo.street import SOURCE, watch_street
from edge_vlm_runtime.engines.names import Backend, backend_options
from edge_vlm_runtime.server.app import Server
from edge_vlm_runtime.sources.video_file import FileSource

DONE, FAILED = 0, 1


@dataclass(frozen=True, kw_only=True)
class DemoClip:
    """`clip.json`: {"fps": 2, "questions": [{"ask_at_s", "text", "answer"}, ...]}."""

    video: Path
    fps: float
    questions: tuple[PlannedQuestion, ...]
    truths: tuple[str, ...]

    @classmethod
    def load(cls, folder: Path) -> DemoClip:
        """Raises ConfigError when clip.json is absent or malformed."""
        file = folder / "clip.json"
        try:
            record = parse_json(file.read_text(encoding="utf-8"))
            asked = record["questions"]
            return cls(
                video=folder / "clip.mp4",
                fps=float(record["fps"]),
                questions=tuple(
                    PlannedQuestion(text=str(q["text"]), at_s=float(q["ask_at_s"])) for q in asked
                ),
                truths=tuple(str(q["answer"]) for q in asked),
            )
        except (OSError, *MALFORMED) as error:
            raise ConfigError(f"not a demo clip ({fault_of(error)})", where=file) from error


class DemoView(LineOutput):
    """Frames as lines; an answer is typed out as it comes, and frames of that time wait for it."""

    def __init__(self, grid: int, clip: DemoClip) -> None:
        super().__init__(grid)
        self._truths = dict(zip(clip.questions, clip.truths, strict=True))
        self._open: list[PlannedQuestion] = []
        self._held_back: list[str] = []
        self.right = 0
        self.problems: list[str] = []

    def event(self, event: protocol.ServerEvent) -> None:
        if isinstance(event, protocol.FrameAccepted):
            self._frame(frame_line(event, self._grid))
        elif isinstance(event, protocol.FrameDropped):
            self._frame(f"frame {event.frame_sequence:>3}  dropped ({event.reason})")

    def _frame(self, text: str) -> None:
        if self._open:
            self._held_back.append(text)
        else:
            self.line(text)

    def asked(self, question: PlannedQuestion, after_s: float) -> None:
        self._open.append(question)
        if len(self._open) == 1:
            self._begin(question)

    def _begin(self, question: PlannedQuestion) -> None:
        self.line(f"\n  ? {question.text}  [asked at {question.at_s:.1f} s]")
        print("  > ", end="", file=self._out, flush=True)

    def delta(self, question: PlannedQuestion, text: str) -> None:
        print(text, end="", file=self._out, flush=True)

    def answered(self, question: PlannedQuestion, result: Answer | EdgeVlmError) -> None:
        truth = self._truths[question]
        if isinstance(result, Answer):
            if result.text_in_stream_time is not None:  # typed were the model's times
                print(f"  ({result.shown_text})", end="", file=self._out)
            right = result.shown_text.strip() == truth.strip()
            self.right += right
            mark = "right" if right else "wrong"
            self.line(f"   ({mark}, truth: {truth}){answer_times(result)}\n")
            if result.status != "completed" or not result.text.strip():
                self.problems.append(f"an empty answer to {question.text!r}")
        else:
            self.line(f"no answer: {result.code}: {result}\n")
            self.problems.append(f"no answer to {question.text!r}: {result}")
        self._open.remove(question)
        if self._open:
            self._begin(self._open[0])
            return
        for text in self._held_back:
            self.line(text)
        self._held_back.clear()


def _this_program() -> str:
    """What to type for it: its path where the shell does not find it, as before a virtual
    environment is activated."""
    if shutil.which("edge-vlm") is not None:
        return "edge-vlm"
    script = Path(sys.executable).parent / "edge-vlm"
    if not script.is_file():
        return f"{sys.executable} -m edge_vlm"
    here = Path.cwd()
    return str(script.relative_to(here) if script.is_relative_to(here) else script)


def run_demo(args: argparse.Namespace) -> int:
    """0 only if every question got an answer and the whole clip was processed."""
    logging.basicConfig(level=logging.WARNING)
    clip = DemoClip.load(args.clip)
    began = time.monotonic()
    with _open_server(args) as server:
        server.start()
        backend = Backend(args.backend)
        where = f"{args.threads} CPU threads"
        if backend is not Backend.ORT:
            where = server.runs_on if backend.is_on_gpu else f"{where}, {server.runs_on}"
        print(
            f"edge-vlm demo: bundle {args.bundle.name!r} on {where}, ready in "
            f"{time.monotonic() - began:.1f} s\nstreaming {clip.video.name} at real speed, "
            f"{clip.fps:g} frames/s, over {server.url}\n",
            flush=True,
        )
        outcome, view = asyncio.run(_stream_clip(server.url, clip))
        print(f"\n{summary_line(outcome)}; {view.right} of {len(clip.questions)} right")
        code = _verdict(outcome, view.problems)
        if args.street:
            print(f"\n{args.street:g} s of the street {SOURCE}, which has no end:\n", flush=True)
            score = asyncio.run(watch_street(server.url, args.street))
            print(f"street: {score.right} of {score.asked} right")
        program = _this_program()
        print(
            f"\nBrowser page: {server.page_url}  (or any time: {program} serve)\n"
            f"An endless street to ask about: its page, or {program} watch --source demo",
            flush=True,
        )
        if args.exit or not (sys.stdin.isatty() and sys.stdout.isatty()):
            return code
        print("Serving until Ctrl-C.", flush=True)
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            return code


def _open_server(args: argparse.Namespace) -> Server:
    options = {"threads": args.threads, **backend_options(args)}
    try:
        return Server.open(args.bundle, port=args.port, **options)
    except ConfigError as error:
        cause = error.__cause__
        if not (isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE):
            raise
        print(f"Port {args.port} is in use: the page gets a free one.", flush=True)
        return Server.open(args.bundle, port=0, **options)


async def _stream_clip(url: str, clip: DemoClip) -> tuple[Outcome, DemoView]:
    async with await Client.connect(url, {"delivery": "wait"}) as client:
        view = DemoView(client.created.model.limits.cell_grid, clip)
        client.on_event = view.event
        source = FileSource(clip.video, clip.fps)
        outcome = await stream(source, client, clip.questions, real_time=True, observer=view)
    return outcome, view


def _verdict(outcome: Outcome, unanswered: list[str]) -> int:
    problems = []
    if outcome.source_error is not None:
        problems.append(str(outcome.source_error))
    if outcome.frames_sent == 0 or outcome.frames_processed != outcome.frames_sent:
        problems.append(f"{outcome.frames_processed} of {outcome.frames_sent} frames processed")
    problems += unanswered
    for problem in problems:
        print(f"edge-vlm demo: {problem}", file=sys.stderr)
    return FAILED if problems else DONE
