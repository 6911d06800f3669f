"""`edge-vlm bench`. What it needs is imported when it runs."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from edge_vlm.cli import INTERRUPTED_EXIT_CODE, Command
from edge_vlm.console.options import About
from edge_vlm.console.paths import output_file
from edge_vlm.errors import ConfigError
from edge_vlm_runtime.cli.common.arguments import add_options, given, options_of
from edge_vlm_runtime.cli.common.options import (
    BundleOptions,
    access_of,
    add_access_arguments,
    address_of,
)
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.engines.names import backend_options

if TYPE_CHECKING:
    from edge_vlm_runtime.bench.run import KeepingRun
    from edge_vlm_runtime.bench.workload import Workload

FORMS = ("md", "json", "csv")


def _numbers(text: str, name: str) -> tuple[float, ...]:
    """Of `1,0.5`; "max" is infinite. Raises ValueError."""
    try:
        return tuple(float("inf" if part.strip() == "max" else part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} must be numbers with commas between, got {text!r}") from None


@dataclass(frozen=True, kw_only=True)
class BenchArguments:
    """What is measured."""

    keep_ratio: Annotated[str, About(metavar="RATIOS")] = "1,0.5,0.3,0.2"
    """Shares of cells kept; the others are compared with the first."""
    context: Annotated[str | None, About(metavar="TOKENS")] = None
    """Tokens in memory when a question comes (default: 0,64,512, as far as the model takes)."""
    fps: Annotated[str, About(metavar="RATES")] = "2,10,30,max"
    """Frames a second of a live stream."""
    source: Annotated[str | None, About(metavar="CLIP")] = None
    """A video file in the place of made-up pictures."""
    repeat: int = 5
    """Turns of A B A."""
    samples: int = 20
    """Of each point in a turn; a 99th percentile is given from 100 samples on."""
    warmups: int = 10
    """Of each point, before the first turn."""
    point_s: Annotated[float, About(option="point_seconds", metavar="SECONDS")] = 4.0
    """A point takes no more samples in a turn after so long."""
    stream_s: Annotated[float, About(option="stream_seconds", metavar="SECONDS")] = 5.0
    """How long each rate is streamed."""
    reuse: Annotated[float, About(metavar="LEVELS")] = 0.0
    """The setting of the sessions that are streamed to; frames alone are computed whole."""

    def __post_init__(self) -> None:
        self.workload()

    def workload(self) -> Workload:
        """Raises ValueError."""
        from edge_vlm_runtime.bench.workload import Workload

        asked: dict[str, Any] = {}
        if self.context is not None:
            numbers = _numbers(self.context, "context")
            if not all(number == int(number) for number in numbers if number < 1e9):
                raise ValueError(f"context must be whole numbers, got {self.context!r}")
            asked["contexts"] = tuple(int(min(number, 1e9)) for number in numbers)
        return Workload(
            keep_ratios=_numbers(self.keep_ratio, "keep_ratio"),
            rates=_numbers(self.fps, "fps"),
            source=self.source,
            repeat=self.repeat,
            samples=self.samples,
            warmups=self.warmups,
            point_s=self.point_s,
            stream_s=self.stream_s,
            reuse=self.reuse,
            **asked,
        )


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle",
        type=Path,
        nargs="?",
        default=DEMO_BUNDLE,
        help="exported model (default: the small demo model)",
    )
    add_options(parser, {"": options_of(BenchArguments)}, is_checked=True)
    runs = options_of(BundleOptions, only=("threads", "backend", "engines", "calibration"))
    add_options(parser, {"": runs}, is_checked=True)
    add_access_arguments(parser)
    parser.add_argument(
        "-o", "--output", choices=FORMS, default="md", help="form of the result (default: md)"
    )
    parser.add_argument(
        "--layers", action="store_true", help="profile each graph by operator, in a run of its own"
    )
    parser.add_argument(
        "--trace",
        type=output_file,
        metavar="FILE",
        help="write what ran when, for ui.perfetto.dev or chrome://tracing",
    )
    parser.add_argument(
        "--nvtx", action="store_true", help="mark each graph's runs for NVIDIA's Nsight Systems"
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="FILE",
        help="an earlier result as JSON, of the same shapes, to compare this one with",
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the result as JSON, too"
    )


def _run(args: argparse.Namespace) -> int:
    from edge_vlm_runtime.bench.compare import read_comparable

    before = None if args.compare is None else read_comparable(args.compare)
    arguments = BenchArguments(**given(options_of(BenchArguments), args))
    args.url = address_of(args)
    make = _bundle_run if args.url is None else _served_run
    total, made = make(args, arguments.workload(), before)
    with progress(total) as say, _terminated_as_interrupted():
        run = made(say)
        ended: BaseException | None = None
        try:
            run.run()
        except (KeyboardInterrupt, Exception) as error:  # what was measured is kept
            if not run.record.sections:
                raise
            ended = error
        run.end(ended)
    _write(run.record.to_dict(), before, args)
    if isinstance(ended, KeyboardInterrupt):
        return INTERRUPTED_EXIT_CODE
    if ended is not None:
        raise ended
    return 0


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """`timeout`, `docker stop` and batch systems end a program by SIGTERM: as Ctrl-C then."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only that one may say what a signal does
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


