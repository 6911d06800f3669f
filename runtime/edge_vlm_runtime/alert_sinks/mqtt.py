"""Alerts as MQTT messages. The only module that imports paho-mqtt."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import unquote, urlsplit

from edge_vlm.errors import ConfigError, DeliveryError, MissingExtraError
from edge_vlm_runtime.alert_sinks.queue import QueuedAlert
from edge_vlm_runtime.sources.container import mask_credentials

try:
    import paho.mqtt.client as paho
except ImportError as error:
    raise MissingExtraError.for_library("paho-mqtt", "alerts") from error

AT_LEAST_ONCE = 1
RECONNECT_S = (1, 30)
MAX_QUEUED = 8
"""Messages that paho may hold without an acknowledgement."""
DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}
EVIDENCE = "evidence"


class MqttSink:
    """Publishes each event as JSON on the topic, its picture as a JPEG on `TOPIC/evidence` before.

    Arrived is what the broker has acknowledged (QoS 1). The connection is kept and made anew when
    it breaks; what was not acknowledged then is sent again.
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
        self._host, self._port = str(parts.hostname), port
        self._is_secure = parts.scheme == "mqtts"
        self._user = None if parts.username is None else unquote(parts.username)
        self._password = None if parts.password is None else unquote(parts.password)
        self._client: paho.Client | None = None
        self.trouble = "there is no connection yet"
        self._number: int | None = None
        """Of the delivery that was published last."""
        self._unacknowledged: set[int] = set()
        self._news = asyncio.Event()
        """Something changed that `send` waits for."""

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        client = paho.Client(paho.CallbackAPIVersion.VERSION2)
        client.username = self._user
        client.password = self._password
        if self._is_secure:
            client.tls_set()
        client.reconnect_delay_set(*RECONNECT_S)
        client.max_queued_messages_set(MAX_QUEUED)

        # paho calls these on a thread of its own, which `close` ends before the loop does.
        def on_connect(_client: Any, _data: Any, _flags: Any, reason: Any, _props: Any) -> None:
            trouble = "the broker does not acknowledge"
            if reason.is_failure:
                trouble = f"the broker refuses the connection: {reason}"
            loop.call_soon_threadsafe(self._note, trouble)

        def on_connect_fail(_client: Any, _data: Any) -> None:
            loop.call_soon_threadsafe(self._note, "the broker cannot be reached")

        def on_publish(_client: Any, _data: Any, mid: int, _reason: Any, _props: Any) -> None:
            loop.call_soon_threadsafe(self._acknowledge, mid)

        client.on_connect = on_connect
        client.on_connect_fail = on_connect_fail
        client.on_publish = on_publish
        client.connect_async(self._host, self._port)
        client.loop_start()
        self._client = client

    def _note(self, trouble: str) -> None:
        self.trouble = trouble
        self._news.set()

    def _acknowledge(self, mid: int) -> None:
        self._unacknowledged.discard(mid)
        self._news.set()

    async def send(self, delivery: QueuedAlert) -> None:
        """Published once: paho itself sends it again after each new connection."""
        client = self._client
        assert client is not None  # opened before
        if self._number != delivery.number:
            while not client.is_connected():  # nothing piles up in paho meanwhile
                await self._wait_for_news()
            self._unacknowledged = set()
            if delivery.jpeg is not None:
                self._publish(client, f"{self._topic}/{EVIDENCE}", delivery.jpeg)
            self._publish(client, self._topic, delivery.body)
            self._number = delivery.number
        while self._unacknowledged:
            await self._wait_for_news()

    async def _wait_for_news(self) -> None:
        self._news.clear()
        await self._news.wait()

    def _publish(self, client: paho.Client, topic: str, payload: bytes | str) -> None:
        info = client.publish(topic, payload, AT_LEAST_ONCE)
        if info.rc == paho.MQTT_ERR_QUEUE_SIZE:
            raise DeliveryError("the broker does not acknowledge")
        self._unacknowledged.add(info.mid)  # without a connection paho sends it with the next one

    async def close(self) -> None:
        if self._client is not None:
            self._client.disconnect()
            await asyncio.to_thread(self._client.loop_stop)
