"""`edge-vlm data check`: says what is wrong with training data before a run finds out."""

from __future__ import annotations

import argparse
from pathlib import Path

from edge_vlm.cli import Command
from edge_vlm.errors import ConfigError, DataError, EdgeVlmError

_SHOWN = 20


def _arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check", help="read every record and every video, print what is wrong and the counts"
    )
    check.add_argument("source", type=Path, help="a JSONL file or a folder of records")
    check.add_argument("--fps", type=float, default=2.0, help="pictures a second (default: 2)")
    check.add_argument(
        "--max-frames", type=int, default=64, help="most pictures of a clip (default: 64)"
    )
    check.add_argument(
        "--no-decode", action="store_true", help="read the videos' times only, decode no picture"
    )
    check.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="measure tokens with this tokenizer.json"
    )
    check.add_argument(
        "--cells", type=int, default=81, help="cells a frame of the model (default: 81)"
    )
    check.add_argument(
        "--max-tokens", type=int, default=9686, help="tokens of a packed row (default: 9686)"
    )
    check.add_argument(
        "--row-frames", type=int, default=128, help="frames of a packed row (default: 128)"
    )
    share = check.add_mutually_exclusive_group()
    share.add_argument(
        "--keep-ratio", type=float, default=0.5, help="share of cells kept (default: 0.5)"
    )
    share.add_argument("--removed", type=float, help="the same as the share removed")
    check.add_argument("--json", action="store_true", help="print JSON instead of text")


def _run(args: argparse.Namespace) -> int:
    from edge_vlm.pixels.sampling import FrameRule
    from edge_vlm_training.data.check import Lengths, check_records, describe
    from edge_vlm_training.data.packing.row_stream import PackingConfig

    keep_ratio = args.keep_ratio if args.removed is None else 1 - args.removed
    try:
        sampling = FrameRule(max_fps=args.fps, num_frames=args.max_frames)
        packing = PackingConfig(
            max_tokens=args.max_tokens, max_frames=args.row_frames, keep_ratio=(keep_ratio,)
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    lengths = None
    if args.tokenizer is not None:
        from edge_vlm.text.prompt import PromptFormat
        from edge_vlm.text.tokenizer import Tokenizer

        try:
            prompt = PromptFormat(Tokenizer.from_file(args.tokenizer))
        except KeyError as error:
            raise ConfigError(f"not a vocabulary of ours: {error}", where=args.tokenizer) from None
        lengths = Lengths(prompt, packing, args.cells)
    shown: list[str] = []

    def on_bad(error: EdgeVlmError) -> None:
        shown.append(error.code)
        if len(shown) <= _SHOWN and not args.json:
            print(f"{error.code}: {error}")

    findings = check_records(
        args.source, sampling, decode=not args.no_decode, lengths=lengths, on_bad=on_bad
    )
    if len(shown) > _SHOWN and not args.json:
        print(f"... and {len(shown) - _SHOWN} more")
    report = describe(args.source, findings, lengths)
    print(report.json() if args.json else report.text())
    if findings.bad:
        raise DataError(
            f"{len(findings.bad)} of {findings.records} records cannot be used",
            where=args.source,
            remedy="mend them, or train with `--set skip_bad=true`, which counts and reports them",
        )
    return 0


data = Command(
    add_arguments=_arguments,
    run=_run,
)
