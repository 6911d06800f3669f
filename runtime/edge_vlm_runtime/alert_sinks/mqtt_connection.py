"""Connections to MQTT brokers. The only module that imports aiomqtt."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast
from urllib.parse import unquote, urlsplit

from edge_vlm.errors import ConfigError, MissingExtraError
from edge_vlm.waiting import within
from edge_vlm_runtime.alert_sinks.tls_trouble import tls_trouble
from edge_vlm_runtime.sources.container import mask_credentials

try:
    import aiomqtt
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties
except ImportError as error:
    raise MissingExtraError.for_library("aiomqtt", "alerts") from error

MqttError: TypeAlias = aiomqtt.MqttError
Message: TypeAlias = aiomqtt.Message
AT_LEAST_ONCE = 1
MQTT_5, MQTT_3 = aiomqtt.ProtocolVersion.V5, aiomqtt.ProtocolVersion.V311
UNSUPPORTED_VERSION = 132
"""MQTT 5, 3.2.2.2; the library says so for the older answer to it, too."""
ANSWER_TIMEOUT_S = 30.0
"""A broker that leaves a connection or a message unacknowledged for this long is connected anew."""
CLOSE_TIMEOUT_S = 1.0
CLOSED = (OSError, ValueError, RuntimeError)
"""Of adding a descriptor to an event loop: closed, not one, or another connection's by now."""
DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}
UNREACHABLE = "the broker cannot be reached"
UNANSWERED = "it ended the connection without an answer; for a port with TLS write mqtts://"


@dataclass(frozen=True, kw_only=True)
class MqttAddress:
    """A broker, and a topic on it."""

    host: str
    port: int
    topic: str
    is_secure: bool
    user: str | None
    password: str | None = field(repr=False)

    @classmethod
    def of(cls, url: str, default_topic: str = "") -> MqttAddress:
        """`mqtt://HOST:PORT/TOPIC` or `mqtts://`, with user and password if need be. Raises
        ConfigError."""
        try:
            parts = urlsplit(url)
            port = parts.port or DEFAULT_PORTS.get(parts.scheme, 0)
        except ValueError:
            raise ConfigError(
                f"not an address with a port up to 65535: {mask_credentials(url)!r}",
                remedy="write mqtt://HOST:1883/TOPIC",
            ) from None
        port = port if parts.scheme in DEFAULT_PORTS else 0
        topic = (unquote(parts.path).strip("/") or default_topic) if port else ""
        # `#` and `?` would end the path, the others no message may be published to.
        odd = set("#?") & set(url) or set("+#\0") & set(topic)
        if odd or not topic or not parts.hostname:
            example = "mqtt://HOST" if default_topic else "mqtt://HOST/TOPIC"
            raise ConfigError(
                f"not an MQTT topic: {mask_credentials(url)!r}", remedy=f"write {example}"
            )
        return cls(
            host=parts.hostname,
            port=port,
            topic=topic,
            is_secure=parts.scheme == "mqtts",
            user=None if parts.username is None else unquote(parts.username),
            password=None if parts.password is None else unquote(parts.password),
        )


class _Loop:
    """The event loop, for the library: it connects on another thread and names a socket to the loop
    some time before that looks at it. One that a broker's end has closed in between is left out;
    the connection's own end tells of it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def add_reader(self, descriptor: int, callback: Callable[[], None]) -> None:
        with contextlib.suppress(*CLOSED):
            self._loop.add_reader(descriptor, callback)

    def add_writer(self, descriptor: int, callback: Callable[[], None]) -> None:
        with contextlib.suppress(*CLOSED):
            self._loop.add_writer(descriptor, callback)


class Connection(aiomqtt.Client):
    """Also hears what the library drops: the limit in the broker's welcome, refusals in its
    acknowledgements, and a connection that ends while something waits for it."""

    max_packet_bytes: int | None = None
    failure: str | None = None
    """Why the message under way, or the connection, failed."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._loop = cast(asyncio.AbstractEventLoop, _Loop(self._loop))

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

    async def deliver(
        self,
        topic: str,
        payload: bytes,
        properties: Properties | None = None,
        *,
        retain: bool = False,
    ) -> None:
        """Returns when the broker has acknowledged it. Raises MqttError."""
        await self.publish(topic, payload, AT_LEAST_ONCE, retain=retain, properties=properties)
        if self.failure is not None:
            raise aiomqtt.MqttError(self.failure)

    def room(self, topic: str, properties: Properties | None = None) -> int | None:
        """Bytes of payload that fit into a packet, MQTT 5, 3.3; None where there is no limit."""
        if self.max_packet_bytes is None:
            return None
        head = 1 if properties is None else len(properties.pack())  # type: ignore[no-untyped-call]
        return self.max_packet_bytes - (1 + 4 + 2 + len(topic.encode()) + 2 + head)

    async def end(self) -> None:
        """Closes it; nothing is raised and it does not take long."""
        with contextlib.suppress(MqttError, asyncio.TimeoutError):
            await within(CLOSE_TIMEOUT_S, self.__aexit__(None, None, None))


class EndedUnanswered(aiomqtt.MqttError):
    """The broker closed the connection in place of an answer to CONNECT."""


@dataclass(frozen=True)
class Will:
    """What the broker publishes, retained, when the connection breaks."""

    topic: str
    payload: str


class Dialler:
    """Makes connections to one broker and knows what it speaks: MQTT 5, or 3.1.1 with brokers that
    know nothing else."""

    def __init__(self, address: MqttAddress, will: Will | None = None) -> None:
        self.address = address
        self.version = MQTT_5
        self._will = None
        if will is not None:
            self._will = aiomqtt.Will(will.topic, will.payload, AT_LEAST_ONCE, retain=True)

    async def connect(self, made: Callable[[Connection], None]) -> Connection:
        """`made` gets each connection before it is tried. Raises MqttError."""
        address = self.address
        while True:
            client = Connection(
                address.host,
                address.port,
                username=address.user,
                password=address.password,
                protocol=self.version,
                will=self._will,
                timeout=ANSWER_TIMEOUT_S,
                tls_context=ssl.create_default_context() if address.is_secure else None,
                # All that it warns of is raised, too: a logger that nobody hears.
                logger=logging.Logger("aiomqtt", logging.CRITICAL),  # noqa: LOG001
            )
            made(client)
            try:
                await client.__aenter__()
            except aiomqtt.MqttCodeError as error:
                if self.version is MQTT_3 or error.rc != UNSUPPORTED_VERSION:
                    raise
                self.version = MQTT_3
            except EndedUnanswered:  # some brokers say so to a version that they do not know
                self.version = MQTT_3 if self.version is MQTT_5 else MQTT_5
                raise
            else:
                return client

    def trouble(self, error: Exception) -> str:
        """Why there is no connection, in words."""
        trouble = UNREACHABLE
        if isinstance(error, aiomqtt.MqttCodeError):
            trouble = "the broker refuses the connection"
        cause = tls_trouble(error) if self.address.is_secure else None
        return f"{trouble}: {cause or error}"


def user_property(name: str, value: str) -> Properties:
    """Of a message, MQTT 5."""
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.UserProperty = (name, value)
    return properties
