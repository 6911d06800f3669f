"""Which pages may open a websocket: the server's own, and those that were allowed.

Browsers name a page's origin; a page from elsewhere must not reach a local server. Behind a proxy
that changes `Host` the server's own page looks like one from elsewhere, so its origin is allowed by
name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from edge_vlm.errors import ConfigError, HostNotAllowed

log = logging.getLogger(__name__)

ORIGIN = re.compile(r"(https?)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::(\d{1,5}))?")
"""RFC 6454, 6.1, in lower case."""
DEFAULT_PORTS = {"http": "80", "https": "443"}
MAX_REPORTED = 100
"""Refused pairs of origin and Host that are logged, each once: a page may try for ever."""


class Origins:
    """Asked for every websocket."""

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        """`allowed`: origins besides the server's own. Raises ConfigError."""
        self._allowed = {_normal(origin) for origin in allowed}
        self._reported: set[tuple[str, str | None]] = set()

    @property
    def hosts(self) -> list[str]:
        """Names in the allowed origins: a proxy may pass them on as `Host`."""
        return [name for origin in self._allowed if (name := urlsplit(origin).hostname)]

    def allows(self, origin: str | None, host: str | None) -> bool:
        """By the two headers of a request; without `Origin` it is no browser's."""
        if origin is None or origin.lower() in self._allowed:
            return True
        place = _place(origin)
        if place is not None and place == host:
            return True
        pair = origin[:200], None if host is None else host[:200]
        if pair not in self._reported and len(self._reported) < MAX_REPORTED:
            self._reported.add(pair)
            log.warning(
                "a page was refused: its Origin is %r and the Host it asked for %r; if that is "
                "this server's page behind a proxy, start it with --allow-origin %s",
                *pair,
                _shown(origin),
            )
        return False


def require_readable(scope: Mapping[str, Any]) -> None:
    """Checks an ASGI scope: no browser sends an origin that cannot be read. Raises
    HostNotAllowed."""
    for header, value in scope["headers"]:
        if header.lower() == b"origin" and _place(value.decode("latin-1")) is None:
            raise HostNotAllowed("the Origin of this page cannot be read")


def _place(origin: str) -> str | None:
    """Name and port of a page; empty for one that has none, None for what cannot be read."""
    try:
        parts = urlsplit(origin)
        _ = parts.port
    except ValueError:
        return None
    return parts.netloc


def _normal(origin: str) -> str:
    match = ORIGIN.fullmatch(origin.lower().removesuffix("/"))
    if match is None or int(match[3] or 0) >= 1 << 16:
        raise ConfigError(
            f"not an origin: {origin!r}",
            where="allowed origins",
            remedy="scheme, name and port as in the browser, such as https://camera.example.org",
        )
    port = "" if match[3] in (None, DEFAULT_PORTS[match[1]]) else f":{match[3]}"
    return f"{match[1]}://{match[2]}{port}"


def _shown(origin: str) -> str:
    try:
        return _normal(origin)
    except ConfigError:
        return "ORIGIN"
