"""Options and steps that `serve`, `watch`, `ask` and `demo` have in common."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edge_vlm.config import MOST_FPS
from edge_vlm.errors import ConfigError
from edge_vlm_runtime.cli.common.options import own_limits
from edge_vlm_runtime.engines.names import backend_options

OWN_MESSAGE_BYTES = 64 << 20
"""Of a server of our own: a raw picture of 4096x4096, the largest that is sent."""

if TYPE_CHECKING:
    from edge_vlm_runtime.client.client import Client
    from edge_vlm_runtime.client.run import Outcome
    from edge_vlm_runtime.protocol.typed import Settings
    from edge_vlm_runtime.sources.container import Source


@contextmanager
def server_url(args: argparse.Namespace, record_to: Path | None = None) -> Iterator[str]:
    """The URL that was given, or that of a server of our own on a free loopback port."""
    if args.url is not None:
        if getattr(args, "calibration", None) is not None:
            raise ConfigError(
                "--calibration is for a server of our own: this one has its settings already",
                where=args.url,
                remedy="give --calibration to `edge-vlm serve`",
            )
        yield args.url
        return
    from edge_vlm.errors import MissingExtraError

    try:
        from edge_vlm_runtime.server.app import Server
    except MissingExtraError as error:
        raise error.widened("ort") from error

    limits = dataclasses.replace(own_limits(args), max_message_bytes=OWN_MESSAGE_BYTES)
    options = {
        "threads": args.threads,
        "record_to": record_to,
        "limits": limits,
        **backend_options(args),
    }
    with Server.open(args.bundle, **options) as server:
        server.start()
        yield server.url


async def take_offline_policy(args: argparse.Namespace, client: Client) -> None:
    """For a finished file: what the weights were published with, unless a policy or a budget by
    time was asked for, here or of the server."""
    from edge_vlm_runtime.protocol.settings import SessionSettings

    wanted, settings = client.created.model.limits.offline_policy, client.settings
    is_open = args.policy is None and settings.policy == SessionSettings.policy
    if wanted != settings.policy and is_open and not settings.vision_tokens_per_s:
        await client.update(cast("Settings", {"policy": wanted}))


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        action="store_true",
        help="print every event as a line of JSON, see docs/python.md",
    )


def print_notes(notes: Sequence[str]) -> None:
    """What is to be known of the settings, beside the answers."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)


def own_session(args: argparse.Namespace, record_to: Path | None = None) -> Settings:
    """Settings of a session on a server of our own: its pictures are handed over as they are. A
    recording keeps what was sent, and raw pictures would make it ten times as large."""
    return {"raw_frames": args.url is None and record_to is None}


async def open_for(open_it: Any, text: str, fps: float | None, client: Any) -> Source:
    """Opened off the event loop: a camera may take seconds. The rate is the model's by default."""
    if fps is not None and not 0 < fps <= MOST_FPS:
        raise ConfigError(f"must be in (0, {MOST_FPS:g}], got {fps!r}", where="--fps")
    return await asyncio.to_thread(open_it, text, fps or client.created.settings.fps_cap)


def finish(outcome: Outcome) -> int:
    """Raises the first thing that went wrong; everything else has been shown by then."""
    if outcome.first_error is not None:
        raise outcome.first_error
    return 0


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def not_negative_float(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value
