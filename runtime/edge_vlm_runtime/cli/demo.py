"""`edge-vlm demo`. What it needs is imported when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_vlm.cli import Command
from edge_vlm_runtime.cli.common.options import add_bundle_arguments
from edge_vlm_runtime.cli.common.shared import not_negative_float
from edge_vlm_runtime.client.address import DEFAULT_PORT
from edge_vlm_runtime.demo.paths import DEMO_FOLDER


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    add_bundle_arguments(parser)
    parser.add_argument(
        "--clip",
        type=Path,
        default=DEMO_FOLDER,
        metavar="FOLDER",
        help="folder with clip.mp4 and clip.json (default: a held-out clip of the demo's world)",
    )
    parser.add_argument(
        "--street",
        type=not_negative_float,
        default=0.0,
        metavar="SECONDS",
        help="afterwards show the demo street for so long, and ask about it (default: 0)",
    )
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="port of the browser page")
    parser.add_argument("--exit", action="store_true", help="do not keep serving at the end")


def _demo(args: argparse.Namespace) -> int:
    from edge_vlm_runtime.demo.run import run_demo

    return run_demo(args)


demo = Command(
    add_arguments=_demo_arguments,
    run=_demo,
)
