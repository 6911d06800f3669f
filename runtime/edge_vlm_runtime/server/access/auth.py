"""The optional API key of a server: who has it may watch, ask and read the metrics.

HTTP and websocket clients send `Authorization: Bearer KEY`. A page in a browser cannot set headers
on a websocket; it offers the subprotocols `edge-vlm` and `edge-vlm-key.` with the key in base64url,
or as OpenAI's clients do `realtime` and `openai-insecure-api-key.` with the key as it is.
The page itself and the health checks are open.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edge_vlm.errors import ConfigError
from edge_vlm.private_files import exposure

log = logging.getLogger(__name__)

VARIABLE = "EDGE_VLM_API_KEY"
SUBPROTOCOLS = ("edge-vlm", "realtime")
"""Ours, and the one that OpenAI's clients in browsers offer."""
KEY_SUBPROTOCOL = "edge-vlm-key."
OPENAI_KEY_SUBPROTOCOL = "openai-insecure-api-key."
GUARDED = ("/v1/", "/v1", "/metrics", "/demo/street.jpg")
"""Answers of the server's own, and what costs it work."""
REMEDY = f"set {VARIABLE}, or open the page with #key=KEY behind its address"


def read_api_key(file: Path | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key in a file, or else of `EDGE_VLM_API_KEY`, or None. Raises ConfigError.

    Not an argument of a command: those can be seen by every user of the machine.
    """
    if file is None:
        text = environment.get(VARIABLE)
        if not text:
            return None
    else:
        try:
            text = file.read_text(encoding="utf-8-sig")
            exposed = exposure(file)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the API key cannot be read: {error}", where=file) from error
        if exposed is not None:
            log.warning("API key: %s", exposed)
    key = text.strip()
    if not key or not key.isprintable() or not key.isascii():
        raise ConfigError("an API key is one line of printable ASCII", where=file or VARIABLE)
    return key


def is_guarded(path: str) -> bool:
    return any(path == guarded or path.startswith(guarded) for guarded in GUARDED)


def given_key(scope: Mapping[str, Any]) -> bytes | None:
    """The one that a request brings, right or wrong; None without any."""
    return _bearer(scope["headers"]) or _of_subprotocols(scope.get("subprotocols", ()))


def _bearer(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    for name, value in headers:
        scheme, _, token = value.partition(b" ")
        if name.lower() == b"authorization" and scheme.lower() == b"bearer":
            return token.strip()
    return None


def _of_subprotocols(offered: Iterable[str]) -> bytes | None:
    for name in offered:
        if name.startswith(OPENAI_KEY_SUBPROTOCOL):
            return name.removeprefix(OPENAI_KEY_SUBPROTOCOL).encode()
        if name.startswith(KEY_SUBPROTOCOL):
            text = name.removeprefix(KEY_SUBPROTOCOL)
            try:
                return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            except (binascii.Error, ValueError):
                return None
    return None
