"""The messages of a chat request: what holds for all answers, earlier turns, the question, and what
is to be looked at."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edge_vlm.errors.requests import RequestError, Unsupported
from edge_vlm_runtime.openai.fields import Fields, wrong

STAMP = re.compile(r"\s*<(\d+(?:\.\d+)?) seconds?>\s*")
"""A text part before a picture that says when it was taken, as lmms-eval writes it."""
LATEST_S = 1e6
"""The largest time of a picture, in seconds."""


@dataclass(frozen=True, kw_only=True)
class Media:
    """A picture or a video that a message names."""

    kind: Literal["picture", "video"]
    url: str
    param: str
    """Where it stands in the request."""
    is_low: bool = False
    """`detail` says that a small view of the picture will do."""
    time_s: float | None = None
    """When it was taken, if the message says so."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """All messages of a request."""

    instructions: str
    turns: tuple[Turn, ...]
    """The last one is the user's."""
    media: tuple[Media, ...]
    """In their order, of all messages."""

    @property
    def pictures(self) -> tuple[Media, ...]:
        return tuple(each for each in self.media if each.kind == "picture")


def read_messages(messages: list[Any]) -> Conversation:
    """Raises RequestError and its leaves."""
    if not messages:
        raise wrong(None, "messages", "a list of one or more messages")
    instructions: list[str] = []
    turns: list[Turn] = []
    media: list[Media] = []
    for number, message in enumerate(messages):
        path = f"messages[{number}]"
        fields = Fields(message, path)
        role = fields.text("role")
        if role in ("tool", "function") or fields.has("tool_calls"):
            raise Unsupported("the model calls no tools", param=path, remedy="ask without tools")
        if role not in ("system", "developer", "user", "assistant"):
            raise wrong(role, f"{path}.role", "system, developer, user or assistant")
        texts, found = _read_content(fields.any("content"), f"{path}.content")
        if found and role != "user":
            raise Unsupported(
                "only a user's message holds pictures and videos", param=found[0].param
            )
        text = "\n".join(texts)
        if role in ("system", "developer"):
            instructions.append(text)
        else:
            turns.append(Turn(role="assistant" if role == "assistant" else "user", text=text))
            media += found
    if not turns or turns[-1].role != "user":
        raise RequestError("the last message must be the user's", param="messages")
    if not turns[-1].text.strip():
        raise RequestError(
            "the last message has no text: there is no question",
            param=f"messages[{len(messages) - 1}].content",
        )
    videos = [each for each in media if each.kind == "video"]
    if len(videos) > 1 or (videos and len(media) > 1):
        raise Unsupported(
            "one video, or pictures, in all messages together",
            param=videos[-1].param,
            remedy="ask about one at a time",
        )
    return Conversation(
        instructions="\n".join(text for text in instructions if text.strip()),
        turns=tuple(turns),
        media=tuple(media),
    )


def _read_content(content: object, path: str) -> tuple[list[str], list[Media]]:
    """Texts, and pictures and videos."""
    if content is None:
        return [], []
    if isinstance(content, str):
        return [content], []
    if not isinstance(content, list):
        raise wrong(content, path, "text or a list of parts")
    parts = [_read_part(part, f"{path}[{number}]") for number, part in enumerate(content)]
    stamped = _stamped(parts)
    texts = [part for part in stamped if isinstance(part, str)]
    return texts, [part for part in stamped if isinstance(part, Media)]


def _read_part(part: object, path: str) -> str | Media:
    fields = Fields(part, path)
    kind = fields.text("type")
    if kind in ("text", "input_text", "output_text"):
        return fields.text("text")
    if kind == "refusal":
        return fields.text("refusal")
    if kind == "image_url":
        return _read_picture(fields, path)
    if kind == "video_url":
        inner = fields.any("video_url")
        url = inner if isinstance(inner, str) else Fields(inner, f"{path}.video_url").text("url")
        return Media(kind="video", url=url, param=f"{path}.video_url.url")
    raise Unsupported(
        f"a part of type {kind[:60]!r} is not supported",
        param=f"{path}.type",
        remedy="text, image_url and video_url are",
    )


def _read_picture(fields: Fields, path: str) -> Media:
    inner = fields.any("image_url")
    if isinstance(inner, str):
        return Media(kind="picture", url=inner, param=f"{path}.image_url")
    image = Fields(inner, f"{path}.image_url")
    detail = image.one_of("detail", ("auto", "low", "high", "original"), "auto")
    return Media(
        kind="picture",
        url=image.text("url"),
        param=f"{path}.image_url.url",
        is_low=detail == "low",
    )


def _stamped(parts: Sequence[str | Media]) -> list[str | Media]:
    """Pictures take over the time before them, if every one has one."""
    stamps: dict[int, float] = {}
    for place, part in enumerate(parts[1:], 1):
        before = parts[place - 1]
        if isinstance(part, Media) and part.kind == "picture" and isinstance(before, str):
            match = STAMP.fullmatch(before)
            if match is not None:
                stamps[place] = float(match[1])
                if stamps[place] > LATEST_S:
                    raise RequestError(
                        f"a picture's time is at most {LATEST_S:g} seconds", param=part.param
                    )
    pictures = [p for p in parts if isinstance(p, Media) and p.kind == "picture"]
    if not pictures or len(stamps) != len(pictures):
        return list(parts)
    timed: list[str | Media] = []
    for place, part in enumerate(parts):
        if place + 1 in stamps:
            continue
        if isinstance(part, Media) and place in stamps:
            timed.append(
                Media(
                    kind=part.kind,
                    url=part.url,
                    param=part.param,
                    is_low=part.is_low,
                    time_s=stamps[place],
                )
            )
        else:
            timed.append(part)
    return timed
