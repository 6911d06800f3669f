"""Our events in the shape of OpenAI's Realtime API, so that its clients read them.

What a session says stays as it is, in recordings too; on its way into the log of a connection it is
given OpenAI's fields, and events that only OpenAI's clients look for come beside it. Pure.
"""

from __future__ import annotations

import dataclasses
import itertools
from enum import Enum
from typing import Any

from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol import realtime as ga
from edge_vlm_runtime.protocol.questions import UserMessage
from edge_vlm_runtime.protocol.responses import (
    ConversationItem,
    InputPart,
    OutputPart,
    RealtimeResponse,
    RealtimeSession,
    RealtimeUsage,
    ResponseOptions,
    TokenDetails,
)
from edge_vlm_runtime.protocol.settings import SessionSettings


class RealtimeShape:
    """Of one session. Gets all of its events, in order."""

    def __init__(self, session_id: str, model_id: str) -> None:
        self._session_id = session_id
        self._model_id = model_id
        self._conversation_id = f"conv_{session_id}"
        self._items = itertools.count(1)
        self._questions = itertools.count(1)
        self._last_item: str | None = None
        self._options: dict[str, ResponseOptions] = {}
        """Of questions that wait, by `event_id`."""
        self._answers: dict[str, ResponseOptions] = {}
        """Of answers under way, by `response_id`."""
        self._max_tokens = 0

    def asked(self, message: protocol.ResponseCreate) -> None:
        """Keeps what the answer is to repeat; gives the message an `event_id` for it."""
        if isinstance(message.response, ResponseOptions):
            if message.event_id is None:
                message.event_id = f"question_{next(self._questions)}"
            self._options[message.event_id] = message.response

    def dress(self, event: protocol.ServerEvent) -> list[protocol.ServerEvent]:
        """The event itself, among those that belong to it."""
        if isinstance(event, (protocol.SessionCreated, protocol.SessionUpdated)):
            self._max_tokens = event.settings.max_answer_tokens
            event.session = self._session(event.settings)
        elif isinstance(event, protocol.ConversationItemCreated):
            return self._user_item(event)
        elif isinstance(event, protocol.ResponseCreated):
            return self._begin(event)
        elif isinstance(event, protocol.ResponseOutputTextDelta):
            event.item_id = _item_id(event.response_id)
            event.output_index = event.content_index = 0
        elif isinstance(event, protocol.ResponseDone):
            return self._end(event)
        elif isinstance(event, protocol.Error):
            self._options.pop(event.error.event_id or "", None)
        return [event]

    def _session(self, settings: SessionSettings) -> RealtimeSession:
        own = {
            name: value.value if isinstance(value, Enum) else value
            for name, value in dataclasses.asdict(settings).items()
        }
        return RealtimeSession(
            id=self._session_id,
            model=self._model_id,
            instructions=settings.instructions,
            max_output_tokens=settings.max_answer_tokens,
            temperature=settings.temperature,
            edge_vlm=own,
        )

    # ---- items -------------------------------------------------------------------------------

    def _user_item(self, event: protocol.ConversationItemCreated) -> list[protocol.ServerEvent]:
        item_id = event.item.id or f"item_{self._session_id}_{next(self._items)}"
        event.item.id = item_id
        item = ConversationItem(
            id=item_id, role="user", content=[_echo(part) for part in event.item.content]
        )
        before, self._last_item = self._last_item, item_id
        event.previous_item_id = before
        return [
            ga.ConversationItemAdded(item=item, previous_item_id=before),
            event,
            ga.ConversationItemDone(item=item, previous_item_id=before),
        ]

    def _begin(self, event: protocol.ResponseCreated) -> list[protocol.ServerEvent]:
        options = self._options.pop(event.event_id or "", None) or ResponseOptions()
        self._answers[event.response_id] = options
        event.response = self._response(event.response_id, options, "in_progress", [])
        item = _answer_item(event.response_id, "", "in_progress", [])
        before = self._last_item
        if options.conversation != "none":
            self._last_item = item.id
        return [
            event,
            ga.ResponseOutputItemAdded(response_id=event.response_id, output_index=0, item=item),
            *self._in_conversation(
                options, ga.ConversationItemAdded(item=item, previous_item_id=before)
            ),
            ga.ResponseContentPartAdded(**_place(event.response_id), part=ga.ContentPart(text="")),
        ]

    def _in_conversation(
        self, options: ResponseOptions, event: protocol.ServerEvent
    ) -> list[protocol.ServerEvent]:
        return [] if options.conversation == "none" else [event]

    def _end(self, event: protocol.ResponseDone) -> list[protocol.ServerEvent]:
        options = self._answers.pop(event.response_id, ResponseOptions())
        status = event.status
        details: dict[str, Any] | None = {"type": status}
        if status == "completed" and event.finish_reason == "length":
            status = "incomplete"
            details = {"type": status, "reason": "max_output_tokens"}
        elif status == "cancelled":
            details = {"type": status, "reason": "client_cancelled"}
        elif status == "failed":
            details = {"type": status, "error": {"type": "server_error", "code": event.error_code}}
        part = OutputPart(text=event.text)
        item_status = "completed" if status == "completed" else "incomplete"
        item = _answer_item(event.response_id, event.text, item_status, [part])
        event.response = self._response(event.response_id, options, status, [item])
        event.response.status_details = details
        event.response.usage = _usage(event.usage)
        place = _place(event.response_id)
        return [
            ga.ResponseOutputTextDone(**place, text=event.text),
            ga.ResponseContentPartDone(**place, part=ga.ContentPart(text=event.text)),
            ga.ResponseOutputItemDone(response_id=event.response_id, output_index=0, item=item),
            *self._in_conversation(options, ga.ConversationItemDone(item=item)),
            event,
        ]

    def _response(
        self, name: str, options: ResponseOptions, status: str, output: list[ConversationItem]
    ) -> RealtimeResponse:
        asked = options.max_output_tokens
        most = min(asked, self._max_tokens) if isinstance(asked, int) else self._max_tokens
        metadata = options.metadata
        return RealtimeResponse(
            id=name,
            status=status,
            output=output,
            max_output_tokens=most,
            conversation_id=None if options.conversation == "none" else self._conversation_id,
            metadata=metadata if isinstance(metadata, dict) else None,
        )


