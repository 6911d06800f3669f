"""Streams a source through a client and asks questions on the way: `watch`, `ask` and `demo`."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from edge_vlm.console.usage import is_like_a_number
from edge_vlm.errors import ConfigError, EdgeVlmError, NoFrameYet, VideoError
from edge_vlm.pixels.film.reading import BEHIND, CLOCK_JUMP, DECODE_ERROR
from edge_vlm.pixels.frames import Rgb, encode_jpeg, shrink_jpeg
from edge_vlm.waiting import cancel
from edge_vlm_runtime.client.client import Answer, AnswerStream, Client, Detail
from edge_vlm_runtime.sources.container import Picture, Source

MESSAGE_HEAD_BYTES = 1024
"""Room for what a message says about its picture."""


@dataclass(frozen=True, kw_only=True)
class PlannedQuestion:
    """Asked when the picture of `at_s` seconds has been processed; None: after the last one."""

    text: str
    detail: Detail = "video"
    """What is looked at, see `response.create` in docs/protocol.md."""
    at_s: float | None = None
    every_s: float | None = None
    """Asked again each time this long after `at_s`."""
    is_repeated: bool = False
    """It was asked before; `at_s` is its next time."""

    def again(self, now_s: float) -> PlannedQuestion | None:
        """As it is asked next, `every_s` from now; None if it is asked only once."""
        if self.every_s is None:
            return None
        return replace(self, at_s=now_s + self.every_s, is_repeated=True)


@dataclass
class Outcome:
    """What a run came to."""

    frames_sent: int = 0
    frames_processed: int = 0
    cells_seen: int = 0
    cells_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """By the server, and by the source: what could not be decoded or came too fast."""
    clock_jumps: int = 0
    """How often the source's clock jumped; its time went on."""
    elapsed_s: float = 0.0
    questions: int = 0
    answers: int = 0
    question_error: EdgeVlmError | None = None
    """Of the first question without an answer."""
    source_error: VideoError | None = None
    """The source broke on its way; everything before that was streamed and answered."""

    def note(self, result: Answer | EdgeVlmError) -> None:
        """Counts a question by what came of it. Answers are not kept: a run may have no end."""
        self.questions += 1
        if isinstance(result, Answer):
            self.answers += 1
        else:
            self.question_error = self.question_error or result

    @property
    def first_error(self) -> EdgeVlmError | None:
        return self.question_error or self.source_error


class Observer:
    """What a run tells whoever shows it. Every method may be overridden; none has to be."""

    def sent(self, sequence: int, picture: Picture) -> None:
        """A picture was sent."""

    def asked(self, question: PlannedQuestion, after_s: float) -> None:
        """A question was sent, after the picture of `after_s` seconds was processed."""

    def delta(self, question: PlannedQuestion, text: str) -> None:
        """A piece of its answer came."""

    def answered(self, question: PlannedQuestion, result: Answer | EdgeVlmError) -> None:
        """The answer is complete, or there will be none."""


async def stream(
    source: Source,
    client: Client,
    questions: Sequence[PlannedQuestion],
    *,
    real_time: bool,
    observer: Observer | None = None,
    outcome: Outcome | None = None,
) -> Outcome:
    """Sends every picture of the source; returns when all of them and all questions are done.

    A file is held to real time if `real_time`. Cancelling ends the source; what was reached until
    then stands in the `outcome` that was passed in. Raises what ends the client, also when the
    source gives nothing, and what the observer raises; what is wrong with the source or a question
    stands in the outcome.
    """
    run = _Run(source, client, observer or Observer(), outcome or Outcome())
    begin = run.loop.time()
    try:
        await run.send_pictures(list(questions), real_time and not source.is_live)
    finally:
        source.close()
        run.count(run.loop.time() - begin)
    return run.outcome


