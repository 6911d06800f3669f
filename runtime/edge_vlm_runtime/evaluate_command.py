"""`edge-vlm eval`: a question set through the served path, policies side by side."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import edge_vlm
from edge_vlm.cli import Command
from edge_vlm.errors import ConfigError
from edge_vlm_runtime.commands import add_bundle_arguments, server_url

HEADLINE = ("presence", "name", "colour", "count", "direction", "when", "where")
"""Kinds in the headline mean; the others are reported beside it."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("questions", type=Path, help="folder written by `edge-vlm world`")
    parser.add_argument("--url", help="a running server (default: one of its own)")
    parser.add_argument(
        "--run",
        action="append",
        metavar="POLICY:KEEP",
        dest="runs",
        help="policy and keep ratio, may be repeated (default: stream:0.5 and random:0.5)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    add_bundle_arguments(parser)


def _run(args: argparse.Namespace) -> int:
    runs = [_parse(text) for text in args.runs or ("stream:0.5", "random:0.5")]
    with server_url(args) as url:
        return asyncio.run(_evaluate(args, url, runs))


def _parse(text: str) -> tuple[str, float]:
    policy, _, keep = text.partition(":")
    try:
        return policy, float(keep)
    except ValueError:
        raise ConfigError(
            f"cannot read --run {text!r}", remedy="write POLICY:KEEP, for example stream:0.5"
        ) from None


async def _evaluate(args: argparse.Namespace, url: str, runs: list[tuple[str, float]]) -> int:
    from edge_vlm.question_set import read_question_set
    from edge_vlm_runtime.evaluate import Result, evaluate, table

    def progress(number: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{number} clips", end="", file=sys.stderr, flush=True)

    results: dict[str, Result] = {}
    for policy, keep_ratio in runs:
        settings: dict[str, Any] = {"policy": policy, "keep_ratio": keep_ratio}
        clips = read_question_set(args.questions)
        results[f"{policy} {keep_ratio:g}"] = await evaluate(url, clips, settings, progress)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    kinds = {kind for result in results.values() for kind in result.kinds}
    print(table(results, [kind for kind in HEADLINE if kind in kinds] or sorted(kinds)))
    if args.json is not None:
        record = {
            "command": f"edge-vlm eval {args.questions.name} "
            + " ".join(f"--run {policy}:{keep:g}" for policy, keep in runs),
            "version": edge_vlm.__version__,
            "bundle": args.bundle.name if args.url is None else args.url,
            "runs": {name: result.to_dict() for name, result in results.items()},
            "wrong": {name: result.wrong for name, result in results.items()},
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


evaluate = Command(
    name="eval",
    help="measure a bundle on a question set through the served path",
    add_arguments=_arguments,
    run=_run,
)
