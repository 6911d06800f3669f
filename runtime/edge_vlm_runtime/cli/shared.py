"""Options and steps that `serve`, `watch`, `ask` and `demo` have in common."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.engines.names import add_backend_arguments, backend_options

if TYPE_CHECKING:
    from edge_vlm_runtime.client.run import Outcome
    from edge_vlm_runtime.sources.container import Source

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
        type=positive_int,
        default=min(4, os.cpu_count() or 1),
        help="threads of the engines (default: %(default)s)",
    )
    add_backend_arguments(parser)


def add_settings_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep-ratio", type=float, metavar="R", help="share of cells kept, (0, 1]")
    parser.add_argument(
        "--tokens-per-second",
        type=positive_float,
        metavar="N",
        help="vision tokens per second of video instead of a share",
    )
    parser.add_argument(
        "--attention", help="how the video is remembered: frame, exact or last_n (the model's own)"
    )
    parser.add_argument("--policy", help="how cells are chosen, see docs/pruning.md")
    parser.add_argument("--fps", type=positive_float, help="pictures a second (default: model's)")
    parser.add_argument("--max-answer-tokens", type=positive_int, metavar="N")
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


@contextmanager
def server_url(args: argparse.Namespace, record_to: Path | None = None) -> Iterator[str]:
    """The URL that was given, or that of a server of our own on a free loopback port."""
    if args.url is not None:
        yield args.url
        return
    from edge_vlm.errors import MissingExtraError

    try:
        from edge_vlm_runtime.server.app import Server
    except MissingExtraError as error:
        raise error.widened("ort") from error

    options = {"threads": args.threads, "record_to": record_to, **backend_options(args)}
    with Server.open(args.bundle, **options) as server:
        server.start()
        yield server.url


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
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


async def open_for(open_it: Any, text: str, fps: float | None, client: Any) -> Source:
    """Opened off the event loop: a camera may take seconds. The rate is the model's by default."""
    return await asyncio.to_thread(open_it, text, fps or client.created.settings.fps_cap)


def finish(outcome: Outcome) -> int:
    """Raises the first thing that went wrong; everything else has been shown by then."""
    if outcome.first_error is not None:
        raise outcome.first_error
    return 0


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value
