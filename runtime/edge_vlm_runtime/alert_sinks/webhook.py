"""Alerts as HTTP POST requests. The only module that imports httpx."""

from __future__ import annotations

import base64
import json
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any

import edge_vlm
from edge_vlm.errors import (
    ConfigError,
    DeliveryError,
    DeliveryRefused,
    MissingExtraError,
)
from edge_vlm_runtime.alert_sinks.evidence import EvidenceSize
from edge_vlm_runtime.alert_sinks.picture_limit import PictureLimit
from edge_vlm_runtime.alert_sinks.queue import QueuedAlert, receiver_key
from edge_vlm_runtime.alert_sinks.signature import Signer
from edge_vlm_runtime.alert_sinks.template import JSON_TYPE, BodyTemplate
from edge_vlm_runtime.alert_sinks.tls_trouble import tls_trouble
from edge_vlm_runtime.sources.container import mask_credentials

try:
    import httpx
except ImportError as error:
    raise MissingExtraError.for_library("httpx", "alerts") from error

TOO_LARGE = 413
REFUSALS = {400, TOO_LARGE, 415, 422}
"""RFC 9110, 15.5: something is wrong with this very request, so that sending it again is no use.
Every other failure (404 behind a proxy that starts, 401 until a key is renewed) may pass."""


class WebhookSink:
    """Posts each event as a JSON object, its picture in base64 as `evidence.jpeg`, or as the text
    that a template makes of it.

    A picture that is too large for the receiver is sent smaller, then left out. Any 2xx answer
    means that it has arrived. Redirects are not followed.
    """

    trouble = "it does not answer"

    def __init__(
        self,
        url: str,
        evidence: EvidenceSize = EvidenceSize.FULL,
        *,
        name: str | None = None,
        headers: Mapping[str, str] | None = None,
        signer: Signer | None = None,
        template: BodyTemplate | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`http://` or `https://`, with user and password if need be.

        With a name, nothing of the address but its host is ever shown: the rest may be what lets
        one post there. `headers` are sent besides ours. Raises ConfigError.
        """
        masked = mask_credentials(url) if name is None else name
        try:
            parts = httpx.URL(url)
            usable = parts.scheme in ("http", "https") and bool(parts.host)
            usable = usable and 0 <= (parts.port or 0) < 1 << 16
        except httpx.InvalidURL:
            usable = False
        if not usable:
            raise ConfigError(f"not a webhook: {masked!r}", remedy="write http://HOST/PATH")
        self.name = f"webhook {masked}" if name is None else f"sink {name} ({parts.host})"
        self.key = receiver_key(self.name, url) if name is None else f"sink {name}"
        self._headers = httpx.Headers({"Content-Type": JSON_TYPE})
        self._headers.update(headers or {})
        self._signer, self._template = signer, template
        self._wall_clock = wall_clock
        # The library logs every URL, so this one goes without credentials.
        self._url = parts.copy_with(userinfo=b"")
        self._pictures = PictureLimit(self.name, evidence)
        self._client = httpx.AsyncClient(
            auth=(parts.username, parts.password) if parts.userinfo else None,
            headers={"User-Agent": f"edge-vlm/{edge_vlm.__version__}"},
            verify=ssl.create_default_context(),  # what the system trusts
            trust_env=False,
            timeout=None,  # the dispatcher's alone
        )

    async def send(self, delivery: QueuedAlert) -> None:
        body = json.loads(delivery.body)
        while True:
            picture = await self._pictures.fit(delivery.jpeg) if self._wants_pictures else None
            if picture is not None:
                body["evidence"]["jpeg"] = base64.b64encode(picture).decode()
            status = await self._post(body)
            if status != TOO_LARGE or picture is None:
                break
            self._pictures.refused(len(picture))
            del body["evidence"]["jpeg"]
        if status in REFUSALS:
            raise DeliveryRefused(f"HTTP status {status}")
        if not 200 <= status < 300:
            raise DeliveryError(f"HTTP status {status}")
        self._pictures.delivered(delivery.jpeg, picture)

    @property
    def _wants_pictures(self) -> bool:
        return self._template is None or self._template.has_picture

    async def _post(self, body: dict[str, Any]) -> int:
        """The status of the answer. Raises DeliveryError."""
        if self._template is None:
            content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        else:
            content = self._template.fill(body)
        headers = self._headers.copy()
        headers["Idempotency-Key"] = body["id"]
        if self._signer is not None:  # of this attempt: a receiver refuses one that is old
            headers.update(self._signer.headers(body["id"], self._wall_clock(), content))
        post = self._client.stream("POST", self._url, content=content, headers=headers)
        try:
            async with post as response:
                return response.status_code  # the answer's text is left unread
        except (httpx.HTTPError, OSError) as error:
            is_tls = self._url.scheme == "https" and isinstance(error, httpx.ConnectError)
            cause = tls_trouble(error) if is_tls else None
            raise DeliveryError(cause or mask_credentials(str(error) or repr(error))) from error

    async def close(self) -> None:
        await self._client.aclose()