class _Run:
    def __init__(
        self, source: Source, client: Client, observer: Observer, outcome: Outcome
    ) -> None:
        self.source = source
        self.client = client
        self.observer = observer
        self.outcome = outcome
        self.loop = asyncio.get_running_loop()
        source.max_side = client.created.model.limits.useful_side
        self._answers: set[asyncio.Task[None]] = set()
        """Of questions that wait for the rest of their answer."""

    def count(self, elapsed_s: float) -> None:
        """Copies what the client has counted."""
        outcome, frames = self.outcome, self.client.frames
        outcome.elapsed_s = elapsed_s
        outcome.frames_processed = frames.processed
        outcome.cells_seen, outcome.cells_kept = frames.cells_seen, frames.cells_kept
        at_source = self.source.counts
        outcome.clock_jumps = at_source[CLOCK_JUMP]
        outcome.dropped = Counter(frames.dropped)
        for reason in (DECODE_ERROR, BEHIND):
            if at_source[reason]:
                outcome.dropped[reason] += at_source[reason]

    async def send_pictures(self, questions: list[PlannedQuestion], paced: bool) -> None:
        waiting = [question for question in questions if question.at_s is not None]
        last_s = 0.0
        begin_s: float | None = None
        pictures = self.source.pictures()
        try:
            while True:
                try:
                    picture = await self._next(pictures)
                except VideoError as error:
                    self.outcome.source_error = error
                    break
                if picture is None:
                    break
                if paced:
                    begin_s = self.loop.time() - picture.time_s if begin_s is None else begin_s
                    await asyncio.sleep(max(0.0, begin_s + picture.time_s - self.loop.time()))
                last_s = picture.time_s
                sent = await asyncio.to_thread(encoded, self.client, picture.rgb)
                sequence = await self.client.send_frame(sent, round(last_s * 1e6))
                self.outcome.frames_sent += 1
                self.observer.sent(sequence, picture)
                waiting = await self._ask_due(waiting, last_s)
            await self.client.wait_processed()
            for question in [*waiting, *(q for q in questions if q.at_s is None)]:
                await self._ask(question, last_s)
            await asyncio.gather(*self._answers)
            await self.client.wait_processed()  # raises what the observer raised meanwhile
        finally:
            await cancel(*self._answers)

    async def _next(self, pictures: Iterator[Picture]) -> Picture | None:
        """A camera may be silent for long: what ends the client does not wait for it."""
        coming = asyncio.create_task(asyncio.to_thread(next, pictures, None))
        try:
            return await self.client.wait(coming)
        finally:
            coming.cancel()

    async def _ask_due(self, waiting: list[PlannedQuestion], now_s: float) -> list[PlannedQuestion]:
        """Asks what is due; returns what is still to be asked."""
        later: list[PlannedQuestion] = []
        for question in waiting:
            assert question.at_s is not None
            if question.at_s > now_s + 1e-6:
                later.append(question)
                continue
            await self.client.wait_processed()
            await self._ask(question, now_s)
            if (again := question.again(now_s)) is not None:
                later.append(again)
        return later

    async def _ask(self, question: PlannedQuestion, after_s: float) -> None:
        if self.outcome.frames_sent == 0:  # nothing to ask about; the source says why
            error = self.outcome.source_error or NoFrameYet("the source gave no picture")
            self._note(question, error)
            return
        self.observer.asked(question, after_s)
        answer = await self.client.start_answer(question.text, question.detail)
        task = asyncio.create_task(self._follow(question, answer))
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _follow(self, question: PlannedQuestion, answer: AnswerStream) -> None:
        try:
            result: Answer | EdgeVlmError
            try:
                async for delta in answer:
                    self.observer.delta(question, delta)
                result = await answer.answer()
            except EdgeVlmError as error:
                result = error
            self._note(question, result)
        except Exception as error:  # noqa: BLE001 - whoever streams waits on the client
            self.client.fail(error)

    def _note(self, question: PlannedQuestion, result: Answer | EdgeVlmError) -> None:
        self.outcome.note(result)
        self.observer.answered(question, result)


def encoded(client: Client, rgb: Rgb) -> bytes | Rgb:
    """As it is where the session takes that, else as a JPEG that the server takes."""
    most_bytes = client.created.limits.max_message_bytes - MESSAGE_HEAD_BYTES
    if client.settings.raw_frames and rgb.nbytes <= most_bytes:
        return rgb
    jpeg = encode_jpeg(rgb)
    return jpeg if len(jpeg) <= most_bytes else shrink_jpeg(jpeg, most_bytes)


def parse_question(text: str, every_s: float | None, detail: Detail = "video") -> PlannedQuestion:
    """`TEXT` or `SECONDS@TEXT`, as `--ask` takes it. Raises ConfigError."""
    before, at, after = text.partition("@")
    try:
        at_s = float(before)
    except ValueError:
        at_s = math.nan
        if not is_like_a_number(before):
            at = ""
    if not (after if at else text).strip():
        raise ConfigError("the question is empty", where=repr(text), remedy="write what to ask")
    if not at:  # or the question has an @ in it
        return PlannedQuestion(text=text, detail=detail, at_s=every_s, every_s=every_s)
    if not 0 <= at_s < math.inf:
        raise ConfigError(
            f"{before!r} is no number of seconds",
            where=text,
            remedy="write SECONDS@TEXT, such as 2.5@TEXT, or TEXT alone",
        )
    return PlannedQuestion(text=after.strip(), detail=detail, at_s=at_s, every_s=every_s)
