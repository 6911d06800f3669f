"""`edge-vlm serve`. What it needs is imported when it runs."""

from __future__ import annotations

import argparse
import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_vlm.cli import Command
from edge_vlm.errors import ConfigError
from edge_vlm_runtime.cli.common.alerts import AlertRoutes, alert_outputs
from edge_vlm_runtime.cli.common.config import configured, read_tables, read_toml
from edge_vlm_runtime.cli.common.options import serve_options, server_options
from edge_vlm_runtime.cli.common.shared import print_notes
from edge_vlm_runtime.engines.names import Backend, backend_options

if TYPE_CHECKING:
    from edge_vlm_runtime.cameras.config import CameraPlan
    from edge_vlm_runtime.cameras.keeper import CameraFile
    from edge_vlm_runtime.server.app import Server


def _serve(args: argparse.Namespace) -> int:
    from edge_vlm_runtime.server.access.repeated_lines import quiet
    from edge_vlm_runtime.server.app import Server

    handler = logging.StreamHandler()
    quiet(handler)
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[handler],
    )
    cameras = _cameras(args)
    routes = AlertRoutes(cameras.plan)
    with alert_outputs(args, routes) as outputs:
        with Server.open(
            args.bundle,
            threads=args.threads,
            cameras=cameras,
            on_event=None if outputs is None else outputs.put,
            **backend_options(args),
            **server_options(args),
        ) as server:
            server.on_plan(routes.planned)
            gc.collect()
            gc.freeze()  # or each whole collection would look at all that lives until the end
            gc.collect()  # the next whole one comes when a quarter of what this one leaves is new
            if Backend(args.backend) in (Backend.OPENVINO, Backend.AUTO):
                print_notes([server.runs_on])
            print_notes(server.notes)
            where = f"{server.page_url}  (clients: {server.url})"
            begin = "\n".join([f"serving {args.bundle} at {where}", *cameras.plan.lines()])
            with _home_assistant(args, server):
                server.serve(lambda: print(begin, flush=True))
        print("stopped", flush=True)
    return 0


@contextmanager
def _home_assistant(args: argparse.Namespace, server: Server) -> Iterator[None]:
    """If its broker was named. Raises ConfigError, MissingExtraError."""
    if args.home_assistant is None:
        yield
        return
    from edge_vlm_runtime.alert_sinks.evidence import EvidenceSize
    from edge_vlm_runtime.server.streams.home_assistant import told_to_home_assistant

    if not server.has_cameras:
        print_notes(["Home Assistant is told of cameras alone, and there is no [[camera]] yet"])
    with told_to_home_assistant(
        server,
        args.home_assistant,
        node=args.node,
        discovery_prefix=args.discovery_prefix,
        evidence=EvidenceSize(args.evidence),
    ):
        yield


def _cameras(args: argparse.Namespace) -> CameraFile:
    """Those of the file. Raises ConfigError."""
    from edge_vlm_runtime.cameras.config import CameraPlan, read_plan
    from edge_vlm_runtime.cameras.keeper import CameraFile

    file, tables = read_tables(args, os.environ)
    if file is None:
        return CameraFile(plan=CameraPlan())
    others = _others(file)

    def read() -> CameraPlan:
        nonlocal others
        if not read_toml(file):  # an editor may be about to write it: no camera ends for that
            raise ConfigError(
                "the file is empty", where=file, remedy="for no camera at all write camera = []"
            )
        plan = read_plan(read_tables(args, os.environ)[1], file)
        before, others = others, _others(file)
        keys = sorted(key for key in {*before, *others} if before.get(key) != others.get(key))
        if keys:
            logging.getLogger(__name__).warning(
                "%s: what changed in %s counts from the next start", file, ", ".join(keys)
            )
        return plan

    return CameraFile(plan=read_plan(tables, file), path=file, read=read, hwaccel=args.hwaccel)


def _others(file: Path) -> dict[str, Any]:
    """What is not read anew while the server runs."""
    return {key: value for key, value in read_toml(file).items() if key not in ("alert", "camera")}


serve = configured(
    Command(
        add_arguments=lambda parser: parser.set_defaults(has_tables=True),
        run=_serve,
    ),
    serve_options,
    is_printed=True,
)
