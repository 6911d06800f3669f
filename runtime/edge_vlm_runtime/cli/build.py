"""`edge-vlm build`: a bundle's graphs become engines, on the device that will run them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from edge_vlm.cli import Command
from edge_vlm.console.output import obeyed
from edge_vlm.console.paths import output_folder
from edge_vlm.errors import ConfigError

MEGABYTE = 1_000_000


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="folder written by `edge-vlm export`")
    parser.add_argument(
        "--library",
        choices=["tensorrt", "tensorrt_rtx"],
        help="default: TensorRT if it is installed, else TensorRT for RTX",
    )
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="SM",
        help="build for sm_89, say, without having one; repeatable, TensorRT for RTX only",
    )
    parser.add_argument(
        "--graph", action="append", default=[], metavar="NAME", help="only this graph; repeatable"
    )
    parser.add_argument(
        "--engines", type=output_folder, help="folder of the engines (BUNDLE/engines)"
    )
    parser.add_argument(
        "--workspace", type=int, metavar="MB", help="most scratch memory of a layer"
    )
    parser.add_argument(
        "--level", type=int, choices=range(6), help="0 builds fast, 5 searches longest (default: 3)"
    )
    parser.add_argument("--rebuild", action="store_true", help="even engines that are up to date")


def _run(args: argparse.Namespace) -> int:
    from edge_vlm.formats.bundle import EngineBundle
    from edge_vlm_runtime.engines.build import BuildOptions, build_engines

    try:
        options = BuildOptions(
            library=args.library,
            targets=tuple(args.target),
            workspace_bytes=None if args.workspace is None else args.workspace * MEGABYTE,
            optimization_level=args.level,
            rebuild=args.rebuild,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    bundle = EngineBundle.open(args.bundle)
    folder = args.engines or bundle.path / "engines"
    built = build_engines(bundle, folder, options, graphs=args.graph, progress=_progress())
    for name, result in built.items():
        entry = result.entry
        size = f"{entry.path.stat().st_size / 1e6:.1f} MB"
        if not result.fresh:
            print(f"{name}: up to date, {size}")
            continue
        print(
            f"{name}: built in {entry.build['seconds']:.1f} s, {size}, "
            f"peak memory {entry.build['peak_bytes'] / 1e9:.2f} GB"
        )
        for warning in entry.build["warnings"]:
            print(f"  warning: {warning}")
    mark = next(iter(built.values())).entry.fingerprint
    where = mark.gpu or ", ".join(mark.capabilities)
    print(f"engines of {mark.library} {mark.library_version} for {where}: {folder}")
    return 0


def _progress() -> Callable[[str, str, int, int], None]:
    """One changing line on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda graph, phase, done, total: None

    def show(graph: str, phase: str, done: int, total: int) -> None:
        share = f"{done}/{total}"
        print(f"\r\033[K{graph}: {phase[:60]} {share}", end="", file=obeyed(sys.stderr), flush=True)
        if done == total:
            print("\r\033[K", end="", file=obeyed(sys.stderr), flush=True)

    return show


build = Command(
    add_arguments=_arguments,
    run=_run,
)
