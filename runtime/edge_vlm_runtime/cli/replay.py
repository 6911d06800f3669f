"""`edge-vlm replay FILE`: a recorded session again. What it needs is imported when it runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edge_vlm.cli import Command
from edge_vlm.console.paths import output_file
from edge_vlm.console.usage import thread_count
from edge_vlm_runtime.cli.common.options import add_backend_arguments
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.engines.names import backend_options

if TYPE_CHECKING:
    from edge_vlm_runtime.inference.bundle_model import LoadedBundle
    from edge_vlm_runtime.recording.file import Recording


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a recording of --record")
    parser.add_argument(
        "--bundle",
        type=Path,
        default=DEMO_BUNDLE,
        metavar="FOLDER",
        help="the bundle it was recorded with (default: the demo model)",
    )
    parser.add_argument(
        "--threads", type=thread_count, help="threads of the engines (default: as recorded)"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="run its input at full speed, on any bundle, and print figures",
    )
    add_backend_arguments(parser)
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="with --measure: figures as JSON"
    )


def _run(args: argparse.Namespace) -> int:
    from edge_vlm.errors import RecordingError
    from edge_vlm.formats.bundle import MANIFEST, sha256_of_file
    from edge_vlm_runtime.inference.bundle_model import LoadedBundle
    from edge_vlm_runtime.recording.file import Recording

    with Recording.open(args.file) as recording:
        header = recording.header
        threads = args.threads or recording.threads
        with LoadedBundle.open(args.bundle, threads, **backend_options(args)) as engines:
            name = engines.bundle.name
            if args.measure:
                print(f"{args.file.name} on bundle {name!r}, {threads} CPU threads, full speed")
                return _measure(args, engines, recording)
            found = sha256_of_file(engines.bundle.path / MANIFEST)
            if found != header.get("bundle_sha256"):
                raise RecordingError(
                    f"recorded with another bundle named {header.get('bundle')!r}",
                    where=args.file,
                    remedy="give that one with --bundle, or --measure this one",
                )
            return _again(engines, recording)


def _again(engines: LoadedBundle, recording: Recording) -> int:
    from edge_vlm.errors import ReplayDiffers
    from edge_vlm_runtime.cli.common.alerts import alert_summary
    from edge_vlm_runtime.client.terminal import LineOutput, summary_line
    from edge_vlm_runtime.recording.replay import Replay
    from edge_vlm_runtime.recording.report import Report

    report = Report(LineOutput(engines.bundle.config.vision.cell_grid))
    player = Replay(engines, recording, on_event=report.on_event, on_message=report.on_message)
    comparison = player.run()
    for status in report.alerts:
        print(alert_summary(status))
    print(summary_line(report.finish(player)))
    if recording.cut_off is not None:
        print(f"note: {recording.cut_off}; everything before was replayed", file=sys.stderr)
    if comparison.num_differences:
        for line in comparison.differences:
            print(f"differs: {line}", file=sys.stderr)
        raise ReplayDiffers(
            f"{comparison.num_differences} differences in {comparison.num_events} recorded events",
            where=recording.path,
        )
    print(f"all {comparison.num_events} recorded events came again as they were")
    return 0


def _measure(args: argparse.Namespace, engines: LoadedBundle, recording: Recording) -> int:
    from edge_vlm_runtime.inference.bundle_model import warm_up
    from edge_vlm_runtime.recording.report import measure

    warm_up(engines)
    figures = measure(engines, recording)
    print("\n".join(figures.lines()))
    if recording.cut_off is not None:
        print(f"note: {recording.cut_off}; everything before was measured", file=sys.stderr)
    if args.json is not None:
        args.json.write_text(json.dumps(figures.to_dict(), indent=1) + "\n", encoding="utf-8")
    return 0


replay = Command(
    add_arguments=_arguments,
    run=_run,
)
