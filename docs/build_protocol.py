"""Writes docs/protocol.md from the message types: `python -m docs.build_protocol FILE`.

A test compares the committed file with what this gives, so the page cannot go stale.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from edge_vlm.console.options import texts_of
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol import messages
from edge_vlm_runtime.protocol.frames import DropReason
from edge_vlm_runtime.protocol.settings import ModelLimits, ServerLimits, SessionSettings

INTRODUCTION = """\
# Wire protocol

*Generated from `runtime/edge_vlm_runtime/protocol/messages.py` by
`python -m docs.build_protocol docs/protocol.md`; a test keeps it current.*

One websocket, `GET {path}`, is one session: one viewer, one stream, one conversation. Text
messages are JSON objects with a `type`; names follow the OpenAI Realtime API where it has one.
Binary messages are pictures. Compression is off; the server pings every 20 s. A page may connect
only from the origin it was served by, or from an allowed one.

The server begins with `session.created`: the model, the settings in force and the limits. Then the
client sends frames and questions in any order, and video goes on while an answer is given. **Every
frame gets exactly one outcome**, `frame.accepted` or `frame.dropped`. A question is answered from
what was seen before it; to ask about a certain frame, wait for its outcome first.

Live sessions (`delivery` `live`, the default) drop frames they cannot keep up with, newest first to
be kept. Sessions with `delivery` `wait` drop none, as long as the client keeps at most
`max_unacknowledged_frames` of them without outcome.

Clients of OpenAI's Realtime API connect unchanged, see [the API](api.md#realtime): its fields and
events stand beside ours. What version 1 of this protocol has from before them stays for as long as
it is version 1, and goes with version 2: `conversation.item.created` beside
`conversation.item.added`; `settings`, `session_id` and `model` beside `session`; `text`, `status`,
`finish_reason` and `usage` of `response.done` beside `response`; an `event_id` in
`session.updated`, `conversation.item.created` and `response.created` that repeats the message's.

## When the connection breaks

The session is kept for `limits.resume_grace_s`: frames and questions that have arrived are worked
on, and what is said about them is kept. Connect again with `?{resume}=1` and send `session.resume`
first, with the number of the last event that arrived. `session.resumed` says how many messages had
arrived; send those after them again, in order. Then nothing is lost and nothing said twice. Events
that came in the meantime follow with their own numbers; only `session.stats` is left out.

It is refused with an `error` and close code 1008: `E-SESSION-GONE` (unknown name or token, too
late, or ended since) and `E-REPLAY-LOST` (more was said than `max_replay_events` and
`max_replay_bytes` hold). When all sessions are taken, a new viewer gets the place of the one who is
away longest. A connection closed with 1000 or 1001 ends its session at once.

## Streams that the server owns

