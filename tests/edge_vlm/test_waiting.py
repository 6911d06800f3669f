"""Waiting with a limit: nothing swallows a cancellation, and nothing is left behind."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from edge_vlm import waiting
from edge_vlm.waiting import cancel, within


@pytest.mark.parametrize("error", [None, OSError("the receiver is gone")], ids=repr)
@pytest.mark.parametrize("turns", range(6))
def test_a_cancellation_is_never_swallowed(turns: int, error: OSError | None) -> None:
    """Also when it comes just as what is waited for ends, in whichever turn of the loop."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        goal = loop.create_future()

        async def work() -> None:
            await goal

        async def stand_by() -> None:
            await within(30.0, work())
            await asyncio.sleep(30.0)

        task = asyncio.create_task(stand_by())
        await asyncio.sleep(0.01)
        if error is None:
            goal.set_result(None)
        else:
            goal.set_exception(error)
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=5.0)
        assert task.done()
        # Cancelled, or with its own error if that had already come through.
        assert task.cancelled() or task.exception() is error

    asyncio.run(main())


def test_what_takes_too_long_is_cancelled_and_ended() -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.sleep(30.0)
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(within(0.01, work()))
    assert ended == [True]


def test_results_and_errors_come_through() -> None:
    async def work(error: Exception | None) -> int:
        if error is not None:
            raise error
        return 3

    assert asyncio.run(within(5.0, work(None))) == 3
    with pytest.raises(KeyError, match="gone"):
        asyncio.run(within(5.0, work(KeyError("gone"))))


def test_a_task_that_misses_a_cancellation_is_cancelled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waiting, "AGAIN_S", 0.01)
    missed: list[Any] = []

    async def work() -> None:
        while len(missed) < 2:
            try:
                await asyncio.sleep(30.0)
            except asyncio.CancelledError as error:
                missed.append(error)
        await asyncio.sleep(30.0)

    async def main() -> None:
        task = asyncio.create_task(work())
        await asyncio.sleep(0)
        await cancel(task)
        assert task.cancelled()
        await cancel(task)  # twice does no harm

    asyncio.run(main())
    assert len(missed) == 2
