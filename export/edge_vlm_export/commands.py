"""`edge-vlm export` and `edge-vlm verify`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_vlm.cli import Command
from edge_vlm.console.paths import input_footage, output_folder
from edge_vlm.console.usage import did_you_mean, thread_count
from edge_vlm.errors import ConfigError, MissingExtraError
from edge_vlm.formats.bundle import TOKENIZER
from edge_vlm.formats.precision import PRESETS, Precision, Variant
from edge_vlm.formats.usage import DEFAULTS

if TYPE_CHECKING:
    from edge_vlm.formats.bundle import EngineBundle
    from edge_vlm_export.graphs.weights import WeightSource
    from edge_vlm_export.preflight import Estimate
    from edge_vlm_export.to_onnx import ExportOptions
    from edge_vlm_export.verify.ort_runner import Graphs
    from edge_vlm_export.verify.verify import Report

EXCEPTIONS_SHOWN = 12
SLOW_THERE = (
    "note: ONNX Runtime computes int8 vision products of standard operators slower than float32; "
    "OpenVINO and TensorRT do not. For ONNX Runtime on CPUs export with --variant ort"
)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        help="folder written by `edge-vlm train` or `convert`, a published Molmo2 folder, or one "
        "of its training repository",
    )
    parser.add_argument(
        "-o", "--out", type=output_folder, required=True, help="folder of the new bundle"
    )
    parser.add_argument("--name", help="name of the model (default: the checkpoint folder's)")
    parser.add_argument(
        "--default",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting the model was made for, e.g. keep_ratio=0.5; may be repeated",
    )
    parser.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help="whole frames that one question can be shown (default: as many as the model was "
        "trained on, where past frames cannot be cached)",
    )
    parser.add_argument("--max-tokens", type=int, help="most new tokens per run of the llm")
    parser.add_argument("--max-past", type=int, help="most past tokens the llm can attend to")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing bundle")
    parser.add_argument("--threads", type=thread_count, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--scorer",
        choices=("own", "change"),
        default="own",
        help="what cells are chosen by: what the weights bring, if anything, or the change since a "
        "cell was last kept, which needs no training (default: own)",
    )
    parser.add_argument(
        "--scorer-block",
        type=int,
        metavar="N",
        help="with --scorer change: compare behind block N of the vision transformer, counted from "
        "0 (default: 3, or as far back as the features allow)",
    )
    parser.add_argument(
        "--reuse",
        action="store_true",
        help="also the graph that computes only the cells of a frame that changed, for sessions "
        "with the setting reuse",
    )
    precision = parser.add_argument_group("precision and form")
    precision.add_argument(
        "--precision",
        default="fp32",
        help=f"{', '.join(PRESETS)}, or some of "
        "base=...,vit=...,llm=...,head=...,embed=...,cache=..., or both (int4,cache=float16) "
        "(default: fp32)",
    )
    precision.add_argument(
        "--footage",
        type=input_footage,
        action="append",
        default=[],
        help="video or question set on which ranges are measured (float16 and int8); repeatable",
    )
    precision.add_argument(
        "--footage-frames", type=int, default=16, metavar="N", help="of each footage (16)"
    )
    precision.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="calibration.json of this model: its plan of products and its rounded weights are "
        "followed, its ranges are added to those of --footage",
    )
    precision.add_argument(
        "--variant",
        choices=[variant.value for variant in Variant],
        default=Variant.PORTABLE.value,
        help="standard operators, or ONNX Runtime's own fast ones (default: portable)",
    )
    precision.add_argument(
        "--kv-form",
        choices=["concat", "split", "both"],
        default="concat",
        help="how the portable language graph attends to its past (default: concat)",
    )
    _add_tokenizer(parser)
    trial = parser.add_argument_group("without a checkpoint")
    trial.add_argument(
        "--random-weights",
        metavar="SHAPE",
        help="weights made up for a known shape, e.g. molmo2_4b; needs --tokenizer",
    )
    trial.add_argument("--seed", type=int, default=0, help="of the random weights (0)")
    trial.add_argument(
        "--with-images",
        action="store_true",
        help="random weights that read still pictures too (a checkpoint's own files say so)",
    )
    trial.add_argument(
        "--without-scorer", action="store_true", help="the shape as published, without scorer"
    )
    _add_depth(parser)


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="folder with the vocabulary (or its tokenizer.json), for weights beside which none "
        "lies: those of a training run's folder, and --random-weights",
    )


def _add_depth(parser: argparse.ArgumentParser) -> None:
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument(
        "--thorough",
        action="store_const",
        const=True,
        default=None,
        help="compare at the largest sizes and on a clip, however large the model is",
    )
    depth.add_argument(
        "--quick",
        dest="thorough",
        action="store_const",
        const=False,
        help="compare at the smallest and usual sizes only",
    )


def _export(args: argparse.Namespace) -> int:
    _require_libraries()
    source, options = _scored(_source(args), args), _options(args)
    for note in source.notes:
        print(f"note: {note}")
    from edge_vlm.formats.inspect_bundle import serving_facts
    from edge_vlm_export.preflight import MemoryWatch
    from edge_vlm_export.to_onnx import export_source

    if options.precision.vit == "int8" and options.variant is Variant.PORTABLE:
        print(SLOW_THERE)
    began = time.monotonic()
    with MemoryWatch() as held:
        bundle = export_source(source, args.out, options, PrintedProgress())
    _print_sizes(bundle)
    memory = ""
    if held.own:
        memory = (
            f", memory {held.own / 1e9:.1f} GB at most, and {held.mapped / 1e9:.1f} GB of mapped "
            "files"
        )
    size_mb = sum(file.stat().st_size for file in bundle.path.rglob("*") if file.is_file()) / 1e6
    print(f"took {time.monotonic() - began:.0f} s{memory}")
    for fact, text in serving_facts(bundle).items():
        print(f"{fact}: {text}")
    print(
        f"bundle {bundle.name}: {bundle.path} ({size_mb:.1f} MB, {bundle.precision.label}, "
        f"{bundle.variant.value})"
    )
    return 0


def _require_libraries() -> None:
    """Raises MissingExtraError before torch is loaded, which takes seconds."""
    for library in ("torch", "onnx", "onnxscript"):
        if find_spec(library) is None:
            raise MissingExtraError.for_library(library, "export")


def _source(args: argparse.Namespace) -> WeightSource:
    if (args.checkpoint is None) == (args.random_weights is None):
        raise ConfigError("name either a checkpoint folder or --random-weights SHAPE")
    from edge_vlm_export.graphs.weights import open_weights, random_weights

    if args.checkpoint is not None:
        return open_weights(args.checkpoint, args.tokenizer)
    if args.tokenizer is None:
        raise ConfigError("--random-weights needs --tokenizer FILE")
    words = args.tokenizer
    return random_weights(
        args.random_weights,
        args.seed,
        words / TOKENIZER if words.is_dir() else words,
        with_scorer=not args.without_scorer,
        with_images=args.with_images,
    )


def _scored(source: WeightSource, args: argparse.Namespace) -> WeightSource:
    from edge_vlm_export.graphs.weights import scored_by_change

    if args.scorer == "change":
        return scored_by_change(source, args.scorer_block)
    if args.scorer_block is not None:
        raise ConfigError("--scorer-block goes with --scorer change")
    return source


def _options(args: argparse.Namespace) -> ExportOptions:
    """Raises ConfigError for values that are out of range or contradict each other."""
    from edge_vlm_export.graphs.graphs import GraphLimits, KVForm
    from edge_vlm_export.to_onnx import ExportOptions

    wanted = {"max_tokens": args.max_tokens, "max_past": args.max_past}
    given = {name: value for name, value in wanted.items() if value is not None}
    if given and args.frames is not None:
        raise ConfigError("--frames sets what --max-tokens and --max-past set: name either")
    if args.frames is not None and args.frames < 1:
        raise ConfigError(f"--frames {args.frames} must be positive")
    try:
        return ExportOptions(
            name=args.name,
            defaults=dict(_setting(text) for text in args.default),
            limits=GraphLimits(**given) if given else None,
            frames=args.frames,
            precision=Precision.parse(args.precision),
            variant=Variant(args.variant),
            kv_form=KVForm(args.kv_form),
            reuse=args.reuse,
            footage=tuple(args.footage),
            max_frames=args.footage_frames,
            calibration=args.calibration,
            thorough=args.thorough,
            overwrite=args.overwrite,
            threads=args.threads,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _setting(text: str) -> tuple[str, Any]:
    """`key=value`; a value that is not JSON is a string."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ConfigError(f"--default {text!r} is not KEY=VALUE")
    if key not in DEFAULTS:
        raise ConfigError(
            f"--default {text!r} is no setting of a session{did_you_mean(key, DEFAULTS)}",
            remedy=f"one of {', '.join(sorted(DEFAULTS))}",
        )
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


