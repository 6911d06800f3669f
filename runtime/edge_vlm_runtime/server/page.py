"""The browser page: its files and headers, and what it is told before anything is streamed."""

from __future__ import annotations

import asyncio
import ipaddress
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import edge_vlm
from edge_vlm.errors import MissingExtraError
from edge_vlm.errors.requests import MethodNotAllowed, RequestError
from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm.world.street import MOST_SEED, MOST_TIME_S, Street
from edge_vlm_runtime import protocol
from edge_vlm_runtime.server.access.tls import own_names
from edge_vlm_runtime.server.live_api import Answer

try:
    import segno
except ImportError as error:
    raise MissingExtraError.for_library("segno", "serve") from error

WEB = Path(__file__).parent / "web"
DEMO_CLIP = Path(__file__).parents[1] / "demo" / "clip.mp4"
STREET_PATH = "/demo/street.jpg"
FACTS_PATH = "/v1/edge_vlm/page"
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'self'; connect-src 'self' ws: wss:; media-src 'self' blob:; "
        "img-src 'self' blob: data:"
    ),
    "X-Content-Type-Options": "nosniff",
}
EVERYWHERE = ("0.0.0.0", "::")
QUIET_MODULES = 4
"""Of light around a code; readers want that much (ISO/IEC 18004)."""


def page_facts(host: str, port: int, is_tls: bool, api_key: str | None) -> dict[str, Any]:
    """Where other devices find a server that listens on the address `host`.

    `addresses` has each address of the page, and the same as a QR code (a data URI of an SVG) that
    holds the key, too: whoever asked for it had the key.
    """
    behind = "" if api_key is None else f"#key={quote(api_key, safe='')}"
    scheme = "https" if is_tls else "http"
    addresses = []
    for name in network_names(host):
        shown = f"[{name}]" if ":" in name else name
        url = f"{scheme}://{shown}:{port}/"
        code = segno.make(f"{url}{behind}", error="m", micro=False)
        picture = code.svg_data_uri(scale=4, border=QUIET_MODULES, light="#fff")
        addresses.append({"url": url, "qr": picture})
    return {
        "object": "edge_vlm.page",
        "server": f"edge-vlm {edge_vlm.__version__}",
        "protocol_version": protocol.PROTOCOL_VERSION,
        "is_reachable": bool(addresses),
        "is_tls": is_tls,
        "has_key": api_key is not None,
        "addresses": addresses,
    }


def network_names(host: str) -> list[str]:
    """Addresses by which another device may reach a server that listens on `host`: IPv4 first."""
    found = []
    for name in own_names(host) if host in EVERYWHERE else [host]:
        try:
            address = ipaddress.ip_address(name)
        except ValueError:  # a name, which another device may not resolve
            continue
        if not (address.is_loopback or (address.is_link_local and address.version == 6)):
            found.append(address)
    return [str(address) for address in sorted(found, key=lambda each: (each.version, int(each)))]


async def street_answer(method: str, path: str, query: Mapping[str, str], body: bytes) -> Answer:
    """The demo street `seed` at `time_s` as a JPEG; what is really there stands in a header.

    Raises MethodNotAllowed, RequestError.
    """
    if method not in ("GET", "HEAD"):
        raise MethodNotAllowed(f"{method[:20]} is not for this path", remedy="use GET")
    for name in query:
        if name not in ("seed", "time_s"):
            raise RequestError(
                f"a street has no {name[:40]!r}", param=name[:40], remedy="give seed and time_s"
            )
    seed, time_s = query.get("seed", "0"), query.get("time_s", "0")
    if not (seed.isascii() and seed.isdigit() and len(seed) <= 10 and int(seed) <= MOST_SEED):
        what = f"seed must be a whole number from 0 to {MOST_SEED}, got {seed[:40]!r}"
        raise RequestError(what, param="seed")
    try:
        moment_s = float(time_s)
    except ValueError:
        moment_s = math.nan
    if not 0 <= moment_s <= MOST_TIME_S:
        what = f"time_s must be 0..{MOST_TIME_S:g}, got {time_s[:40]!r}"
        raise RequestError(what, param="time_s")
    return await asyncio.to_thread(_street_picture, int(seed), moment_s)


def _street_picture(seed: int, time_s: float) -> Answer:
    street = _street(seed)
    truth = ", ".join(f"{colour} {name}" for colour, name in street.seen(time_s))
    headers = {"X-Edge-Vlm-Truth": truth, "Cache-Control": "no-store"}
    return Answer(encode_jpeg(street.picture(time_s)), "image/jpeg", headers)


@lru_cache(maxsize=32)
def _street(seed: int) -> Street:
    return Street(seed)
