"""One viewer's conversation about one stream.

A session does one unit of work at a time, so that one thread can serve several of them and video
goes on while an answer is decoded. `answer` decodes a token of the answer under way or takes up the
next question; `watch` checks the alerts that are due or works on the next frame. While an answer is
decoded, frames are encoded between its tokens and join the memory in one go when it ends.

No I/O, no threads; the clock and the way out for events are arguments.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm.errors import (
    ConfigError,
    EdgeVlmError,
    NoFrameYet,
    NoQuestion,
    QuestionCancelled,
    QuestionTooLong,
    TooManyQuestions,
    UnknownMessageType,
)
from edge_vlm.text.tokenizer import StreamDetokenizer
from edge_vlm_runtime import protocol
from edge_vlm_runtime.inference.generate import generate
from edge_vlm_runtime.inference.sampling import Sampling
from edge_vlm_runtime.protocol.base import MAX_TEXT
from edge_vlm_runtime.protocol.questions import UserMessage, lines
from edge_vlm_runtime.protocol.settings import ModelLimits, ServerLimits, SessionSettings
from edge_vlm_runtime.session.alerts import AlertMessage, AlertMonitor
from edge_vlm_runtime.session.budget import (
    cache_capacity,
    dialogue_reserve,
    question_capacity,
    video_window,
)
from edge_vlm_runtime.session.context import StreamContext
from edge_vlm_runtime.session.frame_queue import FrameQueue
from edge_vlm_runtime.session.ingest import FrameIngest
from edge_vlm_runtime.session.pointing import pointed_at
from edge_vlm_runtime.session.prompt_view import Detail, PromptView, Shown
from edge_vlm_runtime.session.stats import SessionStatsCounter
from edge_vlm_runtime.session.video_feed import Emit, VideoFeed, report

if TYPE_CHECKING:
    from edge_vlm_runtime.inference.bundle_model import LoadedBundle

ClockNs = Callable[[], int]


@dataclass(frozen=True, kw_only=True)
class Question:
    text: str
    received_ns: int
    detail: Detail = "video"
    event_id: str | None = None


@dataclass(frozen=True)
class _Waiting:
    """A question with what held when it was asked."""

    question: Question
    ids: np.ndarray
    sampling: Sampling


@dataclass
class _Answer:
    """The answer that is being decoded, behind what it was shown."""

    response_id: str
    question: Question
    shown: Shown
    tokens: Generator[int, None, str]
    detokenizer: StreamDetokenizer
    newest_frame: protocol.NewestFrame
    text_tokens: int
    text: str = ""
    output_tokens: int = 0
    first_delta_ns: int | None = None


def with_instructions(instructions: str, question: str) -> str:
    """What stands in the user's turn."""
    return f"{instructions}\n{question}" if instructions.strip() else question


