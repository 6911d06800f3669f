"""What an OpenAI client says besides our own fields: pieces of items, sessions and responses.

Fields that have no meaning for a model of video and text are taken and left aside; what is in force
stands in `session.updated` and `response.created`. No I/O here.
"""

from __future__ import annotations

from typing import Any, Literal

from edge_vlm_runtime.protocol.base import UNSET, CaptureTimeUs, EventId, Part, Text, UnsetType

Ignored = Any | UnsetType
"""Of OpenAI's API, without a meaning here."""


class InputPart(Part, forbid_unknown_fields=True, kw_only=True):
    """A piece of what the user says: `type` `input_text` has `text`, `input_image` has
    `image_url`."""

    text: Text | UnsetType = UNSET
    """Without any chat markup."""
    image_url: str | UnsetType = UNSET
    """A data URI of a JPEG, PNG, WebP or GIF: a frame that no drop rule holds for."""
    detail: Literal["auto", "low", "high"] | UnsetType = UNSET
    """Taken and left aside: every frame is seen alike; see `detail` of `response.create`."""
    capture_time_us: CaptureTimeUs | UnsetType = UNSET
    """Of a picture, as in the binary header; without it the time of its arrival counts."""
    type: Literal["input_text", "input_image"] = "input_text"

    def __post_init__(self) -> None:
        if (self.type == "input_text") != isinstance(self.text, str):
            raise ValueError(f"Object missing required field `text`, or a {self.type} has one")
        if (self.type == "input_image") != isinstance(self.image_url, str):
            raise ValueError(f"Object missing required field `image_url`, or a {self.type} has one")


class DialoguePart(Part, forbid_unknown_fields=True, kw_only=True):
    """A piece of an earlier turn."""

    text: Text
    type: Literal["input_text", "output_text", "text"] = "input_text"


class DialogueItem(Part, forbid_unknown_fields=True, kw_only=True):
    """A turn of the dialogue in `input`."""

    content: list[DialoguePart]
    role: Literal["user", "assistant", "system"] = "user"
    type: Literal["message"] = "message"
    id: EventId | None = None
    object: Ignored = UNSET
    status: Ignored = UNSET

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content if part.text.strip())


class OwnResponseOptions(Part, forbid_unknown_fields=True, kw_only=True):
    """What only this server knows of an answer."""

    temperature: float | UnsetType = UNSET
    """Of this answer; else the session's, like the next two."""
    top_p: float | UnsetType = UNSET
    seed: int | UnsetType = UNSET
    stop: list[str] | UnsetType = UNSET
    """The answer ends before any of these texts."""
    choice: list[str] | UnsetType = UNSET
    """The answer is one of these texts."""
    json_schema: dict[str, Any] | UnsetType = UNSET
    """The answer is JSON of this schema."""


class ResponseOptions(Part, forbid_unknown_fields=True, kw_only=True):
    """`response` in `response.create`, as OpenAI's SDK sends it: of this answer alone."""

    instructions: Text | UnsetType = UNSET
    """Instead of the session's."""
    max_output_tokens: int | Literal["inf"] | UnsetType | None = UNSET
    """Fewer than the session's `max_answer_tokens`; more has no effect."""
    input: list[DialogueItem] | UnsetType = UNSET
    """The dialogue to answer, instead of what was said and of earlier turns. The last item is the
    question."""
    conversation: Literal["auto", "none"] | UnsetType = UNSET
    """`none`: later questions are not shown this one."""
    metadata: dict[str, str] | UnsetType | None = UNSET
    """Repeated in `response.created` and `response.done`."""
    temperature: float | UnsetType | None = UNSET
    edge_vlm: OwnResponseOptions | UnsetType = UNSET
    output_modalities: Ignored = UNSET
    modalities: Ignored = UNSET
    audio: Ignored = UNSET
    output_audio_format: Ignored = UNSET
    voice: Ignored = UNSET
    tools: Ignored = UNSET
    tool_choice: Ignored = UNSET
    parallel_tool_calls: Ignored = UNSET
    prompt: Ignored = UNSET
    reasoning: Ignored = UNSET


class RealtimeSession(Part, kw_only=True):
    """The settings in force in the shape of OpenAI's API."""

    id: str
    model: str
    instructions: str
    max_output_tokens: int
    temperature: float
    edge_vlm: dict[str, Any]
    """As `settings`."""
    type: str = "realtime"
    object: str = "realtime.session"
    output_modalities: tuple[str, ...] = ("text",)
    tools: tuple[Any, ...] = ()
    tool_choice: str = "none"
    turn_detection: None = None


class OutputPart(Part, kw_only=True):
    """A piece of an answer."""

    text: str
    type: str = "output_text"


class ConversationItem(Part, kw_only=True):
    """A message of the conversation in the shape of OpenAI's API. Pictures are not repeated."""

    id: str
    role: str
    content: list[dict[str, Any]]
    status: str = "completed"
    type: str = "message"
    object: str = "realtime.item"


class TokenDetails(Part, kw_only=True):
    text_tokens: int
    image_tokens: int = 0
    cached_tokens: int = 0
    audio_tokens: int = 0


class RealtimeUsage(Part, kw_only=True):
    """Tokens in the shape of OpenAI's API; `image_tokens` are those of video and snapshot."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_token_details: TokenDetails
    output_token_details: TokenDetails


class RealtimeResponse(Part, kw_only=True):
    """An answer in the shape of OpenAI's API."""

    id: str
    status: str
    """in_progress, completed, incomplete (cut at its length), cancelled or failed."""
    output: list[ConversationItem]
    max_output_tokens: int
    conversation_id: str | None
    metadata: dict[str, str] | None = None
    status_details: dict[str, Any] | None = None
    usage: RealtimeUsage | None = None
    object: str = "realtime.response"
    output_modalities: tuple[str, ...] = ("text",)
