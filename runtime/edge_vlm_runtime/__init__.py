"""Runs a bundle on a live feed: engines, streaming session, server, client. No torch.

The public names are imported when they are first used, so that importing the package is instant and
needs none of its extras.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_vlm_runtime.client.client import Client as Client
    from edge_vlm_runtime.client.client import connect as connect
    from edge_vlm_runtime.client.sync import SyncClient as SyncClient
    from edge_vlm_runtime.engine_thread.in_process import InProcessSession as InProcessSession
    from edge_vlm_runtime.inference.bundle_model import LoadedBundle as LoadedBundle
    from edge_vlm_runtime.protocol.typed import Settings as Settings
    from edge_vlm_runtime.server.app import Server as Server
    from edge_vlm_runtime.session.session import Session as Session

_HOMES = {
    "Client": "client.client",
    "InProcessSession": "engine_thread.in_process",
    "LoadedBundle": "inference.bundle_model",
    "Server": "server.app",
    "Session": "session.session",
    "Settings": "protocol.typed",
    "SyncClient": "client.sync",
    "connect": "client.client",
}
__all__ = [
    "Client",
    "InProcessSession",
    "LoadedBundle",
    "Server",
    "Session",
    "Settings",
    "SyncClient",
    "connect",
]


if not TYPE_CHECKING:  # a type checker knows the names from above, and no others

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
