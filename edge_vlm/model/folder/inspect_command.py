"""`edge-vlm inspect`: what a folder holds.

A folder tells by its files what it is. Torch is loaded only for a folder of weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_vlm.cli import Command
from edge_vlm.formats.bundle import MANIFEST
from edge_vlm.formats.inspect_bundle import describe_bundle
from edge_vlm.formats.report import Report
from edge_vlm.model.published.files import require_folder


def describe(folder: Path, tokenizer: Path | None = None) -> Report:
    """Raises the typed error of whatever is wrong with the folder."""
    if (folder / MANIFEST).is_file():
        return describe_bundle(folder)
    require_folder(folder)
    from edge_vlm.model.folder.describe import describe_weights

    return describe_weights(folder, tokenizer)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder",
        type=Path,
        help="a bundle, a checkpoint, a published Molmo2 folder or one of its training repository",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="vocabulary to check against the weights"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _run(args: argparse.Namespace) -> int:
    report = describe(args.folder, args.tokenizer)
    print(report.json() if args.json else report.text())
    return 0


inspect = Command(
    add_arguments=_add_arguments,
    run=_run,
)
