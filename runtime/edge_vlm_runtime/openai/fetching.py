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
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import quote, urljoin, urlsplit

from edge_vlm.errors.requests import MediaRefused

TIMEOUT_S = 20.0
"""Of each wait for the other side."""
LONGEST_S = 60.0
"""Of one address, from the first word to the last."""
MAX_REDIRECTIONS = 3
PIECE_BYTES = 1 << 16
_PORTS = {"http": 80, "https": 443}
_PLAIN = "!#$%&'()*+,/:;=?@[]~"
"""Stay as they are in what is asked for; what browsers would encode is encoded."""
_LONGEST_WORDS = 100
_MOST_TRIED = 3
"""Addresses of one name: the first may be of a net that leads nowhere from here."""

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
            if parts.username is not None:
                raise MediaRefused("the user's name in an address would not be sent", param=param)
            port = parts.port or _PORTS[parts.scheme]
            line = _dial(parts.scheme, parts.hostname, port, param, lookup)
        except (OSError, ValueError) as error:
            raise MediaRefused(f"nothing answers at the address: {error}", param=param) from error
        connection = http.client.HTTPConnection(parts.hostname, port, timeout=TIMEOUT_S)
        connection.default_port = _PORTS[parts.scheme]  # is not named in the request
        connection.sock = line
        # Each wait has an end; this is that of all of them together.
        hung_up = threading.Event()
        give_up = threading.Timer(LONGEST_S, _hang_up, [line, hung_up])
        give_up.start()
        try:
            if isinstance(line, ssl.SSLSocket):
                line.do_handshake()
            target = parts.path or "/"
            if parts.query:
                target += f"?{parts.query}"
            target = quote(target, safe=_PLAIN)
            connection.request("GET", target, headers={"User-Agent": "edge-vlm"})
            reply = connection.getresponse()
            moved = reply.getheader("Location")
            if reply.status in (301, 302, 303, 307, 308) and moved:
                url = urljoin(url, moved)
                continue
            if reply.status != 200:
                raise MediaRefused(f"the address answers {reply.status}", param=param)
            data = _read(reply, max_bytes, param)
            if hung_up.is_set():
                raise _too_slow(param)  # what was cut off may look whole
            return data
        except (MediaRefused, OSError, http.client.HTTPException, ValueError) as error:
            if hung_up.is_set():
                raise _too_slow(param) from error
            if isinstance(error, MediaRefused):
                raise
            said = str(error)[:_LONGEST_WORDS]  # whoever is there may have said anything
            raise MediaRefused(f"the address cannot be read: {said}", param=param) from error
        finally:
            give_up.cancel()
            connection.close()
    raise MediaRefused(f"more than {MAX_REDIRECTIONS} redirections", param=param)


def _hang_up(line: socket.socket, hung_up: threading.Event) -> None:
    hung_up.set()  # first, for the reader takes the end of the line for that of the answer
    with suppress(OSError):  # it is closed already
        socket.socket.shutdown(
            line, socket.SHUT_RDWR
        )  # below TLS, whose own is not for two threads


def _too_slow(param: str) -> MediaRefused:
    return MediaRefused(f"the address takes more than {LONGEST_S:g} s", param=param)


def _read(reply: http.client.HTTPResponse, max_bytes: int, param: str) -> bytes:
    for name, plain in (("Transfer-Encoding", "chunked"), ("Content-Encoding", "identity")):
        encoding = reply.getheader(name, plain)
        if encoding.strip().lower() != plain:
            what = f"the address answers in {encoding[:_LONGEST_WORDS]!r}, which was not asked for"
            raise MediaRefused(what, param=param)
    data = bytearray()
    broken = MediaRefused("the address breaks off in the middle", param=param)
    try:
        while piece := reply.read1(PIECE_BYTES):
            data += piece
            if len(data) > max_bytes:
                raise MediaRefused(f"more than {max_bytes} bytes lie at the address", param=param)
    except http.client.IncompleteRead as error:
        raise broken from error
    if reply.length:  # of what was announced
        raise broken
    if not data:
        raise MediaRefused("nothing lies at the address", param=param)
    return bytes(data)


def _dial(scheme: str, host: str, port: int, param: str, lookup: Lookup) -> socket.socket:
    """A line to there; if it is one of TLS nothing has been said on it yet."""
    addresses = lookup(host, port)
    if not addresses or not all(map(is_public, addresses)):
        raise MediaRefused("the address is not of the public internet", param=param)
    *others, last = list(dict.fromkeys(addresses))[:_MOST_TRIED]
    line = None
    for address in others:
        with suppress(OSError):
            line = socket.create_connection((address, port), TIMEOUT_S)
            break
    line = line or socket.create_connection((last, port), TIMEOUT_S)
    if scheme == "http":
        return line
    try:
        return ssl.create_default_context().wrap_socket(
            line,
            server_hostname=host,
            do_handshake_on_connect=False,  # its time counts
            suppress_ragged_eofs=False,  # the end of a line is that of the answer if that is said
        )
    except BaseException:
        line.close()
        raise