class PrintedProgress:
    """Results on standard output, stages on a terminal's standard error."""

    def estimated(self, needed: Estimate) -> None:
        print(f"the export {needed}", flush=True)

    def stage(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"{text} ...", file=sys.stderr, flush=True)

    def calibrated(self, notes: Sequence[str]) -> None:
        for line in notes:
            print(line, flush=True)

    def planned(self, exceptions: Sequence[str]) -> None:
        for line in exceptions[:EXCEPTIONS_SHOWN]:
            print(line)
        if len(exceptions) > EXCEPTIONS_SHOWN:
            print(f"and {len(exceptions) - EXCEPTIONS_SHOWN} more in precision_plan.json")

    def compared(self, report: Report) -> None:
        print(report, flush=True)


def _print_sizes(bundle: EngineBundle) -> None:
    for file in sorted(bundle.path.rglob("*")):
        size_mb = file.stat().st_size / 1e6
        if file.is_file() and size_mb >= 1:
            print(f"  {size_mb:9.1f} MB  {file.relative_to(bundle.path)}")


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    parser.add_argument(
        "--checkpoint", type=Path, help="compare with torch on these weights, at several sizes"
    )
    _add_tokenizer(parser)
    parser.add_argument(
        "--footage",
        type=input_footage,
        action="append",
        default=[],
        help="video that is streamed too: every value must be finite, and with --checkpoint it is "
        "compared with torch; repeatable",
    )
    parser.add_argument(
        "--footage-frames", type=int, default=16, metavar="N", help="of each footage (16)"
    )
    parser.add_argument(
        "--backend",
        choices=("ort", "openvino"),
        default="ort",
        help="whose results are compared (default: ort)",
    )
    parser.add_argument("--threads", type=thread_count, default=1, help="CPU threads (default: 1)")
    _add_depth(parser)


