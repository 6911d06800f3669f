"""A real server with the real tiny model on a real port, for tests over the websocket."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from edge_vlm_runtime.client import connection
from edge_vlm_runtime.protocol.settings import ServerLimits
from edge_vlm_runtime.server.app import Server
from tests.tiny import tiny_bundle

Result = TypeVar("Result")

TIMEOUT_S = 120.0
"""Generous: a busy machine is no failure."""
connection.OPEN_TIMEOUT_S = TIMEOUT_S  # nor is it for a client that opens a session


def open_server(bundle: Path | None = None, **limits: Any) -> Server:
    return Server.open(bundle or tiny_bundle(), threads=1, limits=ServerLimits(**limits))


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(coroutine, TIMEOUT_S))
