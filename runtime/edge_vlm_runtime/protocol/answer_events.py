"""Answers, piece by piece and whole."""

from __future__ import annotations

from typing import Literal

from edge_vlm_runtime.protocol.base import UNSET, Part, ServerEvent, UnsetType
from edge_vlm_runtime.protocol.responses import RealtimeResponse


class NewestFrame(Part, kw_only=True):
    """The newest frame an answer rests on; all 0 if it rests on none (`detail` `text`)."""

    frame_sequence: int
    time_s: float
    age_s: float
    """Since it arrived, when the question was taken up."""


class Snapshot(Part, kw_only=True):
    """The picture that a question was shown in full detail."""

    frame_sequence: int
    time_s: float
    """Capture time since the first frame of the session."""
    width: int
    """Of the picture as it was sent, in pixels."""
    height: int
    crops: int
    """Pieces it was cut into; a view of the whole comes on top."""
    tokens: int
    encode_ms: float


class PointedAt(Part, kw_only=True):
    """A place that an answer names, read from its text."""

    kind: Literal["point", "track"]
    label: str
    """What the answer calls it."""
    object_id: int
    """Of the same object in all places of one answer and label."""
    x: float
    """From the left edge, 0 to 1 of the picture's width."""
    y: float
    """From the top edge, 0 to 1 of the picture's height."""
    time_s: float
    """Capture time since the first frame of the session."""
    frame_sequence: int | None
    """Frame that the model was shown of that time, or null if there was none near it."""


class ResponseCreated(ServerEvent, tag="response.created"):
    """A question was taken up."""

    response_id: str
    text: str
    """The question."""
    newest_frame: NewestFrame
    snapshot: Snapshot | None = None
    """If the question asked for one."""
    response: RealtimeResponse | UnsetType = UNSET
    """For clients of OpenAI's API."""
    event_id: str | None = None
    """Of the `response.create`."""


class ResponseOutputTextDelta(ServerEvent, tag="response.output_text.delta"):
    """The next piece of an answer."""

    response_id: str
    delta: str
    item_id: str | UnsetType = UNSET
    """Like the next two for clients of OpenAI's API: an answer is one item of one part."""
    output_index: int | UnsetType = UNSET
    content_index: int | UnsetType = UNSET


class Usage(Part, kw_only=True):
    """Tokens an answer was made from."""

    vision_tokens: int
    """Tokens of video and snapshot in the cache, time stamps and markers included."""
    text_tokens: int
    """Tokens of the question, of subtitles and of earlier turns."""
    output_tokens: int


class ResponseDone(ServerEvent, tag="response.done"):
    """`status` is completed, cancelled or failed; `finish_reason` is stop, length (cut after
    `max_answer_tokens`; raise that for the rest) or null.

    `text`, like its deltas, is what the model wrote: its times count from `time_offset_s`, see
    `memory.rebased`, except for 0.0, the stream's first frame. Show `text_in_stream_time`.
    """

    response_id: str
    status: str
    finish_reason: str | None
    text: str
    usage: Usage
    ttft_s: float | None
    """Question received to first text, or null if there was none."""
    tokens_per_s: float | None
    newest_frame: NewestFrame
    kv_tokens: int
    time_offset_s: float
    snapshot: Snapshot | None = None
    """As in `response.created`."""
    points: tuple[PointedAt, ...] = ()
    """Points and tracks in `text`, in its order, with capture times."""
    error_code: str | None = None
    text_in_stream_time: str | None = None
    """`text` with times in seconds since the stream's first frame; null where they are already."""
    frames_shown: int | None = None
    """Frames of the video that were looked at, whole ones; a snapshot is none. Null from an older
    server."""
    frames_accepted: int | None = None
    """Frames accepted until then: what is missing in `frames_shown` was forgotten before, see
    `video` in `session.created`."""

    response: RealtimeResponse | UnsetType = UNSET
    """For clients of OpenAI's API; its `status` is `incomplete` where an answer was cut."""

    @property
    def shown_text(self) -> str:
        """What to read: with the times of the stream."""
        return self.text if self.text_in_stream_time is None else self.text_in_stream_time
