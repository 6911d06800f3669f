"""`edge-vlm doctor`: whether this machine can serve, and what closes each gap."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING

from edge_vlm.cli import Command
from edge_vlm.console.output import obeyed, visible_lines
from edge_vlm.console.tables import columns
from edge_vlm_runtime.cli.common.config import configured
from edge_vlm_runtime.cli.common.options import bundle_options, serve_options
from edge_vlm_runtime.engines.names import Backend

if TYPE_CHECKING:
    from edge_vlm_runtime.doctor.machine import Check

GREEN, YELLOW, DIM, BROKEN = "32", "33", "2", "1;31"
COLOURS = {
    **{"ok": GREEN, "not needed": DIM, "missing": YELLOW, "wrong": YELLOW},
    **{"this machine can serve": GREEN, "this machine cannot serve": BROKEN},
}
"""By the begin of a line."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run(args: argparse.Namespace) -> int:
    from edge_vlm_runtime.doctor.doctor import examine
    from edge_vlm_runtime.doctor.machine import Machine, Plan

    plan = Plan(
        bundle=args.bundle,
        backend=Backend(args.backend),
        engines=args.engines,
        threads=args.threads,
        calibration=args.calibration,
    )
    checks = examine(plan, Machine())
    if args.json:
        print(as_json(checks))
    else:
        text = as_text(checks, plan.backend)
        if wants_colour():
            print(coloured(visible_lines(text)), file=obeyed(sys.stdout))
        else:
            print(text)
    return exit_code(checks)


def exit_code(checks: list[Check]) -> int:
    """1 if something that serving needs is missing or wrong."""
    return 1 if any(check.is_broken for check in checks) else 0


def as_text(checks: list[Check], backend: Backend) -> str:
    rows = []
    for check in checks:
        mark = "  <- needed" if check.is_broken else ""
        rows.append((check.shown, check.name, " ".join(check.text.split()) + mark))
        if check.fix is not None:
            word = "fix" if check.shown == check.state.value else "to have it"
            rows.append(("", "", f"{word}: {check.fix}"))
    broken = [check.name for check in checks if check.is_broken]
    verdict = "cannot serve" if broken else "can serve"
    why = f": {', '.join(broken)}" if broken else ""
    return "\n".join(
        [*columns(rows), f"this machine {verdict} with --backend {backend.value}{why}"]
    )


def coloured(text: str) -> str:
    """For a terminal: the state at the begin of each line in its colour, and the verdict."""
    lines = text.splitlines()
    for place, line in enumerate(lines):
        word = next((word for word in COLOURS if line.startswith(word)), None)
        if word is not None:
            colour = BROKEN if line.endswith("<- needed") else COLOURS[word]
            lines[place] = f"\033[{colour}m{word}\033[0m{line[len(word) :]}"
    return "\n".join(lines)


def wants_colour() -> bool:
    """A terminal that takes it, and nobody who asked for none (no-color.org)."""
    is_dumb = os.environ.get("TERM") in (None, "dumb")
    return sys.stdout.isatty() and not is_dumb and not os.environ.get("NO_COLOR")


def as_json(checks: list[Check]) -> str:
    return json.dumps(
        {
            "can_serve": exit_code(checks) == 0,
            "checks": [
                {**dataclasses.asdict(check), "state": check.state.value} for check in checks
            ],
        },
        indent=1,
    )


doctor = configured(
    Command(
        add_arguments=_arguments,
        run=_run,
    ),
    bundle_options,
    file_of=serve_options,
)
