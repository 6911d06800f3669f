"""Fetching an address that a request names, without being used as somebody's hand.

The name is looked up once and every address it has must be of the public internet; the connection
goes to the one that was checked, so a name that changes in between gains nothing. Redirections are
checked alike. Blocks.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable
from urllib.parse import urljoin, urlsplit

from edge_vlm.errors import MediaRefused

TIMEOUT_S = 20.0
"""Of each wait for the other side."""
LONGEST_S = 60.0
"""Of reading all of it."""
MAX_REDIRECTIONS = 3
PIECE_BYTES = 1 << 16

Lookup = Callable[[str, int], "list[str]"]


def look_up(host: str, port: int) -> list[str]:
    """The addresses of a name. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def is_public(address: str) -> bool:
    """Of the internet, and of no private, local, shared or reserved range."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)
    if mapped is not None:
        ip = mapped
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def fetch(url: str, *, param: str, max_bytes: int, lookup: Lookup = look_up) -> bytes:
    """What lies at an http(s) address. Raises MediaRefused."""
    for _ in range(MAX_REDIRECTIONS + 1):
        try:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise MediaRefused("not an http(s) address", param=param)
            connection = _connect(parts.scheme, parts.hostname, parts.port, param, lookup)
        except (OSError, ValueError) as error:
            raise MediaRefused(f"nothing answers at the address: {error}", param=param) from error
        try:
            target = parts.path or "/"
            if parts.query:
                target += f"?{parts.query}"
            connection.request("GET", target, headers={"User-Agent": "edge-vlm"})
            reply = connection.getresponse()
            moved = reply.getheader("Location")
            if reply.status in (301, 302, 303, 307, 308) and moved:
                url = urljoin(url, moved)
                continue
            if reply.status != 200:
                raise MediaRefused(f"the address answers {reply.status}", param=param)
            return _read(reply, max_bytes, param)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise MediaRefused(f"the address cannot be read: {error}", param=param) from error
        finally:
            connection.close()
    raise MediaRefused(f"more than {MAX_REDIRECTIONS} redirections", param=param)


def _read(reply: http.client.HTTPResponse, max_bytes: int, param: str) -> bytes:
    data = bytearray()
    give_up_s = time.monotonic() + LONGEST_S
    while piece := reply.read1(PIECE_BYTES):
        data += piece
        if time.monotonic() > give_up_s:
            raise MediaRefused(f"the address takes more than {LONGEST_S:g} s", param=param)
        if len(data) > max_bytes:
            raise MediaRefused(f"more than {max_bytes} bytes lie at the address", param=param)
    return bytes(data)


def _connect(
    scheme: str, host: str, port: int | None, param: str, lookup: Lookup
) -> http.client.HTTPConnection:
    port = port or (443 if scheme == "https" else 80)
    addresses = lookup(host, port)
    if not addresses or not all(map(is_public, addresses)):
        raise MediaRefused("the address is not of the public internet", param=param)
    line = socket.create_connection((addresses[0], port), TIMEOUT_S)
    try:
        if scheme == "https":
            line = ssl.create_default_context().wrap_socket(line, server_hostname=host)
        connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
        connection.sock = line
    except BaseException:
        line.close()
        raise
    return connection
