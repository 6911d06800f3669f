"""`POST /v1/chat/completions`: what a body asks for. docs/api.md names every field.

A field has one of four fates: it has its effect, it is taken and left aside (and the reply says
so), it is refused because leaving it aside would be a wrong answer, or it is unknown and refused.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any

from edge_vlm.errors import ProtocolError
from edge_vlm.errors.requests import RequestError, Unsupported
from edge_vlm.pruning.policies import POLICY_NAMES
from edge_vlm_runtime.openai.content import LATEST_S, Conversation, read_messages
from edge_vlm_runtime.openai.fields import Fields, as_number, wrong
from edge_vlm_runtime.protocol.base import json_value

IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "verbosity"),
    *("prompt_cache_key", "prompt_cache_retention", "reasoning_effort", "reasoning"),
    *("frequency_penalty", "presence_penalty", "repetition_penalty", "top_k", "min_p"),
    *("parallel_tool_calls", "chat_template_kwargs", "mm_processor_kwargs", "keep_alive"),
    *("options", "skip_special_tokens", "echo", "priority", "request_id"),
)
"""Have no meaning here, and an answer without them is still an answer to the question."""
NEUTRAL = {
    "logprobs": False,
    "top_logprobs": 0,
    "logit_bias": {},
    "functions": [],
    "function_call": "none",
    "modalities": ["text"],
    "n": 1,
    "best_of": 1,
    "audio": None,
    "prediction": None,
    "web_search_options": None,
    "moderation": None,
}
"""Are refused with any other value than this one."""
DETAILS = ("video", "snapshot", "both")
MAX_STOPS = 4


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """What is asked for."""

    model: str
    conversation: Conversation
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    stop: tuple[str, ...]
    choice: tuple[str, ...]
    """The answer is one of these, if there are any."""
    json_schema: dict[str, Any] | None
    """The answer is JSON of this schema."""
    is_streamed: bool
    includes_usage: bool
    session: str | None
    """Of a live stream that is asked instead of what the request brings."""
    keep_ratio: float | None
    policy: str | None
    detail: str | None
    frame_times: tuple[float, ...]
    """Of the pictures, in seconds, if there are any."""
    num_frames: int | None
    """Of a video; as many as fit else."""
    fps: float | None
    ignored: tuple[str, ...]
    """Fields that were there and have no effect."""


def read_chat_request(body: bytes) -> ChatRequest:
    """Raises RequestError and its leaves."""
    try:
        value = json_value(body)
    except ProtocolError as error:
        raise RequestError(f"the body is {error}") from error
    fields = Fields(value, "")
    model = fields.text("model")
    conversation = read_messages(fields.items("messages"))
    ignored = [name for name in IGNORED if fields.has(name)]
    for name in IGNORED:
        fields.any(name)
    ignored += _read_tools(fields)
    for name, neutral in NEUTRAL.items():
        if fields.has(name) and (found := fields.any(name)) != neutral:
            raise Unsupported(
                f"{name} = {json.dumps(found)[:60]} is not supported",
                param=name,
                remedy=f"leave it out or give {json.dumps(neutral)}",
            )
    form = _read_form(fields)
    stream_options = fields.object("stream_options")
    includes_usage = stream_options.flag("include_usage")
    stream_options.flag("include_obfuscation")
    stream_options.flag("continuous_usage_stats")
    stream_options.require_empty()
    own = fields.object("edge_vlm")
    most = [fields.whole(name, 1) for name in ("max_completion_tokens", "max_tokens")]
    media = fields.object("media_io_kwargs")
    video = media.object("video")
    ignored += [f"media_io_kwargs.{name}" for name in ("image", "audio") if media.any(name)]
    request = ChatRequest(
        model=model,
        conversation=conversation,
        max_tokens=min((each for each in most if each is not None), default=None),
        temperature=fields.number("temperature", 0, 2),
        top_p=_positive(fields.number("top_p", 0, 1), "top_p"),
        seed=_seed(fields),
        stop=_read_stop(fields),
        choice=form[0],
        json_schema=form[1],
        is_streamed=fields.flag("stream"),
        includes_usage=includes_usage,
        session=own.text("session") if own.has("session") else None,
        keep_ratio=_positive(own.number("keep_ratio", 0, 1), "edge_vlm.keep_ratio"),
        policy=own.one_of("policy", POLICY_NAMES, "") if own.has("policy") else None,
        detail=own.one_of("detail", DETAILS, "") if own.has("detail") else None,
        frame_times=_read_times(own.items("frame_times"), len(conversation.pictures)),
        num_frames=_num_frames(video),
        fps=_positive(video.number("fps", -1, 240), "media_io_kwargs.video.fps", least=-1),
        ignored=(*ignored, *(f"media_io_kwargs.video.{name}" for name in video.rest())),
    )
    own.require_empty()
    media.require_empty()
    fields.require_empty()
    if not all(name.isascii() and name.isidentifier() for name in video.rest()):
        video.require_empty()  # they are repeated in a header
    if request.session is not None:
        _require_only_text(request)
    return request


def _positive(value: float | None, path: str, least: float = 0.0) -> float | None:
    if value == 0:
        raise wrong(value, path, "more than 0")
    return None if value is not None and value < 0 and least < 0 else value


def _num_frames(video: Fields) -> int | None:
    """-1, vLLM's word for all of them, is as many as fit."""
    number = video.whole("num_frames", -1, 1 << 20)
    if number == 0:
        raise wrong(number, "media_io_kwargs.video.num_frames", "more than 0, or -1")
    return None if number == -1 else number


