"""Alerts as MQTT messages. The only module that imports aiomqtt."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from urllib.parse import unquote, urlsplit

from edge_vlm.errors import ConfigError, DeliveryError, MissingExtraError
from edge_vlm_runtime.alert_sinks.queue import QueuedAlert, receiver_key
from edge_vlm_runtime.sources.container import mask_credentials

try:
    import aiomqtt
except ImportError as error:
    raise MissingExtraError.for_library("aiomqtt", "alerts") from error

AT_LEAST_ONCE = 1
ANSWER_TIMEOUT_S = 30.0
"""A broker that leaves a connection or a message unacknowledged for this long is connected anew."""
CLOSE_TIMEOUT_S = 1.0
DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}
EVIDENCE = "evidence"
UNREACHABLE = "the broker cannot be reached"


class MqttSink:
    """Publishes each event as JSON on the topic, its picture as a JPEG on `TOPIC/evidence` before.

    Arrived is what the broker has acknowledged (QoS 1). The connection is kept; when it breaks,
    what was not acknowledged is sent again over a new one.
    """

    def __init__(self, url: str) -> None:
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
        self.name = f"mqtt {masked}"
        self.key = receiver_key(self.name, url)
        self._host, self._port = parts.hostname, port
        self._is_secure = parts.scheme == "mqtts"
        self._user = None if parts.username is None else unquote(parts.username)
        self._password = None if parts.password is None else unquote(parts.password)
        self._client: aiomqtt.Client | None = None
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
        trouble = UNREACHABLE
        try:
            if self._client is None:
                self.trouble = "there is no connection yet"
                self._client = aiomqtt.Client(
                    self._host,
                    self._port,
                    username=self._user,
                    password=self._password,
                    timeout=ANSWER_TIMEOUT_S,
                    tls_context=ssl.create_default_context() if self._is_secure else None,
                    # All that it warns of is raised, too: a logger that nobody hears.
                    logger=logging.Logger("aiomqtt", logging.CRITICAL),  # noqa: LOG001
                )
                await self._client.__aenter__()
            self.trouble = trouble = "the broker does not acknowledge"
            if delivery.jpeg is not None:
                topic = f"{self._topic}/{EVIDENCE}"
                await self._client.publish(topic, delivery.jpeg, AT_LEAST_ONCE)
            await self._client.publish(self._topic, delivery.body, AT_LEAST_ONCE)
        except aiomqtt.MqttError as error:
            await self._disconnect()
            if trouble == UNREACHABLE and isinstance(error, aiomqtt.MqttCodeError):
                trouble = "the broker refuses the connection"
            raise DeliveryError(f"{trouble}: {error}") from error

    async def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(aiomqtt.MqttError, asyncio.TimeoutError):
                await asyncio.wait_for(client.__aexit__(None, None, None), CLOSE_TIMEOUT_S)

    async def close(self) -> None:
        if self._publishing is not None:
            self._publishing[1].cancel()
            await asyncio.wait([self._publishing[1]])
        await self._disconnect()
