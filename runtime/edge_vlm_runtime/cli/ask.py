"""`edge-vlm ask`. What it needs is imported when it runs."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_vlm.cli import Command
from edge_vlm.errors import ConfigError, NoQuestion
from edge_vlm_runtime.cli.common.config import configured
from edge_vlm_runtime.cli.common.options import (
    access_of,
    add_access_arguments,
    add_settings_arguments,
    address_of,
    own_server_options,
    refuse_settings,
    serve_options,
    settings_of,
)
from edge_vlm_runtime.cli.common.shared import (
    add_json_argument,
    finish,
    open_for,
    own_session,
    print_notes,
    server_url,
    take_offline_policy,
)
from edge_vlm_runtime.client.address import DEFAULT_PORT, is_address

if TYPE_CHECKING:
    from edge_vlm_runtime.client.client import Client
    from edge_vlm_runtime.protocol.typed import Settings
    from edge_vlm_runtime.sources.container import Source


def _ask_arguments(parser: argparse.ArgumentParser) -> None:
    video = parser.add_argument(
        "video",
        help="a video file or a photo; - for standard input; with --stream the server's address, "
        "which may be left out",
    )
    question = parser.add_argument("question", help="what is asked")
    parser.add_argument(
        "--stream",
        action=_Stream,
        optional=(video, question),
        metavar="NAME",
        help="ask about a camera of the server's own, by its name",
    )
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


class _Stream(argparse.Action):
    """With it there is no video to name, and perhaps no address."""

    def __init__(self, *, optional: Sequence[argparse.Action], **given: Any) -> None:
        super().__init__(**given)
        self._optional = optional

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: object, option: object = None
    ) -> None:
        setattr(namespace, self.dest, values)
        for positional in self._optional:
            positional.nargs, positional.required = "?", False


def _ask(args: argparse.Namespace) -> int:
    if args.stream is not None:
        return _ask_stream(args)
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


def _ask_stream(args: argparse.Namespace) -> int:
    """A question to a camera of the server's own."""
    refuse_settings(args, "a stream of the server's own")
    if args.subtitles is not None:
        raise ConfigError("a camera has no subtitles", where=args.subtitles)
    given = [text for text in (args.video, args.question) if text is not None]
    if not given:
        raise ConfigError("there is no question", remedy='ask --stream NAME "What is there now?"')
    if is_address(given[-1]) or os.path.isfile(given[-1]):
        raise ConfigError(
            "the address of a server, or a file, where the question was to be",
            where=given[-1],
            remedy='ask --stream NAME [ADDRESS] "What is there now?"',
        )
    args.server = given[0] if len(given) == 2 else None
    url = address_of(args) or f"localhost:{DEFAULT_PORT}"
    from edge_vlm_runtime.client.json_lines import errors_told

    with errors_told(args.json):
        return asyncio.run(_ask_subscribed(args, url, given[-1]))


async def _ask_subscribed(args: argparse.Namespace, url: str, question: str) -> int:
    from edge_vlm_runtime.client.client import Client
    from edge_vlm_runtime.client.json_lines import JsonLines
    from edge_vlm_runtime.client.terminal import answer_times, cut_text, point_lines, snapshot_text

    async with await Client.subscribe(url, args.stream, access=access_of(args)) as client:
        if args.json:
            client.on_event = JsonLines().event
            client.on_event(client.created)
        answer = await client.ask(question, args.detail)
    if not args.json:
        print("\n".join([answer.shown_text, *point_lines(answer)]))
        print(
            f"stream {args.stream}{answer_times(answer)}{snapshot_text(answer)}{cut_text(answer)}",
            file=sys.stderr,
        )
    return 0


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
    if client.settings.reuse and outcome.cells_seen:
        chosen += f", {client.frames.cells_recomputed / outcome.cells_seen:.0%} recomputed"
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
