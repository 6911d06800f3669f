"""`edge-vlm ask`. What it needs is imported when it runs."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edge_vlm.cli import Command
from edge_vlm.errors import ConfigError, NoQuestion
from edge_vlm_runtime.cli.config import configured
from edge_vlm_runtime.cli.options import (
    access_of,
    add_access_arguments,
    add_settings_arguments,
    address_of,
    own_server_options,
    serve_options,
    settings_of,
)
from edge_vlm_runtime.cli.shared import (
    add_json_argument,
    finish,
    open_for,
    own_session,
    print_notes,
    server_url,
    take_offline_policy,
)

if TYPE_CHECKING:
    from edge_vlm_runtime.client.client import Client
    from edge_vlm_runtime.protocol.typed import Settings
    from edge_vlm_runtime.sources.container import Source


def _ask_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", help="a video file or a photo; - for standard input")
    parser.add_argument("question", help="what to ask at its end, in quotation marks")
    parser.add_argument(
        "--detail",
        choices=("video", "snapshot", "both"),
        default="video",
        help="what is looked at: the video, its last picture alone in full detail, or the video "
        "and that picture (default: %(default)s)",
    )
    parser.add_argument(
        "--subtitles",
        type=Path,
        metavar="FILE",
        help="SRT or WebVTT of the video: Molmo2 reads them behind its frames",
    )
    add_json_argument(parser)
    add_settings_arguments(parser, asks_once=True)
    add_access_arguments(parser)


def _ask(args: argparse.Namespace) -> int:
    if not args.question.strip():
        raise NoQuestion("the question is empty", remedy="write it in quotation marks")
    if args.subtitles is not None and args.detail == "snapshot":
        raise ConfigError(
            "a picture alone is asked about without subtitles", remedy="ask with --detail both"
        )
    args.url = address_of(args)
    from edge_vlm_runtime.client.json_lines import errors_told

    with errors_told(args.json), server_url(args) as url:
        return asyncio.run(_ask_session(args, url))


async def _ask_session(args: argparse.Namespace, url: str) -> int:
    from edge_vlm.errors import EdgeVlmError
    from edge_vlm_runtime.client.client import Answer, Client
    from edge_vlm_runtime.client.json_lines import JsonLines, summary_fields, write
    from edge_vlm_runtime.client.run import Observer, PlannedQuestion, stream
    from edge_vlm_runtime.client.terminal import (
        answer_times,
        cut_text,
        dropped_text,
        looked_at_text,
        point_lines,
        snapshot_text,
    )
    from edge_vlm_runtime.protocol.settings import CLIP

    answers: list[Answer] = []

    class Kept(Observer):
        def answered(self, question: PlannedQuestion, result: Answer | EdgeVlmError) -> None:
            if isinstance(result, Answer):
                answers.append(result)

    settings: Settings = {**settings_of(args), **own_session(args), "delivery": "wait"}
    async with await Client.connect(url, settings, access=access_of(args)) as client:
        await take_offline_policy(args, client)
        print_notes(client.notes)
        if args.json:
            client.on_event = JsonLines().event
            client.on_event(client.created)
        source, shown = await _source(args, client)
        question = PlannedQuestion(text=args.question, detail=args.detail)
        outcome = await stream(source, client, [question], real_time=False, observer=Kept())
    if args.json:
        write(summary_fields(outcome))
        return finish(outcome)
    chosen = ", chosen over the whole clip" if client.settings.policy == CLIP else ""
    for answer in answers:
        if seen := looked_at_text(answer, client.video):
            print(seen, file=sys.stderr)
        print("\n".join([answer.shown_text, *point_lines(answer)]))
        print(
            f"{outcome.frames_processed} frames{shown}{dropped_text(outcome)}, "
            f"{outcome.cells_kept} of {outcome.cells_seen} cells kept{chosen}"
            f"{answer_times(answer)}{snapshot_text(answer)}{cut_text(answer)}",
            file=sys.stderr,
        )
    return finish(outcome)


async def _source(args: argparse.Namespace, client: Client) -> tuple[Source, str]:
    """The file's pictures and, for people, which of them. Raises VideoError and its leaves,
    ConfigError."""
    from edge_vlm.text.subtitles import read_subtitles
    from edge_vlm_runtime.cli.clip import choose, clip_rule
    from edge_vlm_runtime.sources.open import open_file, whole_file
    from edge_vlm_runtime.sources.video_file import ClipSource

    rule = clip_rule(client.created.model.limits, args.fps)
    subtitles = [] if args.subtitles is None else read_subtitles(args.subtitles)
    whole = None if rule is None else await asyncio.to_thread(whole_file, args.video)
    if rule is not None and whole is not None:
        path, probed = whole
        chosen = await choose(client, rule, probed, subtitles)
        return ClipSource(path, chosen.times_s), chosen.said
    if subtitles:
        if rule is None:
            what = "the model was not trained on whole clips, so it knows no subtitles"
        else:
            what = "subtitles go with a whole file, which standard input and addresses are not"
        raise ConfigError(what, where=args.subtitles)
    source = await open_for(open_file, args.video, args.fps, client)
    return source, "" if rule is None else " (as they came: what is read once has no known end)"


ask = configured(
    Command(
        add_arguments=_ask_arguments,
        run=_ask,
    ),
    own_server_options,
    file_of=serve_options,
)
