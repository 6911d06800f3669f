"""What is sent back: OpenAI's objects, with figures of this server in `usage`."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_vlm_runtime import protocol

DONE = b"data: [DONE]\n\n"


@dataclass(kw_only=True)
class Timing:
    """Of one request, on one clock, in seconds."""

    received_s: float
    began_s: float = 0.0
    """When its turn came."""
    first_s: float | None = None
    """When its first text was there."""
    ended_s: float = 0.0

    def figures(self, tokens_per_s: float | None) -> dict[str, float | None]:
        """In milliseconds, None for what there was not. `tokens_per_s`: as the engines' thread
        measured it; here several tokens may arrive at once."""
        first = self.first_s
        return {
            "time_to_first_token_ms": None if first is None else _ms(first - self.received_s),
            "generation_time_ms": _ms(self.ended_s - self.began_s),
            "queue_time_ms": _ms(self.began_s - self.received_s),
            "mean_itl_ms": _ms(1.0 / tokens_per_s) if tokens_per_s else None,
            "tokens_per_second": round(tokens_per_s, 3) if tokens_per_s else None,
        }


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)


@dataclass(kw_only=True)
class Reply:
    """One completion, whole or in chunks."""

    model: str
    ignored: Sequence[str] = ()
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def whole(self, done: protocol.ResponseDone, timing: Timing) -> dict[str, Any]:
        content = done.shown_text.lstrip(" ")  # models begin with the space between two words
        message = {"role": "assistant", "content": content, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": done.finish_reason,
        }
        found = self._object("chat.completion", [choice])
        found["usage"] = usage_of(done, timing)
        return found | self._own(done)

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        return self._object("chat.completion.chunk", [choice])

    def last_chunk(self, done: protocol.ResponseDone, timing: Timing) -> dict[str, Any]:
        """Of `stream_options.include_usage`."""
        found = self._object("chat.completion.chunk", [])
        found["usage"] = usage_of(done, timing)
        return found | self._own(done)

    def _own(self, done: protocol.ResponseDone) -> dict[str, Any]:
        points = [
            {
                "label": point.label,
                "object_id": point.object_id,
                "x": point.x,
                "y": point.y,
                "time_s": point.time_s,
            }
            for point in done.points
        ]
        return {"edge_vlm": {"ignored": list(self.ignored), "points": points}}


def usage_of(done: protocol.ResponseDone, timing: Timing) -> dict[str, Any]:
    usage = done.usage
    prompt = usage.vision_tokens + usage.text_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": usage.output_tokens,
        "total_tokens": prompt + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "image_tokens": usage.vision_tokens},
        **timing.figures(done.tokens_per_s),
    }


def sse(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
