"""What Home Assistant is to know of a server's streams: entities, and each topic's newest value.
No I/O."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from edge_vlm_runtime import protocol
from edge_vlm_runtime.home_assistant.entities import (
    OFF,
    OFFLINE,
    ON,
    ONLINE,
    STATE_KEYS,
    UNKNOWN,
    Place,
    StreamEntities,
)
from edge_vlm_runtime.protocol import alerts as messages

MAX_UNANSWERED = 64
"""Questions of a stream, from anywhere, whose text is kept until they are answered."""
INTERESTING = (
    protocol.ResponseCreated,
    protocol.ResponseDone,
    messages.AlertCreated,
    messages.AlertDeleted,
    messages.AlertTriggered,
    messages.AlertCleared,
)


@dataclass(frozen=True)
class WatchedAlert:
    """An alert of a stream."""

    name: str
    question: str


@dataclass
class _Alert:
    name: str
    question: str
    is_declared: bool
    """Else it was made while the server ran, and goes with its session."""


class _Stream:
    def __init__(self, entities: StreamEntities) -> None:
        self.entities = entities
        self.alerts: dict[str, _Alert] = {}
        """By name."""
        self.names: dict[str, str] = {}
        """Of alerts, by the id that the session gave them."""
        self.questions: dict[str, str] = {}
        """By the id of their answers."""


class HomeStates:
    """Of one server. Lives on one event loop."""

    def __init__(
        self, place: Place, model: str, *, with_pictures: bool, on_news: Callable[[], None]
    ) -> None:
        """`model`: the bundle's name. `on_news`: the outbox has something."""
        self._place = place
        self._model = model
        self._with_pictures = with_pictures
        self._on_news = on_news
        self._streams: dict[str, _Stream] = {}
        self.configs: dict[str, bytes] = {}
        """Discovery messages by topic: all that there should be."""
        self.states: dict[str, bytes] = {}
        """Newest value of each topic."""
        self.outbox: dict[str, bytes] = {}
        """What the broker does not have yet; empty removes a retained message."""

    @property
    def topics(self) -> dict[str, str]:
        """Names of streams by their topics."""
        return {each.entities.topic: name for name, each in self._streams.items()}

    def declare(self, plan: Mapping[str, tuple[WatchedAlert, ...]]) -> None:
        """All streams, and the alerts of each that outlive its session."""
        for name in [name for name in self._streams if name not in plan]:
            self._remove_stream(name)
        for name, alerts in plan.items():
            if name not in self._streams:
                entities = StreamEntities(
                    self._place, name, self._model, with_pictures=self._with_pictures
                )
                self._streams[name] = _Stream(entities)
                for entity in entities.fixed():
                    self._configure(entity.topic, entity.payload)
                self._state(entities.camera_topic, OFFLINE)
            stream = self._streams[name]
            wanted = {alert.name: alert.question for alert in alerts}
            for old in [alert for alert in stream.alerts.values() if alert.is_declared]:
                if old.name not in wanted:
                    self._remove_alert(stream, old.name)
            for alert_name, question in wanted.items():
                self._add_alert(stream, alert_name, question, is_declared=True)

    def _remove_stream(self, name: str) -> None:
        stream = self._streams.pop(name)
        for alert in list(stream.alerts):
            self._remove_alert(stream, alert)
        for entity in stream.entities.fixed():
            self._configure(entity.topic, b"")
        for topic in [each for each in self.states if each.startswith(f"{stream.entities.topic}/")]:
            self._forget(topic)

    def _add_alert(self, stream: _Stream, name: str, question: str, *, is_declared: bool) -> None:
        known = stream.alerts.get(name)
        if known is not None:
            known.is_declared = is_declared = known.is_declared or is_declared
            if known.question == question:
                return
        stream.alerts[name] = _Alert(name, question, is_declared)
        entity = stream.entities.alert(name)
        self._configure(entity.topic, entity.payload)
        # OFF would be a claim while no session watches for it, or refuses to.
        self._alert_state(stream, name, UNKNOWN, {"question": question})

    def _remove_alert(self, stream: _Stream, name: str) -> None:
        del stream.alerts[name]
        self._configure(stream.entities.alert(name).topic, b"")
        topic = stream.entities.alert_topic(name)
        for each in (topic, f"{topic}/details"):
            self._forget(each)

    def note(self, name: str, is_live: bool) -> None:
        """Whether a stream's camera gives pictures."""
        if (stream := self._streams.get(name)) is not None:
            self._state(stream.entities.camera_topic, ONLINE if is_live else OFFLINE)

    def begin(self, name: str) -> None:
        """A stream has a new session: nothing of the one before is left."""
        if (stream := self._streams.get(name)) is None:
            return
        stream.names.clear()
        stream.questions.clear()
        for alert in list(stream.alerts.values()):
            if alert.is_declared:
                self._alert_state(stream, alert.name, UNKNOWN, {"question": alert.question})
            else:
                self._remove_alert(stream, alert.name)

    def take(self, name: str, event: protocol.ServerEvent) -> None:
        """An event, of INTERESTING, of a stream's session."""
        stream = self._streams.get(name)
        if stream is None:
            return
        if isinstance(event, messages.AlertCreated):
            status = event.alert
            alert_name = status.name or status.rule.question
            stream.names[status.alert_id] = alert_name
            self._add_alert(stream, alert_name, status.rule.question, is_declared=False)
            self._alert_state(stream, alert_name, OFF, {"question": status.rule.question})
        elif isinstance(event, messages.AlertDeleted):
            alert_name = stream.names.pop(event.alert_id, "")
            known = stream.alerts.get(alert_name)
            if known is not None and not known.is_declared:
                self._remove_alert(stream, alert_name)
            elif known is not None:  # until it is made anew
                self._alert_state(stream, alert_name, UNKNOWN, {"question": known.question})
        elif isinstance(event, (messages.AlertTriggered, messages.AlertCleared)):
            self._alert_event(stream, event)
        elif isinstance(event, protocol.ResponseCreated):
            stream.questions[event.response_id] = event.text
            while len(stream.questions) > MAX_UNANSWERED:
                stream.questions.pop(next(iter(stream.questions)))
        elif isinstance(event, protocol.ResponseDone):
            question = stream.questions.pop(event.response_id, "")
            if event.status != "cancelled":
                self.answer(name, {"question": question, **answer_fields(event)})

    def _alert_event(
        self, stream: _Stream, event: messages.AlertTriggered | messages.AlertCleared
    ) -> None:
        alert_name = stream.names.get(event.alert_id)
        if alert_name is None or alert_name not in stream.alerts:
            return  # it was removed meanwhile
        details: dict[str, Any] = {
            "question": event.question,
            "camera": stream.entities.name,
            "alert_name": alert_name,
            "probability": round(event.probability, 4),
            "episode": event.episode,
            "at": now(),
        }
        if isinstance(event, messages.AlertCleared):
            details |= {"lasted_s": round(event.lasted_s, 3), "reason": event.reason}
            self._alert_state(stream, alert_name, OFF, details)
            return
        self._alert_state(stream, alert_name, ON, details)
        if self._with_pictures and event.evidence is not None:
            self._state(stream.entities.picture_topic, event.evidence.jpeg)

    def _alert_state(
        self, stream: _Stream, name: str, state: str, details: Mapping[str, Any]
    ) -> None:
        topic = stream.entities.alert_topic(name)
        self._state(f"{topic}/details", to_json(details))  # first: an automation reads it on ON
        self._state(topic, state)

    def answer(self, name: str, fields: Mapping[str, Any]) -> None:
        """What was last said of a stream."""
        if (stream := self._streams.get(name)) is not None:
            self._state(stream.entities.answer_topic, to_json({**fields, "at": now()}))

    # ---- what is to be published -------------------------------------------------------------

    def _configure(self, topic: str, payload: bytes) -> None:
        if payload:
            self.configs[topic] = payload
        else:
            self.configs.pop(topic, None)
        self._put(topic, payload)

    def _state(self, topic: str, payload: str | bytes) -> None:
        value = payload.encode() if isinstance(payload, str) else payload
        self.states[topic] = value
        self._put(topic, value)

    def _forget(self, topic: str) -> None:
        if self.states.pop(topic, None) is not None:
            self._put(topic, b"")

    def _put(self, topic: str, payload: bytes) -> None:
        self.outbox.pop(topic, None)  # to the end: what belongs together stays in order
        self.outbox[topic] = payload
        self._on_news()

    def announce(self) -> None:
        """Puts all of it out anew. Entities come before their states."""
        self.outbox = {**self.outbox, **self.configs, **self.states}
        self._on_news()

    def remove_stale(self, topic: str, payload: bytes) -> None:
        """A discovery message of an earlier run lies there, of what is no more."""
        self._put(topic, b"")
        try:
            config = json.loads(payload)
            states = [str(config[key]) for key in STATE_KEYS if key in config]
        except (ValueError, TypeError, RecursionError):  # not ours, but in our place
            return
        for state in states:
            if state.startswith(self._place.room) and state not in self.states:
                self._put(state, b"")


def answer_fields(event: protocol.ResponseDone) -> dict[str, Any]:
    if event.status == "failed":
        return {"answer": None, "error": event.error_code or "E-INTERNAL"}
    return {
        "answer": event.shown_text,
        "status": event.status,
        "frame_sequence": event.newest_frame.frame_sequence,
        "time_s": event.newest_frame.time_s,
        "age_s": event.newest_frame.age_s,
    }


def to_json(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
