"""`edge-vlm serve`, `watch`, `ask` and `demo`. What they need is imported when they run."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_vlm.cli import Command
from edge_vlm.errors import ConfigError
from edge_vlm_runtime.alert_command import (
    add_alert_arguments,
    add_output_arguments,
    alert_handlers,
    alert_outputs,
    alert_summary,
    create_alerts,
    tell_all,
)
from edge_vlm_runtime.backends.names import add_backend_arguments, backend_options
from edge_vlm_runtime.configuration import configured
from edge_vlm_runtime.server_options import (
    access_of,
    add_access_arguments,
    add_record_argument,
    add_server_arguments,
    default_limits,
    server_limits,
    server_options,
)

if TYPE_CHECKING:
    from edge_vlm_runtime.outputs import AlertOutputs
    from edge_vlm_runtime.sources import Source
    from edge_vlm_runtime.streaming import Outcome, PlannedQuestion

DEMO_FOLDER = Path(__file__).parent / "demo"
DEMO_BUNDLE = DEMO_FOLDER / "bundle"
DEFAULT_PORT = 8765
OWN_SERVER_KEYS = ("bundle", "threads", "backend", "engines")
"""What variables and files say about the server that `watch` and `ask` start."""


def add_bundle_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bundle",
        type=Path,
        default=DEMO_BUNDLE,
        metavar="FOLDER",
        help="exported model (default: the small demo model, which knows only its rendered world)",
    )
    parser.add_argument(
        "--threads",
        type=_positive_int,
        default=min(4, os.cpu_count() or 1),
        help="threads of the engines (default: %(default)s)",
    )
    add_backend_arguments(parser)


def _add_settings_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep-ratio", type=float, metavar="R", help="share of cells kept, (0, 1]")
    parser.add_argument(
        "--tokens-per-second",
        type=_positive_float,
        metavar="N",
        help="vision tokens per second of video instead of a share",
    )
    parser.add_argument(
        "--attention", help="how the video is remembered: frame, exact or last_n (the model's own)"
    )
    parser.add_argument("--policy", help="how cells are chosen, see docs/pruning.md")
    parser.add_argument("--fps", type=_positive_float, help="pictures a second (default: model's)")
    parser.add_argument("--max-answer-tokens", type=_positive_int, metavar="N")
    parser.add_argument(
        "--instructions", metavar="TEXT", help="what holds for every answer, put before questions"
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="draw answers at random (0: the likeliest)"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="from the likeliest words only, (0, 1]"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the draws (default: 0)")


# ---- serve -----------------------------------------------------------------------------------


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="0 takes a free one (%(default)s)"
    )
    parser.add_argument(
        "--max-sessions", type=_positive_int, metavar="N", help="viewers at the same time (4)"
    )
    add_output_arguments(parser)
    add_server_arguments(parser)


def _serve(args: argparse.Namespace) -> int:
    import logging

    from edge_vlm_runtime.server import Server

    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    with alert_outputs(args) as outputs:
        with Server.open(
            args.bundle,
            host=args.host,
            port=args.port,
            threads=args.threads,
            limits=server_limits(args),
            on_event=None if outputs is None else outputs.put,
            **backend_options(args),
            **server_options(args),
        ) as server:
            print(
                f"serving {args.bundle} at {server.page_url}  (clients: {server.url})", flush=True
            )
            server.serve()
        print("stopped", flush=True)
    return 0


# ---- watch -----------------------------------------------------------------------------------


def _watch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url", nargs="?", help="ws://HOST:PORT/v1/realtime (default: a server of its own)"
    )
    parser.add_argument(
        "--source",
        required=True,
        metavar="SOURCE",
        help="a video file, webcam, webcam:1, rtsp://..., csi or gst:PIPELINE",
    )
    parser.add_argument(
        "--ask",
        action="append",
        default=[],
        metavar="[SECONDS@]TEXT",
        help="a question, asked at that second of the source or at its end; may be repeated",
    )
    parser.add_argument(
        "--snapshot-ask",
        action="append",
        default=[],
        metavar="[SECONDS@]TEXT",
        help="the same about the newest picture alone, in full detail: to read a label",
    )
    parser.add_argument(
        "--every", type=_positive_float, metavar="SECONDS", help="ask again and again"
    )
    parser.add_argument(
        "--fast", action="store_true", help="a file as fast as it is processed, not in real time"
    )
    add_bundle_arguments(parser)
    _add_settings_arguments(parser)
    add_alert_arguments(parser)
    add_access_arguments(parser)
    add_record_argument(parser, "FILE.evlm", "record the session (with a server of its own only)")


def _watch(args: argparse.Namespace) -> int:
    from edge_vlm_runtime.streaming import parse_question

    questions = [parse_question(text, args.every) for text in args.ask]
    questions += [parse_question(text, args.every, "snapshot") for text in args.snapshot_ask]
    if args.record is not None and args.url is not None:
        raise ConfigError(
            "a session is recorded by its server", remedy="give --record to `edge-vlm serve`"
        )
    with alert_outputs(args) as outputs, server_url(args, record_to=args.record) as url:
        return asyncio.run(_watch_session(args, url, questions, outputs))


async def _watch_session(
    args: argparse.Namespace,
    url: str,
    questions: list[PlannedQuestion],
    outputs: AlertOutputs | None,
) -> int:
    from edge_vlm_runtime.client import Client
    from edge_vlm_runtime.sources import mask_credentials, open_source
    from edge_vlm_runtime.streaming import Outcome, stream
    from edge_vlm_runtime.view import make_view, summary_line

    outcome = Outcome()
    access = access_of(args)
    async with await Client.connect(url, _settings_of(args), access=access) as client:
        source = await _open_source(open_source, args.source, args.fps, client)
        await client.update({"delivery": "live" if source.is_live else "wait"})
        title = f"{mask_credentials(args.source)} on {client.created.model.bundle}"
        with make_view(client.created.model.limits.cell_grid, title) as view:
            client.on_event = tell_all(
                view.event, *alert_handlers(args, client.created.session_id, outputs)
            )
            await create_alerts(args, client)
            try:
                await stream(
                    source,
                    client,
                    questions,
                    real_time=not args.fast,
                    observer=view,
                    outcome=outcome,
                )
            except asyncio.CancelledError:
                if not source.is_live:
                    raise  # Ctrl-C is how a live source ends, but it cuts a file short
            alerts = await client.alerts() if args.alerts else []
    for status in alerts:
        print(alert_summary(status))
    print(summary_line(outcome))
    return _finish(outcome)


# ---- ask -------------------------------------------------------------------------------------


def _ask_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", help="a video file")
    parser.add_argument("question")
    parser.add_argument(
        "--detail",
        choices=("video", "snapshot", "both"),
        default="video",
        help="what is looked at: the video, its last picture alone in full detail, or the video "
        "and that picture (default: %(default)s)",
    )
    parser.add_argument("--url", help="a running server (default: one of its own)")
    add_bundle_arguments(parser)
    _add_settings_arguments(parser)
    add_access_arguments(parser)


def _ask(args: argparse.Namespace) -> int:
    with server_url(args) as url:
        return asyncio.run(_ask_session(args, url))


async def _ask_session(args: argparse.Namespace, url: str) -> int:
    from edge_vlm_runtime.client import Answer, Client
    from edge_vlm_runtime.sources import FileSource
    from edge_vlm_runtime.streaming import PlannedQuestion, stream
    from edge_vlm_runtime.view import answer_times, point_lines, snapshot_text

    settings = {**_settings_of(args), "delivery": "wait"}
    async with await Client.connect(url, settings, access=access_of(args)) as client:
        source = await _open_source(FileSource, args.video, args.fps, client)
        question = PlannedQuestion(text=args.question, detail=args.detail)
        outcome = await stream(source, client, [question], real_time=False)
    for _, result in outcome.answers:
        if isinstance(result, Answer):
            print("\n".join([result.text, *point_lines(result)]))
            print(
                f"{outcome.frames_processed} frames, {outcome.cells_kept} of {outcome.cells_seen} "
                f"cells kept{answer_times(result)}{snapshot_text(result)}",
                file=sys.stderr,
            )
    return _finish(outcome)


# ---- demo ------------------------------------------------------------------------------------


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle_arguments(parser)
    parser.add_argument(
        "--clip",
        type=Path,
        default=DEMO_FOLDER,
        metavar="FOLDER",
        help="folder with clip.mp4 and clip.json (default: a held-out clip of the demo's world)",
    )
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="port of the browser page")
    parser.add_argument("--exit", action="store_true", help="do not keep serving at the end")


def _demo(args: argparse.Namespace) -> int:
    from edge_vlm_runtime.demo_command import run_demo

    return run_demo(args)


# ---- shared ----------------------------------------------------------------------------------


@contextmanager
def server_url(args: argparse.Namespace, record_to: Path | None = None) -> Iterator[str]:
    """The URL that was given, or that of a server of our own on a free loopback port."""
    if args.url is not None:
        yield args.url
        return
    from edge_vlm_runtime.server import Server

    options = {"threads": args.threads, "record_to": record_to, **backend_options(args)}
    with Server.open(args.bundle, **options) as server:
        server.start()
        yield server.url


def _settings_of(args: argparse.Namespace) -> dict[str, Any]:
    fields = {
        "keep_ratio": args.keep_ratio,
        "vision_tokens_per_s": args.tokens_per_second,
        "attention": args.attention,
        "policy": args.policy,
        "fps_cap": args.fps,
        "max_answer_tokens": args.max_answer_tokens,
        "instructions": args.instructions,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
    }
    return {name: value for name, value in fields.items() if value is not None}


async def _open_source(open_it: Any, text: str, fps: float | None, client: Any) -> Source:
    """Opened off the event loop: a camera may take seconds. The rate is the model's by default."""
    return await asyncio.to_thread(open_it, text, fps or client.created.settings.fps_cap)


def _finish(outcome: Outcome) -> int:
    """Raises the first thing that went wrong; everything else has been shown by then."""
    if outcome.first_error is not None:
        raise outcome.first_error
    return 0


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


serve = configured(
    Command(
        name="serve",
        help="serve a bundle over a websocket, with a browser page",
        add_arguments=_serve_arguments,
        run=_serve,
    ),
    unset=default_limits,
)
watch = configured(
    Command(
        name="watch",
        help="stream a file, webcam or RTSP camera to a server and ask questions",
        add_arguments=_watch_arguments,
        run=_watch,
    ),
    keys=OWN_SERVER_KEYS,
    file_of=_serve_arguments,
)
ask = configured(
    Command(
        name="ask",
        help="ask one question about one video file",
        add_arguments=_ask_arguments,
        run=_ask,
    ),
    keys=OWN_SERVER_KEYS,
    file_of=_serve_arguments,
)
demo = Command(
    name="demo",
    help="stream a rendered clip through the demo model and check its answers",
    add_arguments=_demo_arguments,
    run=_demo,
)
