"""Alerts as MQTT messages. The only module that imports aiomqtt."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
from typing import Any
from urllib.parse import unquote, urlsplit

from edge_vlm.errors import (
    ConfigError,
    DeliveryError,
    DeliveryRefused,
    MissingExtraError,
)
from edge_vlm.waiting import cancel, within
from edge_vlm_runtime.alert_sinks.evidence import EvidenceSize
from edge_vlm_runtime.alert_sinks.picture_limit import PictureLimit
from edge_vlm_runtime.alert_sinks.queue import QueuedAlert, receiver_key
from edge_vlm_runtime.alert_sinks.tls_trouble import tls_trouble
from edge_vlm_runtime.sources.container import mask_credentials

try:
    import aiomqtt
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties
except ImportError as error:
    raise MissingExtraError.for_library("aiomqtt", "alerts") from error

AT_LEAST_ONCE = 1
MQTT_5, MQTT_3 = aiomqtt.ProtocolVersion.V5, aiomqtt.ProtocolVersion.V311
UNSUPPORTED_VERSION = 132
"""MQTT 5, 3.2.2.2; the library says so for the older answer to it, too."""
SAME_SIZE_ATTEMPTS = 2
"""A connection that breaks while a picture is under way may have broken anyhow; twice, it is the
picture."""
ANSWER_TIMEOUT_S = 30.0
"""A broker that leaves a connection or a message unacknowledged for this long is connected anew."""
CLOSE_TIMEOUT_S = 1.0
DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}
EVIDENCE = "evidence"
UNREACHABLE = "the broker cannot be reached"
UNANSWERED = "it ended the connection without an answer; for a port with TLS write mqtts://"


class _Connection(aiomqtt.Client):
    """Also hears what the library drops: the limit in the broker's welcome, refusals in its
    acknowledgements, and a connection that ends while something waits for it."""

    max_packet_bytes: int | None = None
    failure: str | None = None
    """Why the message under way, or the connection, failed."""

    def _on_connect(
        self,
        client: Any,
        userdata: Any,
        flags: Any,
        reason_code: Any,
        properties: Properties | None = None,
    ) -> None:
        self.max_packet_bytes = getattr(properties, "MaximumPacketSize", None)
        super()._on_connect(client, userdata, flags, reason_code, properties)

    def _on_publish(
        self, client: Any, userdata: Any, mid: int, reason_code: Any, properties: Properties
    ) -> None:
        if reason_code.is_failure:
            self.failure = f"the broker refuses the message: {reason_code}"
        super()._on_publish(client, userdata, mid, reason_code, properties)

    def _on_disconnect(
        self,
        client: Any,
        userdata: Any,
        flags: Any,
        reason_code: Any,
        properties: Properties | None = None,
    ) -> None:
        self.failure = f"the broker ended the connection: {reason_code}"
        if not self._connected.done():
            self._connected.set_exception(EndedUnanswered(UNANSWERED))
        super()._on_disconnect(client, userdata, flags, reason_code, properties)
        if self._disconnected.done():
            self._disconnected.exception()  # or asyncio logs that nobody has asked
        for waiting in self._pending_publishes.values():
            waiting.set()

    async def deliver(self, topic: str, payload: bytes, properties: Properties | None) -> None:
        """Returns when the broker has acknowledged it. Raises aiomqtt.MqttError."""
        await self.publish(topic, payload, AT_LEAST_ONCE, properties=properties)
        if self.failure is not None:
            raise aiomqtt.MqttError(self.failure)


class EndedUnanswered(aiomqtt.MqttError):
    """The broker closed the connection in place of an answer to CONNECT."""


class MqttSink:
    """Publishes each event as JSON on the topic, then its picture as a JPEG on `TOPIC/evidence`.

    Arrived is what the broker has acknowledged (QoS 1). The connection is kept; when it breaks,
    what was not acknowledged is sent again over a new one. MQTT 5, where the broker says how large
    a packet may be, or 3.1.1 with brokers that know nothing else. A picture that does not get
    through is sent smaller, then left out.
    """

    def __init__(
        self, url: str, evidence: EvidenceSize = EvidenceSize.FULL, *, name: str | None = None
    ) -> None:
        """`mqtt://HOST:PORT/TOPIC` or `mqtts://`, with user and password if need be.

        Raises ConfigError.
        """
        masked = mask_credentials(url)
        try:
            parts = urlsplit(url)
            port = parts.port or DEFAULT_PORTS.get(parts.scheme, 0)
        except ValueError:
            port = 0
        self._topic = unquote(parts.path).strip("/") if port else ""
        # `#` and `?` would end the path, the others no message may be published to.
        odd = set("#?") & set(url) or set("+#\0") & set(self._topic)
        if odd or not self._topic or not parts.hostname:
            raise ConfigError(f"not an MQTT topic: {masked!r}", remedy="write mqtt://HOST/TOPIC")
        self.name = f"mqtt {masked}" if name is None else f"sink {name} ({masked})"
        self.key = receiver_key(self.name, url) if name is None else f"sink {name}"
        self._host, self._port = parts.hostname, port
        self._is_secure = parts.scheme == "mqtts"
        self._user = None if parts.username is None else unquote(parts.username)
        self._password = None if parts.password is None else unquote(parts.password)
        self._client: _Connection | None = None
        self._version = MQTT_5
        self._pictures = PictureLimit(self.name, evidence)
        self._announced = 0
        """Number of the event whose JSON the broker has."""
        self._picture_attempts: list[int] = []
        """Of that event's picture: sizes that did not get through."""
        self._publishing: tuple[int, asyncio.Task[None]] | None = None
        self.trouble = ""

    async def send(self, delivery: QueuedAlert) -> None:
        """May be cancelled: what is on its way then goes on, and the next call waits for it."""
        while True:
            if self._publishing is None:
                task = asyncio.create_task(self._publish(delivery))
                self._publishing = delivery.number, task
            number, task = self._publishing
            await asyncio.wait([task])
            self._publishing = None
            task.result()
            if number == delivery.number:
                return

    async def _publish(self, delivery: QueuedAlert) -> None:
        try:
            client = self._client or await self._connect()
        except aiomqtt.MqttError as error:
            self._client = None
            trouble = UNREACHABLE
            if isinstance(error, aiomqtt.MqttCodeError):
                trouble = "the broker refuses the connection"
            cause = tls_trouble(error) if self._is_secure else None
            raise DeliveryError(f"{trouble}: {cause or error}") from error
        self.trouble = "the broker does not acknowledge"
        if self._announced != delivery.number:
            await self._publish_body(client, delivery)
            self._announced = delivery.number
            self._picture_attempts.clear()
        if delivery.jpeg is not None:
            await self._publish_picture(client, delivery.number, delivery.jpeg, delivery.body)

    async def _publish_body(self, client: _Connection, delivery: QueuedAlert) -> None:
        body = delivery.body.encode()
        room = self._room(client, self._topic, None)
        if room is not None and len(body) > room:
            most = f"{client.max_packet_bytes} bytes"
            raise DeliveryRefused(f"{len(body)} bytes of JSON, and the broker takes {most} at most")
        try:
            await client.deliver(self._topic, body, None)
        except aiomqtt.MqttError as error:
            await self._disconnect()
            raise DeliveryError(f"{self.trouble}: {error}") from error

    async def _publish_picture(
        self, client: _Connection, number: int, jpeg: bytes, body: str
    ) -> None:
        topic = f"{self._topic}/{EVIDENCE}"
        properties = None
        if self._version is MQTT_5:  # says whose picture it is
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            properties.UserProperty = ("id", json.loads(body)["id"])
            if (room := self._room(client, topic, properties)) is not None:
                self._pictures.announced(room)
        picture = await self._pictures.fit(jpeg)
        if picture is not None:
            try:
                await client.deliver(topic, picture, properties)
            except aiomqtt.MqttError as error:
                self._picture_attempts.append(len(picture))
                if self._picture_attempts.count(len(picture)) >= SAME_SIZE_ATTEMPTS:
                    self._pictures.refused(len(picture))
                await self._disconnect()
                raise DeliveryError(f"{self.trouble} a picture: {error}") from error
        self._pictures.delivered(jpeg, picture)

    def _room(self, client: _Connection, topic: str, properties: Properties | None) -> int | None:
        """Bytes of payload that fit into a packet, MQTT 5, 3.3; None where there is no limit."""
        if client.max_packet_bytes is None:
            return None
        head = 1 if properties is None else len(properties.pack())  # type: ignore[no-untyped-call]
        return client.max_packet_bytes - (1 + 4 + 2 + len(topic.encode()) + 2 + head)

    async def _connect(self) -> _Connection:
        """Raises aiomqtt.MqttError."""
        while True:
            self.trouble = "there is no connection yet"
            client = self._client = _Connection(
                self._host,
                self._port,
                username=self._user,
                password=self._password,
                protocol=self._version,
                timeout=ANSWER_TIMEOUT_S,
                tls_context=ssl.create_default_context() if self._is_secure else None,
                # All that it warns of is raised, too: a logger that nobody hears.
                logger=logging.Logger("aiomqtt", logging.CRITICAL),  # noqa: LOG001
            )
            try:
                await client.__aenter__()
            except aiomqtt.MqttCodeError as error:
                if self._version is MQTT_3 or error.rc != UNSUPPORTED_VERSION:
                    raise
                self._version = MQTT_3
            except EndedUnanswered:  # some brokers say so to a version that they do not know
                self._version = MQTT_3 if self._version is MQTT_5 else MQTT_5
                raise
            else:
                return client

    async def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(aiomqtt.MqttError, asyncio.TimeoutError):
                await within(CLOSE_TIMEOUT_S, client.__aexit__(None, None, None))

    async def close(self) -> None:
        if self._publishing is not None:
            await cancel(self._publishing[1])
        await self._disconnect()
