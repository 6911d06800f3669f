"""`edge-vlm serve`. What it needs is imported when it runs."""

from __future__ import annotations

import argparse

from edge_vlm.cli import Command
from edge_vlm_runtime.cli.alerts import alert_outputs
from edge_vlm_runtime.cli.config import configured
from edge_vlm_runtime.cli.options import serve_options, server_options
from edge_vlm_runtime.cli.shared import print_notes
from edge_vlm_runtime.engines.names import Backend, backend_options


def _serve(args: argparse.Namespace) -> int:
    import logging

    from edge_vlm_runtime.server.app import Server

    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    with alert_outputs(args) as outputs:
        with Server.open(
            args.bundle,
            threads=args.threads,
            on_event=None if outputs is None else outputs.put,
            **backend_options(args),
            **server_options(args),
        ) as server:
            if Backend(args.backend) in (Backend.OPENVINO, Backend.AUTO):
                print_notes([server.runs_on])
            print_notes(server.notes)
            where = f"{server.page_url}  (clients: {server.url})"
            server.serve(lambda: print(f"serving {args.bundle} at {where}", flush=True))
        print("stopped", flush=True)
    return 0


serve = configured(
    Command(
        add_arguments=lambda parser: None,
        run=_serve,
    ),
    serve_options,
    is_printed=True,
)