def _seed(fields: Fields) -> int | None:
    """OpenAI takes any whole number; the negative ones are folded in."""
    seed = fields.whole("seed", -(1 << 63), (1 << 63) - 1)
    return None if seed is None else seed % (1 << 53)


def _read_tools(fields: Fields) -> list[str]:
    """Names of what is left aside. Raises Unsupported where a call is demanded."""
    tools, chosen = fields.any("tools"), fields.any("tool_choice")
    if chosen not in (None, "auto", "none"):
        raise Unsupported(
            "the model calls no tools, and tool_choice demands a call",
            param="tool_choice",
            remedy="take auto or none, or ask without tools",
        )
    return [name for name, value in (("tools", tools), ("tool_choice", chosen)) if value]


def _read_stop(fields: Fields) -> tuple[str, ...]:
    stop = fields.any("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise wrong(stop, "stop", f"text or a list of up to {MAX_STOPS} texts")
    if not all(isinstance(each, str) and each for each in stops):
        raise wrong(stop, "stop", "texts that are not empty")
    return tuple(stops)


def _read_form(fields: Fields) -> tuple[tuple[str, ...], dict[str, Any] | None]:
    """What the answer must be: one of some texts, or JSON. Raises RequestError."""
    found: list[tuple[str, Any]] = []
    form = fields.object("response_format")
    if form.path and (kind := form.text("type", "text")) != "text":
        if kind == "json_object":
            found.append(("json", {"type": "object"}))
        elif kind == "json_schema":
            found.append(("json", _schema_of(form.object("json_schema"))))
        else:
            raise Unsupported(
                f"response_format of type {kind[:60]!r} is not supported",
                param="response_format.type",
                remedy="text, json_object and json_schema are",
            )
    form.require_empty()
    for path in ("guided_decoding", "structured_outputs"):
        guided = fields.object(path)
        found += [(name, guided.any(name)) for name in ("choice", "json") if guided.has(name)]
        guided.require_empty()
    for name in ("choice", "json"):
        if fields.has(f"guided_{name}"):
            found.append((name, fields.any(f"guided_{name}")))
    if len(found) > 1:
        raise RequestError("the answer is given more than one form", param="response_format")
    if not found:
        return (), None
    (kind, value), path = found[0], "guided_decoding"
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
            raise wrong(value, f"{path}.choice", "a list of texts")
        return tuple(value), None
    if isinstance(value, str):
        try:
            value = json_value(value.encode())
        except ProtocolError as error:
            raise wrong(value, f"{path}.json", "a JSON schema") from error
    if not isinstance(value, dict):
        raise wrong(value, f"{path}.json", "a JSON schema")
    return (), value


def _schema_of(described: Fields) -> dict[str, Any]:
    """`strict` makes no difference: an answer always keeps to its schema."""
    schema = described.any("schema")
    if not isinstance(schema, dict):
        raise wrong(schema, "response_format.json_schema.schema", "an object")
    for name in ("name", "description", "strict"):
        described.any(name)
    described.require_empty()
    return schema


def _read_times(times: list[Any], num_pictures: int) -> tuple[float, ...]:
    path = "edge_vlm.frame_times"
    found = [as_number(t, f"{path}[{i}]", 0.0, LATEST_S) for i, t in enumerate(times)]
    if found and len(found) != num_pictures:
        raise RequestError(f"{len(found)} frame_times for {num_pictures} pictures", param=path)
    if any(later <= earlier for earlier, later in itertools.pairwise(found)):
        raise RequestError("frame_times must rise", param=path)
    return tuple(found)


def _require_only_text(request: ChatRequest) -> None:
    if request.conversation.media:
        raise Unsupported(
            "a live stream is asked about what it has seen, not about other pictures",
            param=request.conversation.media[0].param,
            remedy="leave out the pictures, or edge_vlm.session",
        )
    for name in ("keep_ratio", "policy"):
        if getattr(request, name) is not None:
            raise Unsupported(
                f"{name} is a setting of the live stream",
                param=f"edge_vlm.{name}",
                remedy="change it there with session.update",
            )
