"""Runs a command as `edge-vlm NAME ...` would, in this process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from edge_vlm.cli import Command
from edge_vlm.errors import EdgeVlmError


def command_line(command: Command, arguments: Sequence[str]) -> int:
    """Exit code; a typed error becomes one line on stderr, as `edge_vlm.cli.main` does it."""
    parser = argparse.ArgumentParser(prog="edge-vlm")
    command.add_arguments(parser)
    try:
        return command.run(parser.parse_args(list(arguments)))
    except EdgeVlmError as error:
        print(f"edge-vlm: {error.code}: {error}", file=sys.stderr)
        return error.exit_code
