"""Receivers with a name: the tables `[[sink]]` of a configuration file.

    [[sink]]
    name = "phone"
    url = "https://ntfy.sh/"                       # http(s):// or mqtt(s)://
    headers = { Authorization = { file = "ntfy-token.txt" } }
    secret_file = "webhook-key.txt"                # signs what is sent
    template = '{"topic": "door", "message": "${camera}: ${alert_name} ${event}"}'
    events = ["alert.triggered"]

Whatever may be a secret can stand in a file or a variable: `{ file = "PATH" }` or
`{ env = "NAME" }` in place of a text. Light to import: opening loads the libraries.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_vlm.errors import ConfigError
from edge_vlm_runtime.alert_sinks.evidence import EvidenceSize

if TYPE_CHECKING:
    from edge_vlm_runtime.alert_sinks.dispatcher import Sink

EVENTS = ("alert.triggered", "alert.cleared")
KEYS = (
    *("name", "url", "headers", "secret_file", "secret_env", "template", "template_file"),
    *("evidence", "events"),
)
WEBHOOK_ONLY = ("headers", "secret_file", "secret_env", "template", "template_file")
OUR_HEADERS = ("content-length", "transfer-encoding", "host", "idempotency-key", "connection")
MAX_NAME = 64


@dataclass(frozen=True, kw_only=True)
class SinkTable:
    """One table, its secrets read, not yet opened."""

    name: str
    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    secret: str | None = field(default=None, repr=False)
    template: str | None = None
    evidence: EvidenceSize | None = None
    """None: as the server's option says."""
    events: frozenset[str] = frozenset(EVENTS)
    where: str = ""
    """File and table, for messages."""

    def open(self, evidence: EvidenceSize) -> Sink:
        """Raises ConfigError, MissingExtraError."""
        size = self.evidence or evidence
        if self.url.startswith(("mqtt://", "mqtts://")):
            from edge_vlm_runtime.alert_sinks.mqtt import MqttSink

            try:
                return MqttSink(self.url, size, name=self.name)
            except ConfigError as error:  # which shows the address
                raise ConfigError(
                    "url is not an MQTT topic", where=self.where, remedy=error.remedy
                ) from None
        from edge_vlm_runtime.alert_sinks.signature import Signer
        from edge_vlm_runtime.alert_sinks.template import JSON_TYPE, BodyTemplate
        from edge_vlm_runtime.alert_sinks.webhook import WebhookSink

        kinds = [value for name, value in self.headers.items() if name.lower() == "content-type"]
        template = None
        if self.template is not None:
            kind = kinds[0] if kinds else JSON_TYPE
            template = BodyTemplate(self.template, kind, self.where)
            if template.has_picture and size is EvidenceSize.NONE:
                raise ConfigError(
                    "the template wants ${picture}, and no pictures are sent",
                    where=self.where,
                    remedy='evidence = "small" there, or a template without it',
                )
        return WebhookSink(
            self.url,
            size,
            name=self.name,
            headers=self.headers,
            signer=None if self.secret is None else Signer(self.secret, self.where),
            template=template,
        )


def read_sinks(
    tables: object, file: Path, environment: Mapping[str, str] = os.environ
) -> list[SinkTable]:
    """What the key `sink` of a file holds. Relative paths are meant from its folder.

    Raises ConfigError naming the file, the table, the key and what would be right.
    """
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError("sink must be tables", where=file, remedy="write [[sink]] above each")
    found: list[SinkTable] = []
    for number, table in enumerate(tables, 1):
        sink = _Reader(table, number, file, environment).read()
        if any(sink.name == other.name for other in found):
            raise ConfigError(
                f"two sinks are called {sink.name!r}",
                where=sink.where,
                remedy="alerts name their sinks, so each needs a name of its own",
            )
        found.append(sink)
    return found


