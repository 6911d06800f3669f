"""Watches something that has no end: a camera of one's own, or a stream that the server owns.

Servers may come and go meanwhile: each gets a new session, with the settings and alerts of the one
before and an empty memory, which is said. Questions may come at any time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from edge_vlm.errors import (
    EdgeVlmError,
    HostNotAllowed,
    NoFrameYet,
    ReplayLost,
    ServerBusy,
    ServerUnreachable,
    SessionGone,
    Unauthorized,
    UnknownStream,
    VideoError,
)
from edge_vlm.pixels.film.reading import BEHIND, CLOCK_JUMP, DECODE_ERROR
from edge_vlm.waiting import cancel
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.client import Answer, AnswerStream, Client
from edge_vlm_runtime.client.run import Observer, Outcome, PlannedQuestion, encoded
from edge_vlm_runtime.sources.container import Picture, Source
from edge_vlm_runtime.sources.threads import reading_thread

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
"""Between two tries to reach a server that is gone."""
MAX_TYPED = 32
"""Questions that wait for the first picture."""

Connect = Callable[[], Awaitable[Client]]


class LiveRun:
    """One watch, over all its sessions. Lives on the event loop."""

    def __init__(
        self,
        source: Source | None,
        connect: Connect,
        questions: Sequence[PlannedQuestion],
        *,
        observer: Observer,
        outcome: Outcome,
        begin: Callable[[Client, bool], Awaitable[None]],
        finish: Callable[[Client], Awaitable[None]],
        say: Callable[[str], None],
        comes_back: bool,
    ) -> None:
        """`source`: None where the server has its own; `connect` opens a session; `begin` is
        awaited with each, and whether it is a later one, `finish` with the last; `say` tells people
        what happens; `comes_back`: a server that is gone is waited for."""
        self._source = source
        self._connect = connect
        self._observer = observer
        self._outcome = outcome
        self._begin = begin
        self._finish = finish
        self._say = say
        self._comes_back = comes_back
        self._waiting = [*questions]
        self._pictures = _Newest()
        self._counted = Outcome()
        """Of the sessions before."""
        self.client: Client | None = None
        """The last one."""
        self._answers: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._has_seen = False
        """The session has been shown a picture: questions make sense."""
        self._now_s = 0.0
        """Capture time of the newest picture."""
        self._first_s: float | None = None
        """Of a stream that was running before, by the clock of its present session: another one's
        begins anew, and what is asked again and again goes on."""

    # ---- from outside ------------------------------------------------------------------------

    def ask(self, text: str) -> None:
        """A question that somebody typed: asked now, or after the first picture."""
        if len(self._waiting) < MAX_TYPED:
            self._waiting.append(PlannedQuestion(text=text))
            self._news.set()
        else:
            self._say(f"{MAX_TYPED} questions wait already; not asked: {text}")

    def on_event(self, event: protocol.ServerEvent) -> None:
        """Of whichever session there is; to be called with each."""
        if isinstance(event, (protocol.FrameAccepted, protocol.FrameDropped)):
            self._outcome.frames_sent += self._source is None
            if isinstance(event, protocol.FrameAccepted):
                if self._first_s is None:
                    self._first_s = event.time_s - self._now_s
                if self._source is None:
                    self._now_s = event.time_s - self._first_s
            self._has_seen = self._has_seen or (
                isinstance(event, protocol.FrameAccepted) or event.reason == "duplicate"
            )
            self._news.set()
        elif isinstance(event, protocol.StreamUpdated):
            self._tell(event.stream)

    def _tell(self, stream: protocol.Stream) -> None:
        why = "" if stream.detail is None else f": {stream.detail}"
        self._say(f"the stream {stream.name} is {stream.state}{why}")

    async def run(self, first: Client) -> None:
        """To the end of the source, or until cancelled. Raises what no new session helps against;
        what is wrong with the source stands in the outcome."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        client = first
        if self._source is not None:
            self._source.max_side = first.created.model.limits.useful_side
            self._pictures.start(self._source, loop)
        try:
            while True:
                self.client, self._has_seen, self._first_s = client, False, None
                try:
                    async with client:
                        await self._begin(client, client is not first)
                        try:
                            await self._watch(client)
                        except asyncio.CancelledError:  # Ctrl-C is how a camera's run ends
                            await self._finish(client)
                            raise
                        await self._finish(client)
                    return
                except (ServerUnreachable, SessionGone, ReplayLost) as error:
                    if not self._comes_back or not _may_pass(error):
                        raise
                    self._say(f"the session is lost ({error}): trying again until there is another")
                finally:
                    self._count(client)
                    await cancel(*self._answers)
                client = await self._opened()
        finally:
            if self._source is not None:
                self._source.close()
            self._outcome.elapsed_s = loop.time() - began_s
            for question in self._waiting:
                if question.every_s is None:
                    self._say(f"not asked: {question.text}")

    # ---- sessions ----------------------------------------------------------------------------

    async def _opened(self) -> Client:
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return await self._connect()
            except (ServerUnreachable, SessionGone) as error:
                if not _may_pass(error):
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _count(self, client: Client) -> None:
        """Adds what this client has counted."""
        frames, outcome = client.frames, self._outcome
        outcome.frames_processed += frames.processed
        outcome.cells_seen += frames.cells_seen
        outcome.cells_kept += frames.cells_kept
        outcome.dropped.update(frames.dropped)
        if self._source is not None:
            counts = self._source.counts
            outcome.clock_jumps = counts[CLOCK_JUMP]
            for reason in (DECODE_ERROR, BEHIND):
                if counts[reason] > self._counted.dropped[reason]:
                    outcome.dropped[reason] += counts[reason] - self._counted.dropped[reason]
                    self._counted.dropped[reason] = counts[reason]

    async def _watch(self, client: Client) -> None:
        """Until the source ends. Raises what ends the client."""
        created = client.created
        if isinstance(created, protocol.SessionCreated) and isinstance(
            created.stream, protocol.Stream
        ):
            self._has_seen = created.stream.state != "live"  # no picture will tell
            if self._has_seen:
                self._tell(created.stream)
        asking = asyncio.create_task(self._ask_when_due(client))
        try:
            if self._source is None:
                await client.wait(asking)
            else:
                await self._send_pictures(client, asking)
                await client.wait_processed()
                await self._ask_due(client, is_end=True)
                await asyncio.gather(*self._answers)
        finally:
            await cancel(asking)

    async def _send_pictures(self, client: Client, asking: asyncio.Task[None]) -> None:
        while True:
            coming = asyncio.create_task(self._pictures.next())
            try:
                picture = await client.wait(coming)
            except VideoError as error:
                self._outcome.source_error = error
                return
            finally:
                coming.cancel()
            if picture is None:
                return
            if asking.done():
                asking.result()
            sent = await asyncio.to_thread(encoded, client, picture.rgb)
            self._now_s = picture.time_s
            sequence = await client.send_frame(sent, round(picture.time_s * 1e6))
            self._outcome.frames_sent += 1
            self._observer.sent(sequence, picture)

    # ---- questions ---------------------------------------------------------------------------

    async def _ask_when_due(self, client: Client) -> None:
        while True:
            self._news.clear()
            if self._has_seen:
                await self._ask_due(client)
            await self._news.wait()

    async def _ask_due(self, client: Client, *, is_end: bool = False) -> None:
        """`is_end`: what was never due is asked now. What a connection breaks before is asked in
        the next session."""
        for question in tuple(self._waiting):
            is_due = question.at_s is None or question.at_s <= self._now_s + 1e-6
            if not (is_due or is_end) or question not in self._waiting:
                continue
            self._waiting.remove(question)
            try:
                await self._ask(client, question)
            except BaseException:
                self._waiting.insert(0, question)
                raise
            if not is_end and (again := question.again(self._now_s)) is not None:
                self._waiting.append(again)

    async def _ask(self, client: Client, question: PlannedQuestion) -> None:
        if self._source is not None and self._outcome.frames_sent == 0:
            error = self._outcome.source_error or NoFrameYet("the source gave no picture")
            self._note(question, error)
            return
        self._observer.asked(question, self._now_s)
        answer = await client.start_answer(question.text, question.detail)
        task = asyncio.create_task(self._follow(client, question, answer))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _follow(
        self, client: Client, question: PlannedQuestion, answer: AnswerStream
    ) -> None:
        try:
            result: Answer | EdgeVlmError
            try:
                async for delta in answer:
                    self._observer.delta(question, delta)
                result = await answer.answer()
            except EdgeVlmError as error:
                result = error
            self._note(question, result)
        except Exception as error:  # noqa: BLE001 - whoever watches waits on the client
            client.fail(error)

    def _note(self, question: PlannedQuestion, result: Answer | EdgeVlmError) -> None:
        self._outcome.note(result)
        self._observer.answered(question, result)


