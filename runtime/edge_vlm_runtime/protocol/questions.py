"""The wire messages that ask: a question at once, or first what the user says. No I/O here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from edge_vlm_runtime.protocol.base import (
    UNSET,
    ClientMessage,
    EventId,
    Part,
    ServerEvent,
    Text,
    UnsetType,
)
from edge_vlm_runtime.protocol.responses import (
    DialogueItem,
    DialoguePart,
    Ignored,
    InputPart,
    OwnResponseOptions,
    ResponseOptions,
)


def lines(pieces: Iterable[str]) -> str:
    """What was said in pieces, as one question."""
    return "\n".join(piece for piece in pieces if piece.strip())


# ---- parts -----------------------------------------------------------------------------------


class UserMessage(Part, forbid_unknown_fields=True, kw_only=True):
    """What the user says, `type` `message`."""

    content: list[InputPart]
    """Its pieces: texts, a line each, and pictures, which become frames before what is said."""
    type: Literal["message"] = "message"
    role: Literal["user"] = "user"
    """Answers are the session's own, and what holds for all of them is its `instructions`."""
    id: EventId | None = None
    """Any name of the client's; it is repeated."""
    object: Ignored = UNSET
    status: Ignored = UNSET

    @property
    def text(self) -> str:
        return lines(part.text for part in self.content if isinstance(part.text, str))


# ---- what a client sends ---------------------------------------------------------------------


class ConversationItemCreate(ClientMessage, tag="conversation.item.create"):
    """What the user says, without asking for an answer yet; answered by
    `conversation.item.created`. The next `response.create` asks all of it, a line each message, and
    uses it up even if the question is refused."""

    item: UserMessage
    previous_item_id: str | UnsetType | None = UNSET
    """Taken and left aside: messages stand in the order in which they come."""


class InputImageBufferAppend(ClientMessage, tag="input_image_buffer.append"):
    """A frame of a camera as clients of DashScope send it: `input_video_frame.append` with the next
    number and the time of arrival."""

    image: bytes
    """A JPEG."""


class ResponseCreate(ClientMessage, tag="response.create"):
    """A question about what was seen so far. Questions wait for each other, frames go on."""

    text: Text = ""
    """The question, without any chat markup; behind the messages of `conversation.item.create` that
    came before it, if there are any. Neither the one nor the other: `E-NO-QUESTION`."""
    detail: Literal["video", "snapshot", "both", "text"] = "video"
    """What is looked at: `video`, what was seen so far; `snapshot`, the newest picture alone, in
    full detail, to read a label; `both`, the video and that picture behind it; `text`, nothing."""
    response: ResponseOptions | UnsetType = UNSET
    """What holds for this answer alone, as OpenAI's clients send it."""


class ResponseCancel(ClientMessage, tag="response.cancel"):
    """Stop one answer, or all answers that are under way or waiting."""

    response_id: str | None = None
    """Of the answer to stop; without it all are stopped, and questions that wait get an `error`."""


# ---- what the server sends -------------------------------------------------------------------


class ConversationItemCreated(ServerEvent, tag="conversation.item.created"):
    """The message waits for `response.create`. Only for clients of version 1 of this protocol; read
    `conversation.item.added`."""

    item: UserMessage
    previous_item_id: str | UnsetType | None = UNSET
    event_id: str | None = None


PARTS: tuple[type[Part], ...] = (
    *(UserMessage, InputPart),
    *(ResponseOptions, OwnResponseOptions, DialogueItem, DialoguePart),
)
CLIENT_MESSAGES: tuple[type[ClientMessage], ...] = (
    ConversationItemCreate,
    InputImageBufferAppend,
    ResponseCreate,
    ResponseCancel,
)
SERVER_EVENTS: tuple[type[ServerEvent], ...] = (ConversationItemCreated,)
