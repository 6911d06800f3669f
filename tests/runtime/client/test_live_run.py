"""A watch over several sessions: what a connection breaks before is asked in the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from edge_vlm.errors import ServerUnreachable
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.client.live_run import LiveRun
from edge_vlm_runtime.client.run import Observer, Outcome, PlannedQuestion


class Session:
    """Of a stream: frames come at certain times, and the connection breaks at some question."""

    def __init__(self, times_s: list[float], *, breaks_at: str | None = None) -> None:
        self.created = SimpleNamespace(session_id="s")
        self.frames = SimpleNamespace(processed=0, cells_seen=0, cells_kept=0, dropped={})
        self.on_event: Callable[[protocol.ServerEvent], None] = lambda event: None
        self.asked: list[str] = []
        self._times_s = times_s
        self._breaks_at = breaks_at
        self._broken = asyncio.Event()

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *_: object) -> None:
        return

    async def wait(self, task: asyncio.Task[None]) -> None:
        for number, time_s in enumerate(self._times_s, 1):
            self.on_event(accepted(number, time_s))
            for _ in range(10):  # whoever asks has its turns
                await asyncio.sleep(0)
            if task.done():
                task.result()
        if self._breaks_at is None:
            return
        raise ServerUnreachable("the connection broke")

    async def start_answer(self, text: str, detail: str) -> Any:
        if text == self._breaks_at:
            raise ServerUnreachable("the connection broke")
        self.asked.append(text)
        return Silence()


class Silence:
    """An answer that does not come."""

    def __aiter__(self) -> Silence:
        return self

    async def __anext__(self) -> str:
        raise ServerUnreachable("the connection broke")


def accepted(number: int, time_s: float) -> protocol.FrameAccepted:
    return protocol.FrameAccepted(
        frame_sequence=number,
        time_s=time_s,
        age_ms=1.0,
        queue_ms=0.0,
        in_memory=True,
        cells_seen=9,
        cells_kept=4,
        kept_cells=[],
        kv_tokens=1,
        stage_ms={},
    )


def watched(questions: list[PlannedQuestion], *sessions: list[Any]) -> tuple[list[Any], list[str]]:
    """The sessions when all is over, and what people were told."""
    said: list[str] = []
    made = [Session(times, breaks_at=broken) for times, broken in sessions]

    async def run() -> None:
        coming = iter(made)

        async def connect() -> Client:
            return cast(Client, next(coming))

        async def begin(client: Client, is_later: bool) -> None:
            client.on_event = live.on_event

        async def finish(client: Client) -> None:
            return

        live = LiveRun(
            None,
            connect,
            questions,
            observer=cast(Observer, SimpleNamespace(asked=nothing, answered=nothing)),
            outcome=Outcome(),
            begin=begin,
            finish=finish,
            say=said.append,
            comes_back=True,
        )
        await live.run(await connect())

    asyncio.run(run())
    return made, said


def nothing(*_: object) -> None:
    return


def test_questions_behind_a_broken_connection_are_asked_in_the_next_session() -> None:
    questions = [PlannedQuestion(text=text) for text in ("one", "two", "three")]
    (before, after), said = watched(questions, [[0.0], "two"], [[0.0], None])
    assert before.asked == ["one"]
    assert after.asked == ["two", "three"]
    assert not any("not asked" in line for line in said)


def test_a_repeated_question_goes_on_when_the_streams_clock_begins_anew() -> None:
    often = PlannedQuestion(text="what", at_s=0.0, every_s=5.0)
    (before, after), _ = watched([often], [[3600.0, 3606.0], "-"], [[0.0, 4.0, 8.0], None])
    assert before.asked == ["what"] * 2
    assert after.asked == ["what"]


def test_what_was_never_asked_is_said() -> None:
    _, said = watched([PlannedQuestion(text="late", at_s=9.0)], [[0.0], None])
    assert said == ["not asked: late"]
