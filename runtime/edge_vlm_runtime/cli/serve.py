"""`edge-vlm serve`. What it needs is imported when it runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from edge_vlm.cli import Command
from edge_vlm_runtime.cli.alerts import (
    add_output_arguments,
    alert_outputs,
)
from edge_vlm_runtime.cli.config import configured
from edge_vlm_runtime.cli.options import (
    add_server_arguments,
    default_limits,
    server_limits,
    server_options,
)
from edge_vlm_runtime.cli.shared import (
    DEFAULT_PORT,
    add_bundle_arguments,
    positive_int,
)
from edge_vlm_runtime.engines.names import backend_options

if TYPE_CHECKING:
    pass


def serve_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="0 takes a free one (%(default)s)"
    )
    parser.add_argument(
        "--max-sessions", type=positive_int, metavar="N", help="viewers at the same time (4)"
    )
    add_output_arguments(parser)
    add_server_arguments(parser)


def _serve(args: argparse.Namespace) -> int:
    import logging

    from edge_vlm_runtime.server.app import Server

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


serve = configured(
    Command(
        add_arguments=serve_arguments,
        run=_serve,
    ),
    unset=default_limits,
)
