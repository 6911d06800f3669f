"""Alerts as MQTT messages."""

from __future__ import annotations

import asyncio
import json

from edge_vlm.errors import DeliveryError, DeliveryRefused
from edge_vlm.waiting import cancel
from edge_vlm_runtime.alert_sinks.evidence import EvidenceSize
from edge_vlm_runtime.alert_sinks.mqtt_connection import (
    MQTT_5,
    Connection,
    Dialler,
    MqttAddress,
    MqttError,
    user_property,
)
from edge_vlm_runtime.alert_sinks.picture_limit import PictureLimit
from edge_vlm_runtime.alert_sinks.queue import QueuedAlert, receiver_key
from edge_vlm_runtime.sources.container import mask_credentials

SAME_SIZE_ATTEMPTS = 2
"""A connection that breaks while a picture is under way may have broken anyhow; twice, it is the
picture."""
EVIDENCE = "evidence"


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
        self._dialler = Dialler(MqttAddress.of(url))
        self._topic = self._dialler.address.topic
        self.name = (
            f"mqtt {masked}" if name is None else f"sink {name} ({self._dialler.address.host})"
        )
        self.key = receiver_key(self.name, url) if name is None else f"sink {name}"
        self._client: Connection | None = None
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
        except MqttError as error:
            self._client = None
            raise DeliveryError(self._dialler.trouble(error)) from error
        self.trouble = "the broker does not acknowledge"
        if self._announced != delivery.number:
            await self._publish_body(client, delivery)
            self._announced = delivery.number
            self._picture_attempts.clear()
        if delivery.jpeg is not None:
            await self._publish_picture(client, delivery.number, delivery.jpeg, delivery.body)

    async def _publish_body(self, client: Connection, delivery: QueuedAlert) -> None:
        body = delivery.body.encode()
        room = client.room(self._topic)
        if room is not None and len(body) > room:
            most = f"{client.max_packet_bytes} bytes"
            raise DeliveryRefused(f"{len(body)} bytes of JSON, and the broker takes {most} at most")
        try:
            await client.deliver(self._topic, body, None)
        except MqttError as error:
            await self._disconnect()
            raise DeliveryError(f"{self.trouble}: {error}") from error

    async def _publish_picture(
        self, client: Connection, number: int, jpeg: bytes, body: str
    ) -> None:
        topic = f"{self._topic}/{EVIDENCE}"
        properties = None
        if self._dialler.version is MQTT_5:  # says whose picture it is
            properties = user_property("id", json.loads(body)["id"])
            if (room := client.room(topic, properties)) is not None:
                self._pictures.announced(room)
        picture = await self._pictures.fit(jpeg)
        if picture is not None:
            try:
                await client.deliver(topic, picture, properties)
            except MqttError as error:
                self._picture_attempts.append(len(picture))
                if self._picture_attempts.count(len(picture)) >= SAME_SIZE_ATTEMPTS:
                    self._pictures.refused(len(picture))
                await self._disconnect()
                raise DeliveryError(f"{self.trouble} a picture: {error}") from error
        self._pictures.delivered(jpeg, picture)

    async def _connect(self) -> Connection:
        """Raises MqttError."""

        def made(client: Connection) -> None:
            self.trouble = "there is no connection yet"
            self._client = client

        return await self._dialler.connect(made)

    async def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.end()

    async def close(self) -> None:
        if self._publishing is not None:
            await cancel(self._publishing[1])
        await self._disconnect()
