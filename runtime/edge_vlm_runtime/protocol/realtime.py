"""Events that stand beside ours for clients of OpenAI's Realtime API. No I/O here."""

from __future__ import annotations

from edge_vlm_runtime.protocol.base import Part, ServerEvent
from edge_vlm_runtime.protocol.responses import ConversationItem


class ContentPart(Part, kw_only=True):
    text: str
    type: str = "text"


class ConversationItemAdded(ServerEvent, tag="conversation.item.added"):
    """A message is in the conversation: what the user says, or an answer that begins."""

    item: ConversationItem
    previous_item_id: str | None = None


class ConversationItemDone(ServerEvent, tag="conversation.item.done"):
    """The message is whole."""

    item: ConversationItem
    previous_item_id: str | None = None


class ResponseOutputItemAdded(ServerEvent, tag="response.output_item.added"):
    """The message that an answer becomes; an answer has one."""

    response_id: str
    output_index: int
    item: ConversationItem


class ResponseOutputItemDone(ServerEvent, tag="response.output_item.done"):
    """The message is whole."""

    response_id: str
    output_index: int
    item: ConversationItem


class ResponseContentPartAdded(ServerEvent, tag="response.content_part.added"):
    """The text of an answer begins; it is one part."""

    response_id: str
    item_id: str
    output_index: int
    content_index: int
    part: ContentPart


class ResponseContentPartDone(ServerEvent, tag="response.content_part.done"):
    """The text is whole."""

    response_id: str
    item_id: str
    output_index: int
    content_index: int
    part: ContentPart


class ResponseOutputTextDone(ServerEvent, tag="response.output_text.done"):
    """The whole text, which is also that of all deltas."""

    response_id: str
    item_id: str
    output_index: int
    content_index: int
    text: str


PARTS: tuple[type[Part], ...] = (ContentPart,)
SERVER_EVENTS: tuple[type[ServerEvent], ...] = (
    ConversationItemAdded,
    ConversationItemDone,
    ResponseOutputItemAdded,
    ResponseContentPartAdded,
    ResponseOutputTextDone,
    ResponseContentPartDone,
    ResponseOutputItemDone,
)