`GET {path}?stream=NAME` subscribes to a [camera of the server's](cameras.md) instead of beginning
a session: `session.created` has `stream` and an empty `resume_token`, the numbers of the events are
the subscriber's own, and a connection that breaks is not resumed. Events are those of the camera's
session, everybody's answers among them, and `stream.updated`; an `error`, `alert.listed` and any
`event_id` come only to who sent the message. Frames, `session.update` and what belongs to others
or to the server's file get `E-SUBSCRIBER`, an unknown name `E-UNKNOWN-STREAM` and close code 1008.
With `&subscribe_pictures=true` a binary message with the JPEG of a frame follows its
`frame.accepted`, with the header below, `sequence` that of the event; one waits at most, so a
slow reader misses some.

## Frames

A binary message is a {size}-byte little-endian header and a picture:

| bytes | field | value |
| --- | --- | --- |
| 0 | version u8 | {version} |
| 1 | type u8 | {jpeg} = JPEG, {raw} = raw, if the session has `raw_frames` |
| 2-3 | flags u16 | 0 |
| 4-5 | stream id u16 | 0 |
| 6-7 | reserved u16 | 0 |
| 8-11 | sequence u32 | rising with each frame of the session |
| 12-15 | payload length u32 | bytes behind the header |
| 16-23 | capture time u64 | microseconds on any clock of the client, rising |

A raw picture is width u16, height u16, little-endian, and 3 bytes (red, green, blue) per pixel, row
by row. `max_message_bytes` holds for it too: by default there is room for 1920x1080.

Reasons for dropping a frame:

| reason | meaning |
| --- | --- |
"""

CLOSING = """\
## How a connection ends

| close code | why |
| --- | --- |
| 1000 | the client sent `session.close` |
| 1001 | the server is stopping, or the camera that was subscribed to is gone; \
`session.go_away` came before, answers under way got their time |
| 1003 | the first message is binary and not of this protocol |
| 1008 | the API key is missing or wrong; no such session to go on with, or another connection \
went on with it; a page from another origin, and a `Host` that is not the server's \
(`E-HOST`), are refused with HTTP 403 before the upgrade |
| 1009 | a message is larger than `max_message_bytes` |
| 1011 | a bug of the server's ended the session; its log has the traceback |
| 1013 | no free session (there is no waiting line; the message says how many are taken), \
the server is stopping, or the client does not read what it is sent |

An `error` event before the close says more. Every other error leaves the session open: its `code`
is one of the codes in `edge_vlm/errors`, and it repeats the `event_id` of the message that
caused it.

## Over HTTP on the same port

`/v1/chat/completions` and `/v1/models` as in [the API](api.md), `/` the browser page, `/healthz`
and `/readyz` (200 or 503), `/version`, `/metrics` (Prometheus).
A `Host` that is not the server's gets 403 and the code `E-HOST`.

A server with an API key wants `Authorization: Bearer KEY` on the websocket and on every path under
`/v1/`, and for `/metrics`; without it HTTP answers 401. A page, which cannot set headers, offers
the subprotocols `edge-vlm` and `edge-vlm-key.` followed by the key in base64url.
"""


def render() -> str:
    """The whole page."""
    parts = [
        INTRODUCTION.format(
            path=protocol.PATH,
            resume=protocol.RESUME_PARAMETER,
            size=protocol.HEADER.size,
            version=protocol.HEADER_VERSION,
            jpeg=protocol.TYPE_JPEG,
            raw=protocol.TYPE_RAW,
        ),
        *(f"| `{reason.value}` | {text} |\n" for reason, text in _drop_reasons()),
        "\n## From the client\n\n",
        *(_section(kind, {"event_id"}) for kind in messages.CLIENT_MESSAGES),
        "`event_id` (string, optional) may stand in every message.\n\n",
        _settings(),
        "## From the server\n\n",
        "`sequence` (integer) stands in every event and rises by one with each. `event_id` "
        "(string) stands in every event, too: that of the message it answers, else a new one.\n\n",
        *(_section(kind, {"sequence"}) for kind in messages.SERVER_EVENTS),
        "### Parts of these\n\n",
        *(_part(kind) for kind in messages.PARTS),
        _limits("Limits of the server, `limits` in `session.created`", ServerLimits),
        _limits("Limits of the model, `model.limits` in `session.created`", ModelLimits),
        CLOSING,
        "\n## JSON schemas\n\n",
        *(_schema(kind) for kind in (*messages.CLIENT_MESSAGES, *messages.SERVER_EVENTS)),
    ]
    return "".join(parts)


def _drop_reasons() -> list[tuple[DropReason, str]]:
    texts = texts_of(DropReason)
    return [(reason, texts[reason.name]) for reason in DropReason]


def _part(kind: Any) -> str:
    return _section(kind, set(), title=f"#### {kind.__name__}\n\n")


def _section(kind: Any, hidden: set[str], title: str | None = None) -> str:
    title = title or f"### `{protocol.tag_of(kind)}`\n\n"
    text = f"{_doc(kind)}\n\n"
    rows = [
        f"| `{name}` | {_type_text(rule)} | {texts_of(kind).get(name, '')} |\n"
        for name, rule in _properties(kind).items()
        if name not in hidden and name != "type"
    ]
    if not rows:
        return title + text
    return title + text + "| field | type | |\n| --- | --- | --- |\n" + "".join(rows) + "\n"


def _doc(kind: Any) -> str:
    inherited = {base.__doc__ for base in kind.__mro__[1:]}
    return "" if kind.__doc__ in inherited else inspect.cleandoc(kind.__doc__ or "")


def _settings() -> str:
    return _limits(
        "Settings, `session` in `session.update` (any of them) and `settings` in `session.created`",
        SessionSettings,
    )


def _limits(title: str, kind: type) -> str:
    texts = texts_of(kind)
    rows = []
    for field in dataclasses.fields(kind):
        default = field.default
        shown = "" if default is dataclasses.MISSING else f"`{json.dumps(default)}`"
        rows.append(f"| `{field.name}` | {shown} | {texts.get(field.name, '')} |\n")
    head = "| field | default | |\n| --- | --- | --- |\n"
    return f"### {title}\n\n{head}{''.join(rows)}\n"


def _properties(kind: Any) -> dict[str, Any]:
    schema = protocol.json_schema(kind)
    definition = schema["$defs"][schema["$ref"].rpartition("/")[2]]
    properties: dict[str, Any] = definition["properties"]
    return properties


def _type_text(rule: dict[str, Any]) -> str:
    if "enum" in rule:
        return " or ".join(f"`{value}`" for value in rule["enum"])
    if "anyOf" in rule:
        return " or ".join(_type_text(part) for part in rule["anyOf"])
    if "$ref" in rule:
        return f"`{rule['$ref'].rpartition('/')[2]}`"
    if rule.get("type") == "array":
        return f"list of {_type_text(rule.get('items', {}))}"
    if rule.get("type") == "object" and "additionalProperties" in rule:
        return f"object of {_type_text(rule['additionalProperties'])}"
    if rule.get("contentEncoding") == "base64":
        return "string, base64"
    return str(rule.get("type", "any"))


def _schema(kind: Any) -> str:
    text = json.dumps(protocol.json_schema(kind), separators=(",", ":"))
    tag = protocol.tag_of(kind)
    return (
        f"<details><summary><code>{tag}</code></summary>\n\n```json\n{text}\n```\n\n</details>\n\n"
    )


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m docs.build_protocol FILE", file=sys.stderr)
        return 2
    Path(arguments[0]).write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
