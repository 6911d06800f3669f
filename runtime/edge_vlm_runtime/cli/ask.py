"""`edge-vlm ask`. What it needs is imported when it runs."""

from __future__ import annotations

import argparse
import asyncio
import sys

from edge_vlm.cli import Command
from edge_vlm_runtime.cli.config import configured
from edge_vlm_runtime.cli.options import (
    access_of,
    add_access_arguments,
    add_settings_arguments,
    own_server_options,
    serve_options,
    settings_of,
)
from edge_vlm_runtime.cli.shared import (
    finish,
    open_for,
    print_notes,
    server_url,
    take_offline_policy,
)


def _ask_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", help="a video file or a photo; - for standard input")
    parser.add_argument("question")
    parser.add_argument(
        "--detail",
        choices=("video", "snapshot", "both"),
        default="video",
        help="what is looked at: the video, its last picture alone in full detail, or the video "
        "and that picture (default: %(default)s)",
    )
    parser.add_argument("--url", help="a running server (default: one of its own)")
    add_settings_arguments(parser)
    add_access_arguments(parser)


def _ask(args: argparse.Namespace) -> int:
    with server_url(args) as url:
        return asyncio.run(_ask_session(args, url))


async def _ask_session(args: argparse.Namespace, url: str) -> int:
    from edge_vlm.errors import EdgeVlmError
    from edge_vlm_runtime.client.client import Answer, Client
    from edge_vlm_runtime.client.run import Observer, PlannedQuestion, stream
    from edge_vlm_runtime.client.terminal import (
        answer_times,
        dropped_text,
        looked_at_text,
        point_lines,
        snapshot_text,
    )
    from edge_vlm_runtime.protocol.settings import CLIP
    from edge_vlm_runtime.sources.open import open_file

    answers: list[Answer] = []

    class Kept(Observer):
        def answered(self, question: PlannedQuestion, result: Answer | EdgeVlmError) -> None:
            if isinstance(result, Answer):
                answers.append(result)

    settings = {**settings_of(args), "delivery": "wait"}
    async with await Client.connect(url, settings, access=access_of(args)) as client:
        await take_offline_policy(args, client)
        print_notes(client.notes)
        source = await open_for(open_file, args.video, args.fps, client)
        question = PlannedQuestion(text=args.question, detail=args.detail)
        outcome = await stream(source, client, [question], real_time=False, observer=Kept())
    chosen = ", chosen over the whole clip" if client.settings.policy == CLIP else ""
    for answer in answers:
        if seen := looked_at_text(answer, client.video):
            print(seen, file=sys.stderr)
        print("\n".join([answer.shown_text, *point_lines(answer)]))
        print(
            f"{outcome.frames_processed} frames{dropped_text(outcome)}, "
            f"{outcome.cells_kept} of {outcome.cells_seen} cells kept{chosen}"
            f"{answer_times(answer)}{snapshot_text(answer)}",
            file=sys.stderr,
        )
    return finish(outcome)


ask = configured(
    Command(
        add_arguments=_ask_arguments,
        run=_ask,
    ),
    own_server_options,
    file_of=serve_options,
)
