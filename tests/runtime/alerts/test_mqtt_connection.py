"""Connections to a broker that goes away at an awkward moment."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

pytest.importorskip("aiomqtt")

from edge_vlm_runtime.alert_sinks.mqtt_connection import Connection

HOOKS = ("_on_socket_open", "_on_socket_register_write")


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("is_closed", [True, False])
def test_a_socket_that_is_closed_before_the_loop_sees_it_is_no_error(
    hook: str, is_closed: bool
) -> None:
    async def steps() -> tuple[list[dict[str, Any]], bool]:
        loop, errors = asyncio.get_running_loop(), list[dict[str, Any]]()
        loop.set_exception_handler(lambda _, context: errors.append(context))
        connection = Connection("127.0.0.1", 1883)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            descriptor = ours.fileno()
            getattr(connection, hook)(connection._client, None, ours)
            if is_closed:  # what the library does on its thread when the broker ends
                ours.close()
            await asyncio.sleep(0)
            is_watched = loop.remove_reader(descriptor) or loop.remove_writer(descriptor)
        misc = getattr(connection, "_misc_task", None)
        if misc is not None:
            misc.cancel()
            await asyncio.gather(misc, return_exceptions=True)
        return errors, is_watched

    errors, is_watched = asyncio.run(steps())
    assert not errors
    assert is_watched is not is_closed