class Session:
    """Owned by the engine thread; only `slot` is also touched by the socket's side."""

    def __init__(
        self,
        *,
        engines: LoadedBundle,
        settings: SessionSettings,
        limits: ServerLimits,
        emit: Emit,
        clock_ns: ClockNs,
        make_slot: Callable[..., FrameQueue] = FrameQueue,
    ) -> None:
        """Raises ConfigError when the model cannot hold to the settings."""
        self._engines = engines
        self._model = ModelLimits.from_bundle(engines.bundle)
        window_tokens = video_window(settings, self._model, limits)
        self._limits = limits
        self._require_room_for(settings.instructions)
        self._emit = emit
        self._clock_ns = clock_ns
        self.settings = settings
        self.slot = make_slot(
            delivery=settings.delivery,
            fps_cap=settings.fps_cap,
            wait_capacity=limits.max_unacknowledged_frames,
        )
        self._arena = engines.language.new_arena(cache_capacity(self._model, limits))
        self._context = StreamContext(
            language=engines.language,
            prompt=engines.prompt,
            arena=self._arena,
            model=self._model,
            attention=settings.attention,
            window_tokens=window_tokens,
            last_n=settings.last_n,
            reserve_tokens=dialogue_reserve(settings, self._model, limits),
        )
        self._alerts = AlertMonitor(
            language=engines.language,
            prompt=engines.prompt,
            context=self._context,
            arena=self._arena,
            model=self._model,
            limits=limits,
            emit=emit,
            clock_ns=clock_ns,
        )
        self._intake = FrameIngest(engines.vision, settings, clock_ns)
        self._exhibits = PromptView(
            engines=engines,
            context=self._context,
            arena=self._arena,
            model=self._model,
            intake=self._intake,
            clock_ns=clock_ns,
        )
        self._questions: deque[_Waiting] = deque()
        self._said = ""
        self._history: deque[np.ndarray] = deque()
        self._answer: _Answer | None = None
        self._num_answers = 0
        self._tally = SessionStatsCounter(clock_ns())
        self._feed = VideoFeed(
            slot=self.slot,
            intake=self._intake,
            context=self._context,
            arena=self._arena,
            alerts=self._alerts,
            tally=self._tally,
            emit=emit,
            clock_ns=clock_ns,
        )

    # ---- what the viewer asks for ------------------------------------------------------------

    def take(self, message: protocol.ClientMessage, received_ns: int) -> None:
        """Does what a message asks for. Raises what the method it stands for raises."""
        if isinstance(message, protocol.SessionUpdate):
            self.update(message.session, message.event_id)
        elif isinstance(message, protocol.ConversationItemCreate):
            self.say(message.item, message.event_id)
        elif isinstance(message, protocol.ResponseCreate):
            said, self._said = self._said, ""
            self.ask(
                Question(
                    text=lines([said, message.text]) if said else message.text,
                    received_ns=received_ns,
                    detail=message.detail,
                    event_id=message.event_id,
                )
            )
        elif isinstance(message, protocol.ResponseCancel):
            self.cancel(message.response_id)
        elif isinstance(message, AlertMessage):
            self._alerts.take(message)
        else:
            raise UnknownMessageType(f"a session does not take {protocol.tag_of(type(message))}")

    def update(self, patch: protocol.SettingsPatch, event_id: str | None = None) -> None:
        """Applies new settings from the next frame and question on. Raises ConfigError."""
        settings = self.settings.changed(patch.fields())
        video_window(settings, self._model, self._limits)  # raises if it cannot be held to
        self._require_room_for(settings.instructions)
        self.settings = settings
        self.slot.configure(delivery=settings.delivery, fps_cap=settings.fps_cap)
        self._intake.configure(settings)
        if self._answer is None:
            self._reconfigure_context()
        self._emit(protocol.SessionUpdated(settings=settings, event_id=event_id))

    def _require_room_for(self, instructions: str) -> None:
        """Raises ConfigError when they would leave less than half of its room to a question."""
        length = len(self._engines.prompt.tokenizer.encode(instructions))
        most = question_capacity(self._model, self._limits) // 2
        if length > most:
            raise ConfigError(
                f"instructions have {length} tokens",
                where="session settings",
                remedy=f"{most} are allowed",
            )

    def _reconfigure_context(self) -> None:
        settings = self.settings
        changes = self._context.reconfigure(
            attention=settings.attention,
            window_tokens=video_window(settings, self._model, self._limits),
            last_n=settings.last_n,
            reserve_tokens=dialogue_reserve(settings, self._model, self._limits),
        )
        report(changes, self._context, self._emit)

    def say(self, item: UserMessage, event_id: str | None = None) -> None:
        """Keeps what the user says for the next `response.create`. Raises QuestionTooLong."""
        said = lines([self._said, item.text])
        if len(said) > MAX_TEXT:
            raise QuestionTooLong(
                f"{len(said)} characters were said and not asked yet", remedy="ask, or say less"
            )
        self._said = said
        self._emit(protocol.ConversationItemCreated(item=item, event_id=event_id))

    def ask(self, question: Question) -> None:
        """Queues a question. Raises NoQuestion, SnapshotsUnsupported, NoFrameYet, QuestionTooLong,
        TooManyQuestions."""
        if not question.text.strip():
            raise NoQuestion(
                "there is no question to answer",
                remedy="give response.create a text, or send conversation.item.create first",
            )
        self._exhibits.require(question.detail)
        if not self._has_seen and len(self.slot) == 0:
            raise NoFrameYet("there is no frame to answer from yet", remedy="send a frame first")
        if len(self._questions) >= self._limits.max_queued_questions:
            raise TooManyQuestions(
                f"{len(self._questions)} questions are waiting already",
                remedy="wait for answers or cancel them",
            )
        settings = self.settings
        prompted = with_instructions(settings.instructions, question.text)
        ids = self._engines.prompt.question_ids(prompted)
        most = question_capacity(self._model, self._limits)
        if len(ids) > most:
            shared = " with the session's instructions" if settings.instructions else ""
            raise QuestionTooLong(
                f"the question{shared} has {len(ids)} tokens", remedy=f"{most} are allowed"
            )
        sampling = Sampling(
            temperature=settings.temperature, top_p=settings.top_p, seed=settings.seed
        )
        self._questions.append(_Waiting(question, ids, sampling))

    def cancel(self, response_id: str | None) -> None:
        """Stops the answer under way; without an id also all questions that wait."""
        if response_id is None:
            self._turn_questions_away("the question was cancelled before its answer began")
        if self._answer is not None and response_id in (None, self._answer.response_id):
            self._finish("cancelled", None)

    def _turn_questions_away(self, why: str) -> None:
        while self._questions:
            question = self._questions.popleft().question
            self._emit_error(QuestionCancelled(why), question.event_id)

    @property
    def is_answering(self) -> bool:
        return self._answer is not None or bool(self._questions)

    def close(self) -> None:
        """Ends the answer under way and gives every waiting frame and question its outcome."""
        self._turn_questions_away("the session ended before the answer began")
        if self._answer is not None:
            self._finish("cancelled", None)
        self._feed.close()
        self._alerts.close()
        self._arena.close()

    # ---- one unit of work --------------------------------------------------------------------

    def answer(self) -> bool:
        """A token of the answer under way, or the next question; False when nobody waits.

        What the engines raise is reported as an `error` event and ends only the answer.
        """
        if self._answer is not None:
            self._decode_one_token()
            return True
        if not self._questions:
            return False
        if self._feed.has_pending:
            self._feed.join()
        if self._context.newest is not None:
            self._start_answer(self._questions.popleft())
            return True
        if len(self.slot) == 0:  # every frame that came before it turned out unusable
            question = self._questions.popleft().question
            self._emit_error(NoFrameYet("there is no frame to answer from yet"), question.event_id)
            return True
        return False

    def watch(self) -> bool:
        """The alerts that are due, or the next frame; False when there is nothing to do.

        What the engines raise becomes an event and ends only the frame it belongs to.
        """
        answering = self._answer is not None
        if not answering and self._alerts.step():
            return True
        return self._feed.step(answering=answering)

    def step(self) -> bool:
        """One unit of a session that has the engines for itself: an answer's tokens and frames
        alternate. Several sessions take turns, see `Scheduler`."""
        answering = self._answer is not None
        if self.answer() and not answering:
            return True
        return self.watch() or answering

    @property
    def _has_seen(self) -> bool:
        return self._context.newest is not None or self._feed.has_pending

    # ---- answers -----------------------------------------------------------------------------

    def _start_answer(self, waiting: _Waiting) -> None:
        engines, prompt, question = self._engines, self._engines.prompt, waiting.question
        self._num_answers += 1
        response_id = f"response_{self._num_answers}"
        newest = self._feed.newest_frame()
        ids = np.concatenate([*self._history, waiting.ids])
        shown: Shown | None = None
        try:
            shown = self._exhibits.show(question.detail, len(ids) + self.settings.max_answer_tokens)
            logits = engines.language.prefill(shown.arena, engines.language.embed(ids))
        except EdgeVlmError as error:
            if shown is not None:
                shown.forget()
            self._emit_error(error, question.event_id)
            return
        self._emit(
            protocol.ResponseCreated(
                response_id=response_id,
                text=question.text,
                newest_frame=newest,
                snapshot=shown.snapshot,
                event_id=question.event_id,
            )
        )
        self._answer = _Answer(
            response_id=response_id,
            question=question,
            shown=shown,
            tokens=generate(
                engines.language,
                shown.arena,
                logits,
                waiting.sampling,
                prompt.eos_ids,
                self.settings.max_answer_tokens,
            ),
            detokenizer=StreamDetokenizer(prompt.tokenizer),
            newest_frame=newest,
            text_tokens=len(ids),
        )

    def _decode_one_token(self) -> None:
        answer = self._answer
        assert answer is not None
        try:
            token = next(answer.tokens)
        except StopIteration as end:
            self._say(answer, answer.detokenizer.flush())
            self._finish("completed", end.value)
            return
        except EdgeVlmError as error:
            self._emit_error(error, answer.question.event_id)
            self._finish("failed", None, error)
            return
        answer.output_tokens += 1
        self._say(answer, answer.detokenizer.push(token))

    def _say(self, answer: _Answer, delta: str) -> None:
        if not delta:
            return
        if answer.first_delta_ns is None:
            answer.first_delta_ns = self._clock_ns()
        answer.text += delta
        self._emit(protocol.ResponseOutputTextDelta(response_id=answer.response_id, delta=delta))

    def _finish(
        self, status: str, finish_reason: str | None, error: EdgeVlmError | None = None
    ) -> None:
        """Ends the answer: the cache goes back to the video, waiting frames join it."""
        answer = self._answer
        assert answer is not None
        self._answer = None
        answer.tokens.close()
        shown = answer.shown
        kv_tokens = shown.arena.length
        shown.forget()
        if status == "completed":
            turn = self._engines.prompt.turn_ids(answer.question.text, answer.text)
            self._history.append(turn)
        while len(self._history) > self.settings.history_turns:
            self._history.popleft()
        now_ns = self._clock_ns()
        ttft_s = tokens_per_s = None
        if answer.first_delta_ns is not None:
            ttft_s = (answer.first_delta_ns - answer.question.received_ns) * 1e-9
            decoding_s = (now_ns - answer.first_delta_ns) * 1e-9
            if answer.output_tokens > 1 and decoding_s > 0:
                tokens_per_s = (answer.output_tokens - 1) / decoding_s
        self._tally.last_ttft_s, self._tally.last_tokens_per_s = ttft_s, tokens_per_s
        self._emit(
            protocol.ResponseDone(
                response_id=answer.response_id,
                status=status,
                finish_reason=finish_reason,
                text=answer.text,
                usage=protocol.Usage(
                    vision_tokens=shown.vision_tokens,
                    text_tokens=answer.text_tokens,
                    output_tokens=answer.output_tokens,
                ),
                ttft_s=ttft_s,
                tokens_per_s=tokens_per_s,
                newest_frame=answer.newest_frame,
                kv_tokens=kv_tokens,
                time_offset_s=self._context.time_offset_s,
                snapshot=shown.snapshot,
                points=pointed_at(answer.text, shown.frames, shown.snapshot),
                error_code=None if error is None else error.code,
            )
        )
        self._catch_up()

    def _catch_up(self) -> None:
        """Settings and frames that came while the answer was decoded."""
        try:
            self._reconfigure_context()
        except EdgeVlmError as error:
            self._emit_error(error)
        self._feed.join()

    # ---- reports -----------------------------------------------------------------------------

    def _emit_error(self, error: EdgeVlmError, event_id: str | None = None) -> None:
        self._emit(protocol.error_event(error, event_id=event_id))

    def emit_stats(self) -> None:
        """A `session.stats` event about everything so far; rates are since the last one."""
        received, dropped = self.slot.counts()
        self._emit(
            self._tally.event(
                now_ns=self._clock_ns(),
                received=received,
                dropped=dropped,
                frames_in_memory=self._context.num_frames,
                kv_tokens=self._arena.length,
                kv_capacity_tokens=self._arena.capacity,
                questions_waiting=len(self._questions),
            )
        )
