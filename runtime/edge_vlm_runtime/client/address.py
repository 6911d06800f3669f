"""How a server may be called: `HOST:PORT`, `http(s)://...` or `ws(s)://...`. Light to import."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, urlencode, urlsplit

from edge_vlm.errors import ConfigError
from edge_vlm_runtime.sources.masking import mask_credentials

DEFAULT_PORT = 8765
FORMS = "give HOST:PORT, http(s)://HOST:PORT or ws(s)://HOST:PORT"
SECURE = {"ws": "ws", "http": "ws", "wss": "wss", "https": "wss"}
PATH = "/v1/realtime"
"""Of the websocket, as `protocol.PATH`, which is not light."""
API = "/v1"


_LIKE = re.compile(
    r"(wss?|https?)://\S+"
    r"|([\w-]+(\.[\w-]+)*|\[[0-9a-f:]+\]):\d+([/?]\S*)?"
    r"|(localhost|\d+(\.\d+){3}|\[[0-9a-f:]+\]|[\w-]+\.local)([/?]\S*)?",
    re.IGNORECASE,
)


def is_address(text: str) -> bool:
    """Whether a text is more likely the address of a server than a question."""
    return _LIKE.fullmatch(text.strip()) is not None


def websocket_url(address: str) -> str:
    """Where the server's websocket is. A path in front of it, as of a proxy, stays; a whole address
    of a websocket stays as it is. Raises ConfigError."""
    parts = _parts(address)
    path = parts.path
    is_base = path in ("", "/") or path.rstrip("/").endswith(API)
    if parts.scheme in ("http", "https") or is_base or "://" not in address:
        path = f"{_folder(path)}{PATH}"
    return parts._replace(scheme=SECURE[parts.scheme], path=path, fragment="").geturl()


def stream_url(address: str, name: str) -> str:
    """Where one subscribes to a stream that the server owns. Raises ConfigError."""
    parts = urlsplit(websocket_url(address))
    query = "&".join(filter(None, [parts.query, urlencode({"stream": name})]))
    return parts._replace(query=query).geturl()


def http_url(address: str, path: str) -> str:
    """The same server's `path`, such as /v1/models. Raises ConfigError."""
    parts = _parts(address)
    scheme = {"ws": "http", "wss": "https"}[SECURE[parts.scheme]]
    whole = f"{_folder(parts.path)}{path}"
    return parts._replace(scheme=scheme, path=whole, query="", fragment="").geturl()


def _folder(path: str) -> str:
    """What stands before /v1."""
    bare = path.rstrip("/")
    return bare.removesuffix(PATH).removesuffix(API)


def _parts(address: str) -> SplitResult:
    if not isinstance(address, str):  # such as a variable that is not set
        raise ConfigError(f"not the address of a server: {address!r}", remedy=FORMS)
    text = address.strip()
    _, separator, _ = text.partition("://")
    try:
        parts = urlsplit(text if separator else f"ws://{text}")
        port = parts.port
    except ValueError as error:
        raise ConfigError(
            f"not the address of a server: {error}", where=mask_credentials(address), remedy=FORMS
        ) from error
    if parts.scheme not in SECURE or not parts.hostname or " " in text:
        raise ConfigError(
            "not the address of a server", where=mask_credentials(address), remedy=FORMS
        )
    if not separator and port is None:
        parts = parts._replace(netloc=f"{parts.netloc.rstrip(':')}:{DEFAULT_PORT}")
    return parts
