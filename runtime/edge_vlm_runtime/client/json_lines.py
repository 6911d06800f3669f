"""What a running stream says as lines of JSON: `watch --json` and `ask --json`.

Each line is an event of docs/protocol.md as the server sent it, without its secret and its
pictures; events that only repeat ours for OpenAI's clients are left out.
Ours are `summary`, and an `error` with an `exit_code`: what the command ends with.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from edge_vlm.errors import EdgeVlmError
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.run import Observer, Outcome
from edge_vlm_runtime.protocol import realtime
from edge_vlm_runtime.protocol.alerts import AlertTriggered
from edge_vlm_runtime.protocol.base import UnknownEvent


def event_fields(event: protocol.ServerEvent) -> dict[str, Any]:
    """As it came, but for `resume_token` and the `jpeg` of `evidence`."""
    if isinstance(event, UnknownEvent):
        return event.fields
    fields: dict[str, Any] = json.loads(protocol.encode(event))
    if isinstance(event, protocol.SessionCreated):
        del fields["resume_token"]
    elif isinstance(event, AlertTriggered) and fields["evidence"] is not None:
        del fields["evidence"]["jpeg"]
    return fields


def summary_fields(outcome: Outcome) -> dict[str, Any]:
    """What a run came to; its errors have lines of their own."""
    names = [f.name for f in dataclasses.fields(outcome) if not f.name.endswith("_error")]
    return {"type": "summary", **{name: getattr(outcome, name) for name in names}}


def error_fields(error: EdgeVlmError) -> dict[str, Any]:
    """As an `error` event, with the command's exit code."""
    detail = {"code": error.code, "message": str(error)}
    return {"type": "error", "error": detail, "exit_code": error.exit_code}


def write(fields: dict[str, Any]) -> None:
    """One line of ASCII, whatever the output's encoding."""
    print(json.dumps(fields), file=sys.stdout, flush=True)


@contextmanager
def errors_told(is_json: bool) -> Iterator[None]:
    """What ends the command is its last line, too."""
    try:
        yield
    except EdgeVlmError as error:
        if is_json:
            write(error_fields(error))
        raise


class JsonLines(Observer):
    """One line for each event."""

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *ended: object) -> None:
        sys.stdout.flush()

    typing: Callable[[str], None] | None = None

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def event(self, event: protocol.ServerEvent) -> None:
        if not isinstance(event, realtime.SERVER_EVENTS):
            write(event_fields(event))
