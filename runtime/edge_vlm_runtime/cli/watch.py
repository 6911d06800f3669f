"""`edge-vlm watch`. What it needs is imported when it runs."""

from __future__ import annotations

import argparse
import asyncio
import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING

from edge_vlm.cli import Command
from edge_vlm.errors import ConfigError
from edge_vlm_runtime.cli.common.alerts import (
    add_alert_arguments,
    alert_handlers,
    alert_outputs,
    alert_summary,
    create_alerts,
    tell_all,
)
from edge_vlm_runtime.cli.common.config import configured
from edge_vlm_runtime.cli.common.options import (
    access_of,
    add_access_arguments,
    add_record_argument,
    add_settings_arguments,
    add_source_arguments,
    add_stream_argument,
    address_of,
    own_server_options,
    refuse_settings,
    serve_options,
    settings_of,
)
from edge_vlm_runtime.cli.common.shared import (
    add_json_argument,
    finish,
    not_negative_float,
    open_for,
    own_session,
    positive_float,
    print_notes,
    server_url,
)
from edge_vlm_runtime.cli.watch_live import watch_live
from edge_vlm_runtime.client.address import DEFAULT_PORT

if TYPE_CHECKING:
    from edge_vlm_runtime.alert_sinks.dispatcher import AlertDispatcher
    from edge_vlm_runtime.protocol.typed import Settings


def _watch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "server", nargs="?", metavar="ADDRESS", help="as --url (default: a server of its own)"
    )
    parser.add_argument(
        "--source",
        metavar="SOURCE",
        help="a video file, - for standard input, webcam, webcam:1, /dev/..., rtsp://..., "
        "http://... and other addresses, csi, gst:PIPELINE, or demo, demo:7: an endless rendered "
        "street",
    )
    add_stream_argument(parser, "instead of a source: a camera of the server's own, by its name")
    parser.add_argument(
        "--wait",
        type=not_negative_float,
        default=math.inf,
        metavar="SECONDS",
        help="how long a camera that is not there yet is waited for (default: as long as it takes)",
    )
    add_source_arguments(parser)
    parser.add_argument(
        "--ask",
        action="append",
        default=[],
        metavar="[SECONDS@]TEXT",
        help="a question, asked at that second of the source, or without one at the end of a file "
        "and after a camera's first picture; may be repeated. Of a camera more may be asked at any "
        "time: type them, or send them through a pipe, a line each",
    )
    parser.add_argument(
        "--snapshot-ask",
        action="append",
        default=[],
        metavar="[SECONDS@]TEXT",
        help="the same about the newest picture alone, in full detail: to read a label",
    )
    parser.add_argument(
        "--every", type=positive_float, metavar="SECONDS", help="ask again and again"
    )
    parser.add_argument(
        "--fast", action="store_true", help="a file as fast as it is processed, not in real time"
    )
    add_json_argument(parser)
    add_settings_arguments(parser)
    add_alert_arguments(parser)
    add_access_arguments(parser)
    add_record_argument(
        parser,
        "FILE.evlm",
        "record the session, with its pictures as JPEG (with a server of its own only)",
    )


def _watch(args: argparse.Namespace) -> int:
    args.url = address_of(args)
    if (args.source is None) == (args.stream is None):
        raise ConfigError(
            "what is watched is named by --source, or by --stream for a camera of the server's own",
            remedy="give one of the two",
        )
    if args.stream is not None:
        refuse_settings(args, "a stream of the server's own")
        args.url = args.url or f"localhost:{DEFAULT_PORT}"
    if args.record is not None and args.url is not None:
        raise ConfigError(
            "a session is recorded by its server", remedy="give --record to `edge-vlm serve`"
        )
    from edge_vlm_runtime.client.json_lines import errors_told

    with (
        errors_told(args.json),
        alert_outputs(args) as outputs,
        server_url(args, record_to=args.record) as url,
    ):
        from edge_vlm_runtime.sources.open import is_live

        if args.stream is not None or is_live(args.source):
            return asyncio.run(watch_live(args, url, outputs))
        return asyncio.run(_watch_session(args, url, outputs))


async def _watch_session(
    args: argparse.Namespace, url: str, outputs: AlertDispatcher | None
) -> int:
    from edge_vlm_runtime.client.client import Client
    from edge_vlm_runtime.client.json_lines import JsonLines, summary_fields, write
    from edge_vlm_runtime.client.live_table import make_view
    from edge_vlm_runtime.client.run import Outcome, parse_question, stream
    from edge_vlm_runtime.client.terminal import summary_line
    from edge_vlm_runtime.protocol.settings import CLIP
    from edge_vlm_runtime.sources.masking import mask_credentials
    from edge_vlm_runtime.sources.open import open_source

    questions = [parse_question(text, args.every) for text in args.ask]
    questions += [parse_question(text, args.every, "snapshot") for text in args.snapshot_ask]
    outcome = Outcome()
    access = access_of(args)
    settings: Settings = {**settings_of(args), **own_session(args, args.record)}
    if settings.get("policy") == CLIP:
        settings["delivery"] = "wait"  # a file; a live source is refused below
    async with await Client.connect(url, settings, access=access) as client:
        open_it = functools.partial(open_source, hwaccel=args.hwaccel)
        source = await open_for(open_it, args.source, args.fps, client)
        await client.update({"delivery": "wait"})
        print_notes([*client.notes, *_unused_of(args.calibration)])
        grid = client.created.model.limits.cell_grid
        title = f"{mask_credentials(args.source)} on {client.created.model.bundle}"
        with JsonLines() if args.json else make_view(grid, title) as view:
            if args.json:
                view.event(client.created)
            client.on_event = tell_all(
                view.event, *alert_handlers(args, client.created.session_id, outputs)
            )
            await create_alerts(args, client)
            await stream(
                source,
                client,
                questions,
                real_time=not args.fast,
                observer=view,
                outcome=outcome,
            )
            alerts = await client.list_alerts() if args.alerts else []
    if args.json:
        write(summary_fields(outcome))
        return finish(outcome)
    for status in alerts:
        print(alert_summary(status))
    print(summary_line(outcome))
    return finish(outcome)


def _unused_of(calibration: Path | None) -> list[str]:
    """What a file's session makes no use of."""
    from edge_vlm.formats.calibrated import ChangeSection
    from edge_vlm.formats.calibration import Calibration

    if calibration is None:
        return []
    change = Calibration.read(calibration).find(ChangeSection, calibration)
    if change is None or not change.settings:
        return []
    return [
        "every picture of a file is taken: the calibrated duplicate_threshold is for live sources, "
        "which cost less than this"
    ]


watch = configured(
    Command(
        add_arguments=_watch_arguments,
        run=_watch,
    ),
    own_server_options,
    file_of=serve_options,
)
