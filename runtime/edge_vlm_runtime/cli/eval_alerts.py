"""`edge-vlm eval-alerts`: footage with known events through the served path, rules side by side."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import edge_vlm
from edge_vlm.cli import Command
from edge_vlm.console.output import obeyed
from edge_vlm.console.paths import output_file
from edge_vlm.errors import ConfigError
from edge_vlm_runtime.cli.common.options import add_bundle_arguments, add_url_argument, address_of
from edge_vlm_runtime.cli.common.shared import server_url

if TYPE_CHECKING:
    from edge_vlm_runtime.evaluation.alerts import RuleOf
    from edge_vlm_runtime.protocol.typed import Settings

DEFAULT_RULES = ("0.5:0.5", "0.7:0.4", "0.7:0.4:0.5", "0.9:0.5", "0.9:0.5:0.5:0.5")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "footage", type=Path, help="folder written by `edge-vlm world --events`, or one's own"
    )
    add_url_argument(parser)
    parser.add_argument(
        "--at",
        action="append",
        metavar="ON:OFF[:HOLD[:CLEAR_HOLD[:COOLDOWN]]]",
        dest="rules",
        help="thresholds and seconds, or the word calibrated: for each question those that the "
        "file of --calibration has for it; may be repeated (default: "
        f"{' '.join(DEFAULT_RULES)})",
    )
    parser.add_argument(
        "--slack",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="how far outside its times an event may be noticed, as `calibrate` has it (0)",
    )
    parser.add_argument("--keep-ratio", type=float, metavar="R", help="share of cells kept, (0, 1]")
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write the figures there as well"
    )
    add_bundle_arguments(parser)


def _run(args: argparse.Namespace) -> int:
    if not 0 <= args.slack <= 3600:
        raise ConfigError("--slack must be in 0..3600")
    rules = {text: _rule(text, args.calibration) for text in args.rules or DEFAULT_RULES}
    args.url = address_of(args)
    with server_url(args) as url:
        return asyncio.run(_evaluate(args, url, rules))


def _rule(text: str, calibration: Path | None) -> RuleOf:
    from edge_vlm_runtime.evaluation.alerts import CALIBRATED, calibrated_rules, parse_rule

    if text == CALIBRATED:
        return calibrated_rules(calibration).get
    rule = parse_rule(text)
    return lambda question: rule


async def _evaluate(args: argparse.Namespace, url: str, rules: Mapping[str, RuleOf]) -> int:
    from edge_vlm.formats.alert_set import read_event_set
    from edge_vlm_runtime.evaluation.alerts import CALIBRATED, evaluate_alerts, table

    def progress(number: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{number} stretches of footage", end="", file=obeyed(sys.stderr), flush=True)

    settings: Settings = {} if args.keep_ratio is None else {"keep_ratio": args.keep_ratio}
    if CALIBRATED in rules:
        parts = read_event_set(args.footage)
        asked = {watch.question for part in parts for watch in part.watches}
        if missing := sorted(text for text in asked if rules[CALIBRATED](text) is None):
            print(
                f"edge-vlm: {len(missing)} of {len(asked)} questions of the footage have no "
                f"calibrated rule and are left out of that line: {', '.join(missing)}",
                file=sys.stderr,
            )
    footage = read_event_set(args.footage)
    scores = await evaluate_alerts(url, footage, rules, settings, progress, args.slack)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(table(scores))
    if args.json is not None:
        keep = "" if args.keep_ratio is None else f" --keep-ratio {args.keep_ratio:g}"
        record = {
            "command": f"edge-vlm eval-alerts {args.footage.name}{keep}"
            + (f" --slack {args.slack:g}" if args.slack else "")
            + "".join(f" --at {text}" for text in rules),
            "version": edge_vlm.__version__,
            "bundle": args.bundle.name if args.url is None else args.url,
            "rules": {name: score.to_dict() for name, score in scores.items()},
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


evaluate_alerts = Command(
    add_arguments=_arguments,
    run=_run,
)
