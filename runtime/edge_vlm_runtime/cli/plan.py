"""`edge-vlm plan`. What it needs is imported when it runs."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from edge_vlm.cli import Command
from edge_vlm.console.options import About
from edge_vlm.console.tables import columns
from edge_vlm.errors import ConfigError
from edge_vlm_runtime.cli.common.arguments import add_options, given, options_of
from edge_vlm_runtime.cli.common.options import BundleOptions

if TYPE_CHECKING:
    from edge_vlm.config import ModelConfig
    from edge_vlm.formats.precision import Precision
    from edge_vlm_runtime.cli.common.arguments import Option
    from edge_vlm_runtime.planning.check import Check
    from edge_vlm_runtime.planning.plan import Forecast, Wanted

MODELS = {"molmo2-4b": "molmo2_4b", "molmo2-8b": "molmo2_8b", "molmo2-o-7b": "molmo2_o_7b"}
WINDOW = 64
SHORT = {"4b": "molmo2-4b", "8b": "molmo2-8b", "o-7b": "molmo2-o-7b"}


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """What is to run, and where."""

    device: Annotated[str, About(metavar="NAME")] = "this"
    """orin-nano, orin-nx, orin-agx, thor, rtx4090, rtx5090, h200, or this machine's processor."""
    model: Annotated[str, About(metavar="NAME")] = "molmo2-4b"
    """molmo2-4b, molmo2-8b, molmo2-o-7b (4b, 8b, o-7b for short), or the folder of a bundle."""
    fps: float = 2.0
    """Frames a second."""
    keep: float = 0.5
    """Share of cells kept."""
    precision: Annotated[str | None, About(metavar="NAME")] = None
    """As of `export` (default: int4, or that of the bundle)."""
    window: Annotated[int | None, About(metavar="FRAMES")] = None
    """Frames that are remembered (default: 64, or as many as the model's positions take)."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, {"": options_of(PlanArguments)})
    add_options(parser, {"": options_of(BundleOptions, only=("threads",))}, is_checked=True)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--check",
        type=Path,
        action="append",
        metavar="BUNDLE",
        help="compare the forecast for this machine's processor with a bundle that is run on it; "
        "may be repeated",
    )
    parser.add_argument(
        "--turns",
        type=int,
        default=3,
        metavar="N",
        help="of --check: forecast and run in turn (default: 3)",
    )


def _run(args: argparse.Namespace) -> int:
    asked = options_of(PlanArguments)
    if args.check:
        _refuse([option for option in asked if getattr(args, option.key) != option.default])
        return _check(args)
    from edge_vlm_runtime.planning.devices import THIS, device_named
    from edge_vlm_runtime.planning.plan import forecast_device, forecast_this

    arguments = PlanArguments(**given(options_of(PlanArguments), args))
    wanted = _wanted(arguments)
    warnings: list[str] = []
    if arguments.device == THIS:
        from edge_vlm.memory import free_memory
        from edge_vlm_runtime.bench.machine import System, Watch
        from edge_vlm_runtime.planning.probe import measure_rates

        print(f"measuring this machine, {args.threads} threads ...", file=sys.stderr, flush=True)
        watch = Watch()
        watch.begin()
        rates = measure_rates(args.threads)
        warnings += [
            f"{warning}: the forecast is too slow by as much" for warning in watch.end()["warnings"]
        ]
        cores = os.cpu_count() or 1
        if args.threads > cores:
            warnings.append(f"{args.threads} threads on {cores} cores wait for each other")
        for warning in warnings:
            print(f"note: {warning}", file=sys.stderr)
        forecast = forecast_this(System().cpu_name(), rates, free_memory(), wanted)
    else:
        device = device_named(arguments.device)
        if args.threads != BundleOptions().threads:
            print(f"note: --threads says nothing of {device.label}", file=sys.stderr)
        forecast = forecast_device(device, wanted)
    if args.json:
        asked_for = {
            "model": arguments.model,
            "precision": wanted.precision.label,
            "fps": wanted.fps,
            "keep": wanted.keep,
            "window": wanted.window,
            "threads": args.threads if arguments.device == THIS else None,
        }
        print(json.dumps({**asked_for, **forecast.to_dict(), "warnings": warnings}, indent=1))
    else:
        print("\n".join(_lines(forecast, arguments, wanted)))
    return 0 if forecast.fits else 1


def _refuse(options: Sequence[Option]) -> None:
    """Of a check, which forecasts what the bundle is and only where it runs. Raises ConfigError."""
    if options:
        names = ", ".join(f"--{option.key}" for option in options)
        raise ConfigError(f"{names} with --check", remedy="leave out --check, or those")


def _wanted(arguments: PlanArguments) -> Wanted:
    """Raises ConfigError, BundleError."""
    from edge_vlm.formats.precision import Precision
    from edge_vlm_runtime.planning.plan import Wanted

    cfg, own = _model(arguments.model)
    try:
        precision = own if arguments.precision is None else Precision.parse(arguments.precision)
        one = Wanted(cfg=cfg, precision=precision, fps=arguments.fps, keep=arguments.keep, window=1)
        window = arguments.window
        return replace(one, window=min(WINDOW, one.most_frames) if window is None else window)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _model(name: str) -> tuple[ModelConfig, Precision]:
    from edge_vlm import presets
    from edge_vlm.formats.bundle import EngineBundle
    from edge_vlm.formats.precision import PRESETS

    known = name.lower().removeprefix("allenai/")  # as its publisher names it
    known = SHORT.get(known, known)
    if known in MODELS:
        cfg: ModelConfig = getattr(presets, MODELS[known])()
        return cfg, PRESETS["int4"]
    if Path(name).is_dir():
        bundle = EngineBundle.open(name)
        return bundle.config, bundle.precision
    near = difflib.get_close_matches(known, [*MODELS, *SHORT], n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"unknown model {name!r}", remedy=f"{hint}one of {', '.join(MODELS)}, or a bundle's folder"
    )


def _lines(forecast: Forecast, arguments: PlanArguments, wanted: Wanted) -> list[str]:
    from edge_vlm_runtime.bench.report import figure

    data = forecast.to_dict()
    pace = "keeps up" if forecast.load <= 1 else "DOES NOT KEEP UP"
    if not forecast.fits:
        verdict = "DOES NOT FIT"
    else:
        verdict = "fits" if forecast.load <= 1 else f"fits, but {pace}"
    gb = 1e9
    rows = [(name, f"{size / gb:.2f} GB") for name, size in forecast.memory.items()]
    rows.append(("all", f"{forecast.needed_bytes / gb:.2f} of {forecast.usable_bytes / gb:.1f} GB"))
    stages = [(name, figure(value, " ms")) for name, value in data["stages_ms"].items()]
    lines = [
        f"{arguments.model} in {wanted.precision.label} on {forecast.device}: {verdict}",
        f"keep {arguments.keep:g}: {forecast.cells} cells, {forecast.frame_tokens} tokens a frame; "
        f"{wanted.window} frames remembered, {forecast.window_tokens} tokens",
        "",
        *columns(rows, "<>"),
        "",
        *columns(stages, "<>"),
        "",
        f"a frame {figure(data['frame_ms'])} ms, at most {data['frames_per_s']:g} frames/s; at "
        f"{arguments.fps:g} frames/s {pace}, {forecast.load:.0%} of the time",
        f"first token {figure(data['ttft_ms'])} ms behind a question, then "
        f"{data['tokens_per_s']:g} tokens/s (its bandwidth bounds it at "
        f"{data['decode_bound_per_s']:g})",
    ]
    if forecast.watts is not None:
        lines.append(
            f"energy, in order of magnitude: at most {data['j_per_frame_at_most']:g} J a frame, "
            f"{data['j_per_answer_at_most']:g} J an answer of 48 tokens ({forecast.watts:g} W)"
        )
    else:
        lines.append("energy: this processor's power is not known; `edge-vlm bench` reads meters")
    lines.append("a forecast from shapes and rates, see docs/benchmarks.md; nothing was run")
    return lines


def _check(args: argparse.Namespace) -> int:
    from edge_vlm_runtime.planning.check import check_bundles

    if args.turns < 1:
        raise ConfigError(f"turns must be at least 1, got {args.turns}")
    checks = check_bundles(
        args.check,
        threads=args.threads,
        turns=args.turns,
        say=lambda what: print(what, file=sys.stderr, flush=True),
    )
    if args.json:
        print(json.dumps(check_record(args, checks), indent=1))
    else:
        rows = [("bundle", "stage", "measured", "forecast", "forecast / measured", "")]
        rows += [
            (
                check.bundle,
                check.stage,
                f"{check.measured_ms:.3g} ms",
                f"{check.forecast_ms:.3g} ms",
                f"{check.ratio:.2f} ({check.least:.2f} to {check.most:.2f})",
                "" if check.holds else "off by more than 25 %",
            )
            for check in checks
        ]
        print("\n".join(columns(rows, "<<>>><")))
    return 0 if all(check.holds for check in checks) else 1


def check_record(args: argparse.Namespace, checks: Sequence[Check]) -> dict[str, Any]:
    """What docs/benchmarks.md shows."""
    from edge_vlm_runtime.bench.machine import System
    from edge_vlm_runtime.planning.check import ALLOWED

    bundles = " ".join(f"--check {path.name}" for path in args.check)
    return {
        "command": f"edge-vlm plan {bundles} --threads {args.threads} --turns {args.turns} --json",
        "device": System().cpu_name(),
        "clock": "processor time",
        "threads": args.threads,
        "turns": args.turns,
        "allowed": ALLOWED,
        "checks": [check.to_dict() for check in checks],
    }


plan = Command(
    add_arguments=_arguments,
    run=_run,
)
