"""`edge-vlm export` and `edge-vlm verify`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_vlm.cli import Command
from edge_vlm.errors import ConfigError

if TYPE_CHECKING:
    from edge_vlm_export.verify import Comparison


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder with config.json and weights")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the new bundle")
    parser.add_argument("--name", help="name of the model (default: the checkpoint folder's)")
    parser.add_argument(
        "--default",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting the model was made for, e.g. keep_ratio=0.5; may be repeated",
    )
    parser.add_argument("--max-tokens", type=int, help="most new tokens per run of the llm")
    parser.add_argument("--max-past", type=int, help="most past tokens the llm can attend to")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")


def _export(args: argparse.Namespace) -> int:
    from edge_vlm_export.graphs import GraphLimits
    from edge_vlm_export.to_onnx import export_bundle

    given = {"max_tokens": args.max_tokens, "max_past": args.max_past}
    try:
        limits = GraphLimits(**{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise ConfigError(str(error)) from error
    results: list[Comparison] = []
    bundle = export_bundle(
        args.checkpoint,
        args.out,
        name=args.name,
        defaults=dict(_setting(text) for text in args.default),
        limits=limits,
        overwrite=args.overwrite,
        on_compared=results.append,
    )
    _print_results(results, "torch")
    size_mb = sum(file.stat().st_size for file in bundle.path.rglob("*") if file.is_file()) / 1e6
    print(f"bundle {bundle.name}: {bundle.path} ({size_mb:.1f} MB)")
    return 0


def _setting(text: str) -> tuple[str, Any]:
    """`key=value`; a value that is not JSON is a string."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ConfigError(f"--default {text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    parser.add_argument(
        "--checkpoint", type=Path, help="compare with torch on these weights, at several sizes"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")


def _verify(args: argparse.Namespace) -> int:
    from edge_vlm.bundle import EngineBundle
    from edge_vlm_export.verify import require_parity, require_source, verify_bundle

    bundle = EngineBundle.open(args.bundle)
    model = None
    if args.checkpoint is not None:
        from edge_vlm.model.checkpoint import load_checkpoint

        require_source(bundle, args.checkpoint)
        model = load_checkpoint(args.checkpoint)
    results = verify_bundle(bundle, model, threads=args.threads)
    _print_results(results, "the bundle's reference tensors" if model is None else "torch")
    require_parity(results)
    print(f"bundle {bundle.name}: every file has its recorded hash, every graph agrees")
    return 0


def _print_results(results: list[Comparison], against: str) -> None:
    from edge_vlm_export.verify import format_table

    print(f"ONNX Runtime against {against}:")
    print(format_table(results))


export = Command(
    name="export",
    help="turn a checkpoint into a bundle of ONNX graphs, each compared with torch",
    add_arguments=_export_arguments,
    run=_export,
)
verify = Command(
    name="verify",
    help="compare a bundle's graphs with torch, or with the reference tensors inside it",
    add_arguments=_verify_arguments,
    run=_verify,
)
