"""`watch` on what has no end: a camera, or a stream that the server owns. What it needs is imported
when it runs."""

from __future__ import annotations

import argparse
import asyncio
import functools
from typing import TYPE_CHECKING, cast

from edge_vlm.errors import EdgeVlmError
from edge_vlm.waiting import within
from edge_vlm_runtime.cli.common.alerts import (
    alert_handlers,
    alert_summary,
    create_alerts,
    tell_all,
)
from edge_vlm_runtime.cli.common.options import access_of, settings_of
from edge_vlm_runtime.cli.common.shared import finish, own_session, print_notes

if TYPE_CHECKING:
    from edge_vlm_runtime.alert_sinks.dispatcher import AlertDispatcher
    from edge_vlm_runtime.client.client import Client
    from edge_vlm_runtime.protocol.alerts import AlertStatus
    from edge_vlm_runtime.protocol.typed import Settings
    from edge_vlm_runtime.sources.waiting import WaitingSource

LAST_ALERTS_S = 5.0
"""For where the alerts stand at the end."""


async def watch_live(args: argparse.Namespace, url: str, outputs: AlertDispatcher | None) -> int:
    """Returns the command's exit code. Raises EdgeVlmError."""
    from edge_vlm_runtime.client.json_lines import JsonLines, summary_fields, write
    from edge_vlm_runtime.client.keyboard import Keyboard
    from edge_vlm_runtime.client.live_run import LiveRun
    from edge_vlm_runtime.client.live_table import LiveTable, make_view
    from edge_vlm_runtime.client.run import Outcome, parse_question
    from edge_vlm_runtime.client.terminal import summary_line
    from edge_vlm_runtime.sources.masking import mask_credentials
    from edge_vlm_runtime.sources.open import require_source

    questions = [parse_question(text, args.every) for text in args.ask]
    questions += [parse_question(text, args.every, "snapshot") for text in args.snapshot_ask]
    outcome = Outcome()
    alerts: list[AlertStatus] = []
    connect = functools.partial(_connect, args, url)
    if args.stream is None:
        require_source(args.source, args.fps)
    first = await connect()
    what = f"stream {args.stream}" if args.stream is not None else mask_credentials(args.source)
    title = f"{what} on {first.created.model.bundle}"
    grid = first.created.model.limits.cell_grid
    with JsonLines() if args.json else make_view(grid, title) as view:
        before = first.created.session_id

        async def begin(client: Client, is_later: bool) -> None:
            nonlocal before
            if not is_later:
                print_notes(client.notes)
            if args.json:
                view.event(client.created)
            client.on_event = tell_all(
                view.event,
                run.on_event,
                *alert_handlers(args, client.created.session_id, outputs),
            )
            made = await create_alerts(args, client)
            if is_later:
                is_new = client.created.session_id != before  # a stream's may have gone on
                new = ": a new session, its memory is empty" if is_new else ""
                again = f"; alerts that are watched for again: {len(made)}" if made else ""
                view.say(f"connected again{new}{again}")
            before = client.created.session_id
            own_alerts[:] = made

        async def end(client: Client) -> None:
            if args.alerts:
                listed = await within(LAST_ALERTS_S, client.list_alerts())
                own = {status.alert_id for status in own_alerts}
                alerts.extend(status for status in listed if status.alert_id in own)
            if args.stream is not None:  # the stream goes on, with the alerts of its owner
                for status in own_alerts:
                    await client.delete_alert(status.alert_id)

        own_alerts: list[AlertStatus] = []
        try:
            source = None if args.stream is not None else _source(args, first, view.say)
        except EdgeVlmError:
            await first.close()
            raise
        run = LiveRun(
            source,
            connect,
            questions,
            observer=view,
            outcome=outcome,
            begin=begin,
            finish=end,
            say=view.say,
            comes_back=args.url is not None,
        )
        if isinstance(view, LiveTable):
            view.takes_questions, view.is_subscriber = True, args.stream is not None
        try:
            with Keyboard(run.ask, view.typing).reading():
                await run.run(first)
        except asyncio.CancelledError:
            pass  # Ctrl-C is how a live source ends
    if args.json:
        write(summary_fields(outcome))
        return finish(outcome)
    for status in alerts:
        print(alert_summary(status))
    print(summary_line(outcome))
    return finish(outcome)


async def _connect(args: argparse.Namespace, url: str) -> Client:
    from edge_vlm_runtime.client.client import Client

    access = access_of(args)
    if args.stream is not None:
        return await Client.subscribe(url, args.stream, access=access)
    settings = {**settings_of(args), **own_session(args, args.record), "delivery": "live"}
    return await Client.connect(url, cast("Settings", settings), access=access)


def _source(args: argparse.Namespace, client: Client, say: object) -> WaitingSource:
    """Opened on the thread that reads it, as soon as it is there. Raises VideoUnreadable for what
    never will be."""
    from edge_vlm_runtime.sources.open import open_source, require_source
    from edge_vlm_runtime.sources.waiting import WaitingSource

    loop = asyncio.get_running_loop()
    fps = args.fps or client.created.settings.fps_cap
    require_source(args.source, fps)
    return WaitingSource(
        args.source,
        functools.partial(open_source, args.source, fps, hwaccel=args.hwaccel),
        is_live=True,
        patience_s=args.wait,
        on_away=lambda why: _say_soon(loop, say, f"waiting for the camera: {why}"),
    )


def _say_soon(loop: asyncio.AbstractEventLoop, say: object, text: str) -> None:
    loop.call_soon_threadsafe(say, text)  # type: ignore[arg-type]