Made = tuple[int, Callable[[Callable[[str], None]], "KeepingRun"]]
"""How many steps a run has, and how it is made."""


Before = dict[str, Any] | None


def _bundle_run(args: argparse.Namespace, workload: Workload, before: Before) -> Made:
    from edge_vlm_runtime.bench.run import BenchOptions, BenchRun, total_steps
    from edge_vlm_runtime.bench.trace import Trace, nvtx_range

    trace = None
    if args.trace is not None or args.nvtx:
        trace = args.tracer = Trace(nvtx_range() if args.nvtx else None)
    options = BenchOptions(
        bundle=args.bundle,
        workload=workload,
        command=command_line(args),
        threads=args.threads,
        trace=trace,
        by_layer=args.layers,
        is_any_context=args.context is None,
        before=before,
        **backend_options(args),
    )
    return total_steps(workload), partial(BenchRun, options)


def _served_run(args: argparse.Namespace, workload: Workload, before: Before) -> Made:
    """Raises ConfigError for what only a bundle on this machine can be asked for."""
    foreign = {
        "BUNDLE": args.bundle != DEMO_BUNDLE,
        "--context": args.context is not None,
        "--engines": args.engines is not None,
        "--calibration": args.calibration is not None,
        "--layers": args.layers,
        "--trace": args.trace is not None,
        "--nvtx": args.nvtx,
    }
    asked = [name for name, is_given in foreign.items() if is_given]
    if asked:
        raise ConfigError(
            f"{', '.join(asked)} with a server elsewhere", remedy="leave out --url, or those"
        )
    from edge_vlm_runtime.bench.links import Served
    from edge_vlm_runtime.bench.served import ServedOptions, ServedRun, total_steps

    options = ServedOptions(
        served=Served(args.url, access_of(args)),
        workload=workload,
        command=command_line(args),
        before=before,
    )
    return total_steps(workload), partial(ServedRun, options)


def command_line(args: argparse.Namespace) -> str:
    """What makes the result again, without the places of one machine."""
    words = ["edge-vlm bench"]
    if args.url is not None:
        words.append("--url ADDRESS")
    elif args.bundle != DEMO_BUNDLE:
        words.append(shlex.quote(args.bundle.name))
    for option in [
        *options_of(BenchArguments),
        *options_of(BundleOptions, only=("threads", "backend", "calibration")),
    ]:
        value = getattr(args, option.key)
        if value != option.default:
            value = Path(value).name if option.key in ("source", "calibration") else value
            words.append(f"--{option.key.replace('_', '-')} {shlex.quote(str(value))}")
    words += [f"--{name}" for name in ("layers", "nvtx") if getattr(args, name)]
    return " ".join(words)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A function to be told of each of `total` steps as it begins: a bar on a terminal, else a line
    each on standard error. Raises MissingExtraError."""
    from edge_vlm.console.progress import Progress

    if not sys.stderr.isatty():

        def line(text: str) -> None:
            print(text, file=sys.stderr, flush=True)

        yield line
        return
    with Progress("bench", total) as bar:
        begun = 0

        def advance(text: str) -> None:
            nonlocal begun
            bar.total = max(total, begun + 1)
            bar.at(begun, text)
            begun += 1

        yield advance


def _write(record: dict[str, Any], before: dict[str, Any] | None, args: argparse.Namespace) -> None:
    from edge_vlm_runtime.bench.compare import comparison
    from edge_vlm_runtime.bench.record import as_json
    from edge_vlm_runtime.bench.report import as_csv, as_markdown

    failed: list[ConfigError] = []
    if args.json is not None:
        with _kept(failed, args.json):
            args.json.write_text(as_json(record), encoding="utf-8")
    if args.trace is not None and (trace := getattr(args, "tracer", None)) is not None:
        with _kept(failed, args.trace):
            trace.write(args.trace)
        if trace.left_out:
            print(f"the trace leaves out the last {trace.left_out} runs", file=sys.stderr)
    forms = {"md": as_markdown, "json": as_json, "csv": as_csv}
    print(forms[args.output](record), end="")
    if before is not None:
        out = sys.stdout if args.output == "md" else sys.stderr
        print("\n" + "\n".join(comparison(before, record)), file=out)
    sys.stdout.flush()
    if failed:
        raise failed[0]


@contextmanager
def _kept(failed: list[ConfigError], path: Path) -> Iterator[None]:
    """A file that cannot be written keeps no other result back."""
    try:
        yield
    except OSError as error:
        failed.append(ConfigError(f"cannot be written: {error.strerror}", where=path))


bench = Command(
    add_arguments=_arguments,
    run=_run,
)