def _verify(args: argparse.Namespace) -> int:
    from edge_vlm.formats.bundle import EngineBundle
    from edge_vlm_export.verify.verify import require_source, verify_bundle

    bundle = EngineBundle.open(args.bundle)
    source = None
    if args.checkpoint is not None:
        from edge_vlm_export.graphs.weights import open_weights, scored_by_change

        source = open_weights(args.checkpoint, args.tokenizer)
        require_source(bundle, source, args.checkpoint)
        if bundle.config.change is not None:
            source = scored_by_change(source, bundle.config.change.after_block)
    others: Iterable[tuple[str, Graphs] | None] = [None]
    if args.backend == "openvino":
        from edge_vlm_export.verify.openvino_runner import openvino_graphs

        others = openvino_graphs(bundle, args.threads)
    for by in others:
        report = verify_bundle(
            bundle,
            source,
            threads=args.threads,
            thorough=args.thorough is not False,
            footage=args.footage,
            max_frames=args.footage_frames,
            by=by,
        )
        print(report)
        report.require()
    print(f"bundle {bundle.name}: every file has its recorded hash, every graph agrees")
    return 0


export = Command(
    add_arguments=_export_arguments,
    run=_export,
)
verify = Command(
    add_arguments=_verify_arguments,
    run=_verify,
)
