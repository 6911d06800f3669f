"""What Home Assistant is told: entities, their topics and their discovery messages. No I/O.

A stream is a device. Its entities, below BASE/NODE/STREAM, where every part is a name made safe:

    camera    binary sensor   .../camera              online or offline
    alert     binary sensor   .../alert/ALERT         ON or OFF; details in .../alert/ALERT/details
    answer    sensor          .../answer              JSON: question, answer or error, id, at
    picture   image           .../picture             JPEG of the newest alert that began
    ask       text, notify    .../ask                 a question, as text or JSON with an id

https://www.home-assistant.io/integrations/mqtt/#mqtt-discovery
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import edge_vlm
from edge_vlm.errors import ConfigError

ONLINE, OFFLINE, ON, OFF = "online", "offline", "ON", "OFF"
UNKNOWN = "None"
"""Home Assistant's word for a binary sensor whose state nobody knows."""
DEFAULT_PREFIX = "homeassistant"
DEFAULT_BASE = "edge-vlm"
LONGEST_STATE = 255
"""Characters of a state in Home Assistant; the whole answer is in the sensor's attributes."""
PICTURE = "/picture"
"""The end of topics of pictures."""
STATE_KEYS = ("state_topic", "json_attributes_topic", "image_topic")
SEPARATOR = "__"
"""Between names in an id; `safe_name` gives none that holds it."""
ANSWER_TEMPLATE = (
    "{{ (value_json.answer or value_json.error or '') "
    f"| truncate({LONGEST_STATE}, true, '…', 0) }}}}"
)


def safe_name(name: str) -> str:
    """Letters, digits, - and _ alone, as ids and topics may have them. What had to be changed gets
    a digest behind it, so that no two names become one."""
    safe = re.sub(r"[^A-Za-z0-9-]+", "_", name).strip("_-")[:40].strip("_-")
    if safe == name:
        return safe
    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{safe}-{digest}" if safe else digest


@dataclass(frozen=True)
class Place:
    """Where a server's topics are."""

    node: str
    """The server's name, safe."""
    base: str = DEFAULT_BASE
    prefix: str = DEFAULT_PREFIX
    """Home Assistant's `discovery_prefix`."""

    def __post_init__(self) -> None:
        if not self.node or self.node != safe_name(self.node):
            raise ConfigError(
                f"a server cannot be called {self.node!r} on a broker",
                where="node",
                remedy=f"write {safe_name(self.node)!r}, or other letters, digits, - and single _",
            )
        if not self.prefix.strip("/") or set("+#\0") & set(self.prefix):
            raise ConfigError(f"not a topic: {self.prefix!r}", where="discovery_prefix")

    @property
    def status(self) -> str:
        """Whether the server is there; the broker says offline when its connection breaks."""
        return f"{self.base}/{self.node}/status"

    @property
    def owner(self) -> str:
        """Which process uses this node."""
        return f"{self.base}/{self.node}/owner"

    @property
    def birth(self) -> str:
        """Home Assistant says there that it has started."""
        return f"{self.prefix}/status"

    @property
    def questions(self) -> str:
        """A filter: what is asked of any stream."""
        return f"{self.base}/{self.node}/+/ask"

    @property
    def configs(self) -> str:
        """A filter: all discovery messages of this node, also those of an earlier run."""
        return f"{self.prefix}/+/{self.node}/+/config"

    @property
    def room(self) -> str:
        """The beginning of all topics of this server."""
        return f"{self.base}/{self.node}/"

    def stream(self, name: str) -> str:
        return f"{self.room}{safe_name(name)}"


@dataclass(frozen=True)
class Entity:
    """One discovery message."""

    topic: str
    config: Mapping[str, Any] = field(hash=False)

    @property
    def payload(self) -> bytes:
        return json.dumps(self.config, ensure_ascii=False).encode()


class StreamEntities:
    """Of one stream."""

    def __init__(self, place: Place, name: str, model: str, *, with_pictures: bool) -> None:
        """`model`: the bundle's name."""
        self.name = name
        self.topic = place.stream(name)
        self._place = place
        self._id = SEPARATOR.join(("edge-vlm", place.node, safe_name(name)))
        self._common: dict[str, Any] = {
            "qos": 1,
            "device": {
                "identifiers": [self._id],
                "name": name,
                "manufacturer": "edge-vlm",
                "model": model,
                "sw_version": edge_vlm.__version__,
            },
            "origin": {"name": "edge-vlm", "sw_version": edge_vlm.__version__},
        }
        self._with_pictures = with_pictures

    @property
    def camera_topic(self) -> str:
        return f"{self.topic}/camera"

    @property
    def answer_topic(self) -> str:
        return f"{self.topic}/answer"

    @property
    def picture_topic(self) -> str:
        return f"{self.topic}{PICTURE}"

    def alert_topic(self, alert: str) -> str:
        return f"{self.topic}/alert/{safe_name(alert)}"

    def fixed(self) -> list[Entity]:
        """All but the alerts."""
        answer: dict[str, Any] = {
            "state_topic": self.answer_topic,
            "json_attributes_topic": self.answer_topic,
        }
        ask: dict[str, Any] = {"command_topic": f"{self.topic}/ask"}
        found = [
            self._entity(
                "binary_sensor",
                "camera",
                needs_camera=False,
                name="Camera",
                device_class="connectivity",
                entity_category="diagnostic",
                state_topic=self.camera_topic,
                payload_on=ONLINE,
                payload_off=OFFLINE,
            ),
            self._entity(
                "sensor",
                "answer",
                needs_camera=False,  # it stays true when the camera goes
                name="Last answer",
                icon="mdi:comment-eye",
                value_template=ANSWER_TEMPLATE,
                **answer,
            ),
            self._entity("text", "ask", name="Ask", icon="mdi:comment-question", max=255, **ask),
            self._entity("notify", "ask", name="Ask", icon="mdi:comment-question", **ask),
        ]
        if self._with_pictures:
            found.append(
                self._entity(
                    "image",
                    "picture",
                    needs_camera=False,
                    name="Last alert",
                    image_topic=self.picture_topic,
                    content_type="image/jpeg",
                )
            )
        return found

    def alert(self, name: str) -> Entity:
        topic = self.alert_topic(name)
        return self._entity(
            "binary_sensor",
            f"alert{SEPARATOR}{safe_name(name)}",
            name=name,
            icon="mdi:eye-check",
            state_topic=topic,
            payload_on=ON,
            payload_off=OFF,
            json_attributes_topic=f"{topic}/details",
        )

    def _entity(
        self, component: str, kind: str, *, needs_camera: bool = True, **config: Any
    ) -> Entity:
        place = self._place
        needed = [place.status, *([self.camera_topic] if needs_camera else [])]
        object_id = SEPARATOR.join((safe_name(self.name), kind))
        return Entity(
            f"{place.prefix}/{component}/{place.node}/{object_id}/config",
            {
                "unique_id": SEPARATOR.join((self._id, kind)),
                **config,
                "availability": [{"topic": topic} for topic in needed],
                "availability_mode": "all",
                **self._common,
            },
        )
