"""Waiting with a limit, and ending tasks, in event loops."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

AGAIN_S = 1.0
"""After this a task that went on in spite of its cancellation is cancelled again."""


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns or raises; after `seconds` it is cancelled: asyncio.TimeoutError.

    Instead of `asyncio.wait_for`, which before Python 3.12 swallows a cancellation that comes in
    the same turn of the loop as the end of `work`: whoever cancelled waits for ever then.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            await cancel(task)
            if task.cancelled():
                raise asyncio.TimeoutError
        return task.result()
    finally:
        await cancel(task)  # this wait was cancelled, or the task has ended


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Returns when all of them have ended, whatever they ended with.

    Once is not enough: libraries wait with `asyncio.wait_for` too.
    """
    running = {task for task in tasks if not task.done()}
    while running:
        for task in running:
            task.cancel()
        _, running = await asyncio.wait(running, timeout=AGAIN_S)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # or asyncio logs that nobody has asked
