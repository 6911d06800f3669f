"""The wire messages that ask: a question at once, or first what the user says. No I/O here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from edge_vlm_runtime.protocol.base import ClientMessage, EventId, Part, ServerEvent, Text


def lines(pieces: Iterable[str]) -> str:
    """What was said in pieces, as one question."""
    return "\n".join(piece for piece in pieces if piece.strip())


# ---- parts -----------------------------------------------------------------------------------


class InputText(Part, forbid_unknown_fields=True, kw_only=True):
    """A piece of what the user says, `type` `input_text`; pictures come as frames."""

    text: Text
    """Without any chat markup."""
    type: Literal["input_text"] = "input_text"


class UserMessage(Part, forbid_unknown_fields=True, kw_only=True):
    """What the user says, `type` `message`."""

    content: list[InputText]
    """Its pieces, a line each."""
    type: Literal["message"] = "message"
    role: Literal["user"] = "user"
    """Answers are the session's own, and what holds for all of them is its `instructions`."""
    id: EventId | None = None
    """Any name of the client's; it is repeated."""

    @property
    def text(self) -> str:
        return lines(part.text for part in self.content)


# ---- what a client sends ---------------------------------------------------------------------


class ConversationItemCreate(ClientMessage, tag="conversation.item.create"):
    """What the user says, without asking for an answer yet; answered by
    `conversation.item.created`. The next `response.create` asks all of it, a line each message, and
    uses it up even if the question is refused."""

    item: UserMessage


class ResponseCreate(ClientMessage, tag="response.create"):
    """A question about what was seen so far. Questions wait for each other, frames go on."""

    text: Text = ""
    """The question, without any chat markup; behind the messages of `conversation.item.create` that
    came before it, if there are any. Neither the one nor the other: `E-NO-QUESTION`."""
    detail: Literal["video", "snapshot", "both"] = "video"
    """What is looked at: `video`, what was seen so far; `snapshot`, the newest picture alone, in
    full detail, to read a label; `both`, the video and that picture behind it."""


class ResponseCancel(ClientMessage, tag="response.cancel"):
    """Stop one answer, or all answers that are under way or waiting."""

    response_id: str | None = None
    """Of the answer to stop; without it all are stopped, and questions that wait get an `error`."""


# ---- what the server sends -------------------------------------------------------------------


class ConversationItemCreated(ServerEvent, tag="conversation.item.created"):
    """The message waits for `response.create`."""

    item: UserMessage
    event_id: str | None = None


PARTS: tuple[type[Part], ...] = (UserMessage, InputText)
CLIENT_MESSAGES: tuple[type[ClientMessage], ...] = (
    ConversationItemCreate,
    ResponseCreate,
    ResponseCancel,
)
SERVER_EVENTS: tuple[type[ServerEvent], ...] = (ConversationItemCreated,)
