"""Alerts as HTTP POST requests. The only module that imports aiohttp."""

from __future__ import annotations

import base64
import json
from urllib.parse import urlsplit

from edge_vlm.errors import ConfigError, DeliveryError, DeliveryRefused, MissingExtraError
from edge_vlm_runtime.alert_sinks.queue import QueuedAlert
from edge_vlm_runtime.sources.container import mask_credentials

try:
    import aiohttp
except ImportError as error:
    raise MissingExtraError.for_library("aiohttp", "alerts") from error

REFUSALS = {400, 413, 415, 422}
"""RFC 9110, 15.5: something is wrong with this very request, so that sending it again is no use.
Every other failure (404 behind a proxy that starts, 401 until a key is renewed) may pass."""


class WebhookSink:
    """Posts each event as a JSON object, its picture in base64 as `evidence.jpeg`.

    Any 2xx answer means that it has arrived. Redirects are not followed.
    """

    def __init__(self, url: str) -> None:
        """`http://` or `https://`, with user and password if need be. Raises ConfigError."""
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname)
            _ = parts.port  # raises for one out of range
        except ValueError:
            usable = False
        if not usable:
            raise ConfigError(
                f"not a webhook: {mask_credentials(url)!r}", remedy="write http://HOST/PATH"
            )
        self._url = url
        self.name = f"webhook {mask_credentials(url)}"
        self.trouble = "it does not answer"
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        self._session = aiohttp.ClientSession()

    async def send(self, delivery: QueuedAlert) -> None:
        assert self._session is not None  # opened before
        body = json.loads(delivery.body)
        if delivery.jpeg is not None:
            body["evidence"]["jpeg"] = base64.b64encode(delivery.jpeg).decode()
        try:
            async with self._session.post(
                self._url,
                json=body,
                headers={"Idempotency-Key": body["id"]},
                allow_redirects=False,
            ) as response:
                status = response.status  # the answer's text is left unread
        except (aiohttp.ClientError, OSError) as error:
            raise DeliveryError(mask_credentials(str(error) or repr(error))) from error
        if status in REFUSALS:
            raise DeliveryRefused(f"HTTP status {status}")
        if not 200 <= status < 300:
            raise DeliveryError(f"HTTP status {status}")

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
