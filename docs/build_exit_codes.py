"""Writes the page of exit codes: `python -m docs.build_exit_codes docs/exit-codes.md`."""

from __future__ import annotations

import sys
from pathlib import Path

from edge_vlm.console.exit_codes import as_markdown


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m docs.build_exit_codes FILE", file=sys.stderr)
        return 2
    Path(arguments[0]).write_text(as_markdown(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