class _Reader:
    def __init__(
        self, table: dict[str, Any], number: int, file: Path, environment: Mapping[str, str]
    ) -> None:
        self._table, self._file, self._environment = table, file, environment
        name = table.get("name")
        label = f"{name!r}" if isinstance(name, str) else f"number {number}"
        self._where = f"{file}, [[sink]] {label}"

    def read(self) -> SinkTable:
        table = self._table
        for key in table:
            if key not in KEYS:
                near = next(iter(difflib.get_close_matches(key, KEYS, n=1)), None)
                hint = f"did you mean {near}? " if near else ""
                raise self._wrong(
                    f"unknown key {key!r}",
                    f"{hint}keys: {', '.join(KEYS)}; what the server is given stands above the "
                    "first [[...]]",
                )
        name = self._text("name")
        if name is None or not name.strip() or len(name) > MAX_NAME or not name.isprintable():
            raise self._wrong(
                f"a sink needs a name, one line of at most {MAX_NAME} characters",
                'such as name = "phone"',
            )
        url = self._secret_text("url", table.get("url"))
        if not url.startswith(("http://", "https://", "mqtt://", "mqtts://")):
            raise self._wrong("url is no address of a receiver", "http(s):// or mqtt(s)://")
        if url.startswith("mqtt"):
            for key in WEBHOOK_ONLY:
                if key in table:
                    raise self._wrong(f"{key} is for webhooks, not for MQTT", "leave it out")
        return SinkTable(
            name=name,
            url=url,
            headers=self._headers(),
            secret=self._one_of("secret", read_env=True),
            template=self._one_of("template", read_env=False),
            evidence=self._evidence(),
            events=self._events(),
            where=self._where,
        )

    def _wrong(self, what: str, remedy: str) -> ConfigError:
        return ConfigError(what, where=self._where, remedy=remedy)

    def _text(self, key: str) -> str | None:
        value = self._table.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(f"{key} must be a text, got {value!r}", f'such as {key} = "..."')
        return value

    def _secret_text(self, key: str, value: object) -> str:
        """A text, or what the file or variable holds that stands in its place."""
        if isinstance(value, str):
            return value
        if isinstance(value, dict) and len(value) == 1:
            ((kind, place),) = value.items()
            if kind == "file" and isinstance(place, str):
                return self._file_text(key, place).strip()
            if kind == "env" and isinstance(place, str):
                return self._variable(key, place)
        remedy = f'such as {key} = "...", {{ file = "PATH" }} or {{ env = "NAME" }}'
        raise self._wrong(f"{key} must be a text or say where one is", remedy)

    def _file_text(self, key: str, place: str) -> str:
        path = self._file.absolute().parent / Path(place).expanduser()
        try:
            return path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise self._wrong(f"{key}: {path} cannot be read: {reason}", "name a text") from error

    def _variable(self, key: str, name: str) -> str:
        value = self._environment.get(name)
        if not value:
            raise self._wrong(f"{key}: the variable {name} is not set", "set it")
        return value

    def _one_of(self, key: str, *, read_env: bool) -> str | None:
        """A secret, by `KEY_file` or `KEY_env`; a template, by `KEY` or `KEY_file`."""
        other = f"{key}_env" if read_env else key
        file, rest = self._text(f"{key}_file"), self._text(other)
        if file is not None and rest is not None:
            raise self._wrong(f"{key}_file and {other} exclude each other", "leave one out")
        if file is not None:
            text = self._file_text(f"{key}_file", file)
            return text.strip() if read_env else text
        return self._variable(other, rest) if read_env and rest is not None else rest

    def _headers(self) -> dict[str, str]:
        given = self._table.get("headers", {})
        if not isinstance(given, dict):
            raise self._wrong("headers must be a table", 'such as { Title = "Door" }')
        headers: dict[str, str] = {}
        for name, value in given.items():
            text = self._secret_text(f"headers.{name}", value)
            if name.lower() in OUR_HEADERS or name.lower().startswith("webhook-"):
                raise self._wrong(f"the header {name} is ours to set", "leave it out")
            if not (name and name.replace("-", "").replace("_", "").isalnum() and name.isascii()):
                raise self._wrong(f"not a header's name: {name!r}", "letters, digits and -")
            if not text.isascii() or not text.isprintable():  # the text may be a secret
                raise self._wrong(f"the header {name} is not one line of ASCII", "encode the rest")
            if name.lower() in {other.lower() for other in headers}:
                raise self._wrong(f"the header {name} stands there twice", "leave one out")
            headers[name] = text
        return headers

    def _evidence(self) -> EvidenceSize | None:
        text = self._text("evidence")
        try:
            return None if text is None else EvidenceSize(text)
        except ValueError:
            sizes = ", ".join(size.value for size in EvidenceSize)
            raise self._wrong(f"evidence cannot be {text!r}", f"one of {sizes}") from None

    def _events(self) -> frozenset[str]:
        given = self._table.get("events", list(EVENTS))
        if not isinstance(given, list) or not given or not set(map(str, given)) <= set(EVENTS):
            raise self._wrong(
                f"events cannot be {given!r}", f"a list of {' and '.join(EVENTS)}, or one of them"
            )
        return frozenset(given)
