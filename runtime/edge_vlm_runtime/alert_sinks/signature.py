"""Signatures of webhooks as standardwebhooks.com describes them, so that any of its libraries can
check what we send: HMAC-SHA256 over id, time stamp and body."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac

from edge_vlm.errors import ConfigError

PREFIX = "whsec_"
LEAST_BYTES, MOST_BYTES = 24, 64
"""Of a key, by the standard."""
MAKE_ONE = (
    "python3 -c \"import base64, os; print('whsec_' + base64.b64encode(os.urandom(32)).decode())\""
)


class Signer:
    """Signs with one key."""

    def __init__(self, secret: str, where: object = None) -> None:
        """`secret`: `whsec_` and the key in base64. Raises ConfigError, which never shows it."""
        try:
            if not secret.startswith(PREFIX):
                raise ValueError(f"it does not begin with {PREFIX}")
            self._key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
            if not LEAST_BYTES <= len(self._key) <= MOST_BYTES:
                size = f"{len(self._key)} bytes, not {LEAST_BYTES} to {MOST_BYTES}"
                raise ValueError(f"it has {size}")
        except (binascii.Error, ValueError) as error:
            raise ConfigError(
                f"not a secret to sign webhooks with: {error}",
                where=where,
                remedy=f"make one with {MAKE_ONE}",
            ) from None

    def headers(self, event_id: str, now_s: float, body: bytes) -> dict[str, str]:
        """What goes with a body that is sent now, seconds since 1970."""
        # A full stop parts what is signed, so the standard has none in a name.
        message_id, timestamp = event_id.replace(".", "_"), str(int(now_s))
        signed = f"{message_id}.{timestamp}.".encode() + body
        digest = hmac.new(self._key, signed, hashlib.sha256).digest()
        return {
            "webhook-id": message_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
        }
