"""The body of a webhook as its receiver wants it: a text with `${field}`s, escaped for what it
is."""

from __future__ import annotations

import difflib
import json
import string
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote_plus

from edge_vlm.errors import ConfigError
from edge_vlm_runtime.protocol import alerts as messages

JSON_TYPE = "application/json"
HEAD = ("id", "type", "at", "session_id")
"""What every event has besides its own fields."""
MADE = ("alert_name", "camera", "event", "picture", "probability_percent")
"""What a template may name besides: `event` is begins or ends, `picture` a JPEG in base64. A
session that is no camera's goes by its id, an alert without a name by its question."""
LEFT_OUT = ("sequence", "evidence")
NUMBERS = frozenset({"episode", "frame_sequence", "probability", "probability_percent", "time_s"})
"""What every event has; in JSON these need no quotes."""
FIELDS = frozenset(
    {*HEAD, *MADE}
    | {*messages.AlertTriggered.__struct_fields__, *messages.AlertCleared.__struct_fields__}
) - {*LEFT_OUT}
_WORST = 'a "quote",\n\\ and {braces}'
"""A value that shows whether a template still is what it should be, whatever a camera is called."""


def _in_json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _as_it_is(text: str) -> str:
    return text


_ESCAPES: Mapping[str, Callable[[str], str]] = {
    JSON_TYPE: _in_json,
    "application/x-www-form-urlencoded": quote_plus,
    "text/plain": _as_it_is,
    "text/markdown": _as_it_is,
}


class BodyTemplate:
    """One text. What an event has no value for is empty there."""

    def __init__(self, text: str, content_type: str = JSON_TYPE, where: object = None) -> None:
        """Raises ConfigError for a field that does not exist, for a kind of content that is not
        known, and for what would not be JSON."""
        kind = content_type.partition(";")[0].strip().lower()
        if kind not in _ESCAPES:
            raise ConfigError(
                f"no template can be filled in for the content type {content_type!r}",
                where=where,
                remedy=f"there are {', '.join(_ESCAPES)}",
            )
        self._escape = _ESCAPES[kind]
        self._template = string.Template(text)
        try:
            self._names = {
                match["named"] or match["braced"]
                for match in string.Template.pattern.finditer(text)
                if match["escaped"] is None
            }
            if None in self._names:
                raise ValueError("a lone $")
        except ValueError:
            raise ConfigError(
                "a $ is neither $$ nor ${field}", where=where, remedy="write $$ for the character"
            ) from None
        for name in sorted(self._names - FIELDS):
            near = next(iter(difflib.get_close_matches(name, sorted(FIELDS), n=1)), None)
            hint = f"did you mean {near}? " if near else ""
            raise ConfigError(
                f"no event has a field {name!r}",
                where=where,
                remedy=f"{hint}fields: {', '.join(sorted(FIELDS))}",
            )
        if kind == JSON_TYPE:
            try:
                for sample in (_WORST, ""):
                    texts = {n: "0.5" if n in NUMBERS else sample for n in self._names}
                    json.loads(self._filled(texts))
            except ValueError as error:
                raise ConfigError(
                    f"filled in, the template is not JSON: {error}",
                    where=where,
                    remedy='a text stands between quotes, such as "text": "${camera}"',
                ) from None

    @property
    def has_picture(self) -> bool:
        return "picture" in self._names

    def fill(self, event: Mapping[str, Any]) -> bytes:
        """`event`: as a receiver without template gets it, the picture as `evidence.jpeg`."""
        known = {name: value for name, value in event.items() if name not in LEFT_OUT}
        evidence = event.get("evidence") or {}
        known["camera"] = event.get("camera") or event["session_id"]
        known["alert_name"] = event.get("alert_name") or event["question"]
        known["event"] = "begins" if event["type"].endswith("triggered") else "ends"
        known["picture"] = evidence.get("jpeg", "")
        known["probability_percent"] = f"{100 * event['probability']:.0f}"
        return self._filled({name: _text(known.get(name)) for name in self._names}).encode()

    def _filled(self, texts: Mapping[str, str]) -> str:
        return self._template.substitute({name: self._escape(text) for name, text in texts.items()})


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):  # not `:g`: a stream's time has more than six digits
        return f"{value:.3f}".rstrip("0").rstrip(".")
    return str(value)