def _echo(part: InputPart) -> dict[str, Any]:
    if isinstance(part.text, str):
        return {"type": part.type, "text": part.text}
    return {"type": part.type}


def without_pictures(item: UserMessage) -> UserMessage:
    """The same without the data of its pictures."""
    content = [
        InputPart(type=part.type, image_url="") if part.type == "input_image" else part
        for part in item.content
    ]
    return UserMessage(content=content, id=item.id)


def _item_id(response_id: str) -> str:
    return f"item_{response_id}"


def _place(response_id: str) -> dict[str, Any]:
    """Of a text in its answer, which is one item of one part."""
    return {
        "response_id": response_id,
        "item_id": _item_id(response_id),
        "output_index": 0,
        "content_index": 0,
    }


def _answer_item(
    response_id: str, text: str, status: str, parts: list[OutputPart]
) -> ConversationItem:
    return ConversationItem(
        id=_item_id(response_id),
        role="assistant",
        content=[{"type": part.type, "text": part.text} for part in parts],
        status=status,
    )


def _usage(usage: protocol.Usage) -> RealtimeUsage:
    read = usage.vision_tokens + usage.text_tokens
    return RealtimeUsage(
        input_tokens=read,
        output_tokens=usage.output_tokens,
        total_tokens=read + usage.output_tokens,
        input_token_details=TokenDetails(
            text_tokens=usage.text_tokens, image_tokens=usage.vision_tokens
        ),
        output_token_details=TokenDetails(text_tokens=usage.output_tokens),
    )
