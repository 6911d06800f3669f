"""Which names a server answers to.

The page of evil.example may have its own name point at 127.0.0.1 or at a camera in the local
network: to a browser it is then of the same origin as the server, and may watch (DNS rebinding).
But the browser still names evil.example in `Host`. So only names are answered that nobody else can
point somewhere: addresses, localhost, this machine's own, and those that were allowed.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Mapping
from typing import Any

from edge_vlm.errors import ConfigError, HostNotAllowed

AUTHORITY = re.compile(r"(?:\[([^\]]+)\]|([^:]*))(?::\d*)?")
"""HOST, [IPV6], and a port (RFC 9110, 7.2)."""
ANY = "*"
"""As an allowed name: every name, where something in front of the server checks them."""


def allowed_hosts(bound: str, names: Iterable[str] = ()) -> frozenset[str]:
    """Names that a server bound to `bound` answers to, `names` among them.

    Raises ConfigError for what is not the name of a host.
    """
    own = socket.gethostname()
    known = {"localhost", bound, own, own.partition(".")[0], f"{own.partition('.')[0]}.local"}
    for name in names:
        if _is_address(name):
            continue  # always answered to
        if not name or not name.isascii() or set(name) & set("/:@ "):
            raise ConfigError(
                f"not the name of a host: {name!r}",
                where="allowed hosts",
                remedy="without scheme, port and path, such as camera.example.org",
            )
        known.add(name)
    return frozenset(name.lower().rstrip(".") for name in known)


def require_host(allowed: frozenset[str], scope: Mapping[str, Any]) -> None:
    """Checks an ASGI scope of HTTP or a websocket; without `Host` it is no browser's.

    Raises HostNotAllowed.
    """
    for header, value in scope["headers"]:
        if header.lower() == b"host" and ANY not in allowed:
            given = value.decode("latin-1")
            match = AUTHORITY.fullmatch(given)
            host = "" if match is None else (match[1] or match[2]).lower().rstrip(".")
            if host not in allowed and not _is_address(host):
                raise HostNotAllowed(
                    f"this server does not go by the name {given[:60]!r}",
                    remedy="use its address, or start it with --allowed-host NAME",
                )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
