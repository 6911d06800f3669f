"""Whose request it is: the address that a connection comes from, or behind a proxy that is trusted
the one that the proxy names.

`X-Forwarded-For` and `Forwarded` are words of whoever sent the request, so they count from the
proxies alone that were named. Each proxy appends, so they are read from the end, up to the first
address that is no trusted proxy's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

from edge_vlm.errors import ConfigError

MAX_CHARS = 4096
"""Of a header about the way of a request; a longer one names nobody."""

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


def parsed(host: str) -> IpAddress | None:
    """None for what is no address. IPv4 written as IPv6 is IPv4."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    return address if mapped is None else mapped


def is_loopback(host: str) -> bool:
    """Of this machine."""
    address = parsed(host)
    return address is not None and address.is_loopback


def neighbourhood(host: str) -> str:
    """What one party has at least: an IPv4 address, or the 64 bits of an IPv6 network."""
    address = parsed(host)
    if isinstance(address, ipaddress.IPv6Address) and not address.is_loopback:
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return str(address or host[:64])


def address_of(scope: Mapping[str, Any]) -> str:
    """Of an ASGI scope."""
    client = scope.get("client")
    return str(client[0]) if client else ""


class TrustedProxies:
    """Those that say the truth about whose requests they pass on."""

    def __init__(self, proxies: Iterable[str] = ()) -> None:
        """Addresses and networks, such as 10.0.0.0/8. Raises ConfigError."""
        self._networks = []
        for text in proxies:
            try:
                self._networks.append(ipaddress.ip_network(text))
            except ValueError as error:
                raise ConfigError(
                    f"not an address or a network: {error}",
                    where="trusted proxies",
                    remedy="such as 127.0.0.1 or 172.18.0.0/16",
                ) from error

    def __contains__(self, host: str) -> bool:
        address = parsed(host)
        return address is not None and any(address in network for network in self._networks)

    def client_of(self, peer: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """Whose request it is, by address. Whatever cannot be read, or is told in two ways, is the
        last proxy's own."""
        if peer not in self:
            return peer
        lines: dict[bytes, list[str]] = {b"x-forwarded-for": [], b"forwarded": []}
        for name, value in headers:
            if name.lower() in lines:
                lines[name.lower()].append(value.decode("latin-1"))
        named = {
            self._first_stranger(peer, hops(",".join(texts)))
            for hops, texts in zip((_listed, _forwarded), lines.values(), strict=True)
            if texts
        }
        return named.pop() if len(named) == 1 else peer

    def _first_stranger(self, peer: str, hops: list[str]) -> str:
        known = peer
        for hop in reversed(hops):
            address = parsed(_without_port(hop))
            if address is None:
                return known
            known = str(address)
            if known not in self:
                return known
        return known


def _listed(text: str) -> list[str]:
    return [hop.strip() for hop in text.split(",")] if len(text) <= MAX_CHARS else []


def _forwarded(text: str) -> list[str]:
    """`for` of each element (RFC 7239, 4); empty where an element has none."""
    if len(text) > MAX_CHARS:
        return []
    hops = []
    for element in _split(text, ","):
        pairs = dict.fromkeys([""])
        for pair in _split(element, ";"):
            name, _, value = pair.partition("=")
            pairs[name.strip().lower()] = value.strip().strip('"')
        hops.append(pairs.get("for") or "")
    return hops


def _split(text: str, mark: str) -> list[str]:
    """At each mark outside of quotes."""
    parts, is_quoted = [""], False
    for letter in text:
        if letter == '"':
            is_quoted = not is_quoted
        if letter == mark and not is_quoted:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _without_port(hop: str) -> str:
    if hop.startswith("["):
        return hop[1:].partition("]")[0]
    return hop.partition(":")[0] if hop.count(":") == 1 else hop