class _Newest:
    """The newest picture of a source, read on a thread of its own that outlives sessions."""

    def __init__(self) -> None:
        self._picture: Picture | None = None
        self._end: BaseException | None = None
        self._has_ended = False
        self._news = asyncio.Event()

    def start(self, source: Source, loop: asyncio.AbstractEventLoop) -> None:
        def read() -> None:
            end: BaseException | None = None
            try:
                for picture in source.pictures():
                    loop.call_soon_threadsafe(self._put, picture)
            except BaseException as error:  # noqa: BLE001 - handed over
                end = error
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._finish, end)

        reading_thread("edge-vlm-source", read, source.close).start()

    def _put(self, picture: Picture) -> None:
        self._picture = picture
        self._news.set()

    def _finish(self, end: BaseException | None) -> None:
        self._has_ended, self._end = True, end
        self._news.set()

    async def next(self) -> Picture | None:
        """None at the end. Raises what ended the source."""
        while self._picture is None:
            if self._has_ended:
                if self._end is not None:
                    raise self._end
                return None
            self._news.clear()
            await self._news.wait()
        picture, self._picture = self._picture, None
        return picture


def _may_pass(error: EdgeVlmError) -> bool:
    """Whether trying again may help."""
    if isinstance(error, ServerBusy):
        return True
    return not isinstance(error, (Unauthorized, HostNotAllowed, UnknownStream))
