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
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urljoin, urlsplit

from edge_vlm.request_errors import MediaRefused

TIMEOUT_S = 20.0
"""Of each wait for the other side."""
LONGEST_S = 60.0
"""Of one address, from the first word to the last."""
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
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.is_site_local:
            return False
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is not None:
            ip = inner
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
        # Each wait has an end; this is that of all of them together.
        give_up = threading.Timer(LONGEST_S, _hang_up, [connection.sock])
        give_up.start()
        began_s = time.monotonic()
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
            data = _read(reply, max_bytes, param)
            if time.monotonic() - began_s >= LONGEST_S:
                raise _too_slow(param)  # what was cut off may look whole
            return data
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() - began_s >= LONGEST_S:
                raise _too_slow(param) from error
            raise MediaRefused(f"the address cannot be read: {error}", param=param) from error
        finally:
            give_up.cancel()
            connection.close()
    raise MediaRefused(f"more than {MAX_REDIRECTIONS} redirections", param=param)


def _hang_up(line: socket.socket) -> None:
    with suppress(OSError):  # it is closed already
        line.shutdown(socket.SHUT_RDWR)


def _too_slow(param: str) -> MediaRefused:
    return MediaRefused(f"the address takes more than {LONGEST_S:g} s", param=param)


def _read(reply: http.client.HTTPResponse, max_bytes: int, param: str) -> bytes:
    data = bytearray()
    while piece := reply.read1(PIECE_BYTES):
        data += piece
        if len(data) > max_bytes:
            raise MediaRefused(f"more than {max_bytes} bytes lie at the address", param=param)
    if reply.length:  # of what was announced
        raise MediaRefused("the address breaks off in the middle", param=param)
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
