"""`edge-vlm mcp`. What it needs is imported when it runs."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from dataclasses import dataclass, field
from typing import Annotated

from edge_vlm.cli import Command
from edge_vlm.console.options import About
from edge_vlm_runtime.cli.common.arguments import add_options, options_of
from edge_vlm_runtime.cli.common.options import (
    LOOPBACK,
    access_of,
    add_access_arguments,
    address_of,
)
from edge_vlm_runtime.client.address import DEFAULT_PORT
from edge_vlm_runtime.sources.masking import mask_credentials

DEFAULT_MCP_PORT = 8766


@dataclass(frozen=True, kw_only=True)
class McpOptions:
    """How agents come, and what they see."""

    session: Annotated[str | None, About(metavar="ID|NAME")] = None
    """The session or the server's camera that is looked at (default: the only one there is)."""
    http: bool = False
    """Speak streamable HTTP instead of standard input and output."""
    host: Annotated[str, About(metavar="ADDRESS")] = "127.0.0.1"
    """Address to listen on with --http."""
    port: int = DEFAULT_MCP_PORT
    """Port with --http; 0 takes a free one."""
    allowed_host: Annotated[list[str], About(metavar="NAME")] = field(default_factory=list)
    """A name that is answered to with --http, besides those that `serve` answers to; may be
    repeated."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, {"": options_of(McpOptions)})
    add_access_arguments(parser)


def _run(args: argparse.Namespace) -> int:
    from edge_vlm_runtime.client.live_streams import LiveStreams
    from edge_vlm_runtime.mcp.server import serve_http, serve_stdio
    from edge_vlm_runtime.mcp.tools import StreamTools

    access = access_of(args)
    url = address_of(args) or f"localhost:{DEFAULT_PORT}"
    tools = StreamTools(LiveStreams(url, access), args.session)
    if not args.http:
        # The thread that waits for standard input would outlive Ctrl-C; nothing is left to end.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        asyncio.run(serve_stdio(tools))
        return 0
    if access.api_key is None and args.host not in LOOPBACK:
        print(f"edge-vlm: anybody who reaches {args.host} may look and ask", file=sys.stderr)
    asyncio.run(
        serve_http(
            tools,
            host=args.host,
            port=args.port,
            api_key=access.api_key,
            names=args.allowed_host,
            on_start=lambda address: print(
                f"MCP at {address}, about {mask_credentials(url)}", flush=True
            ),
        )
    )
    return 0


mcp = Command(add_arguments=_arguments, run=_run)
