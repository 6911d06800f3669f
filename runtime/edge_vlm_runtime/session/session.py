"""One viewer's conversation about one stream: values go in, events come out.

A session does one unit of work at a time, so that one thread can serve several of them and video
goes on while an answer is decoded. `step(Turn.ANSWER)` decodes a token of the answer under way or
takes up the next question; `step(Turn.WATCH)` checks the alerts that are due; `receive_frame` works
on one frame. While an answer is decoded, frames are encoded between its tokens and join the memory
in one go when it ends. What there is to say is fetched with `events` after each unit.

No I/O, no threads. Every call is given the time; a stopwatch only measures how long steps take.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm.errors import (
    EdgeVlmError,
    NoFrameYet,
    NoQuestion,
    QuestionCancelled,
    QuestionTooLong,
    TooManyQuestions,
    UnknownMessageType,
)
from edge_vlm.pruning.clip_budget import variant_of
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.base import MAX_TEXT
from edge_vlm_runtime.protocol.questions import UserMessage, lines
from edge_vlm_runtime.protocol.settings import (
    Attention,
    ModelLimits,
    ServerLimits,
    SessionSettings,
)
from edge_vlm_runtime.session.alerts import AlertMessage, AlertMonitor
from edge_vlm_runtime.session.asking.answer import Answer
from edge_vlm_runtime.session.asking.prompt_view import PromptBuilder
from edge_vlm_runtime.session.asking.questions import (
    QueuedQuestion,
    has_own_dialogue,
    plan_question,
    question_of,
    require_short,
    require_short_instructions,
)
from edge_vlm_runtime.session.budget import (
    MemoryPlan,
    cache_capacity,
    clip_capacity,
    longest_answer,
    notes_on,
    plan_memory,
    question_capacity,
    video_room,
)
from edge_vlm_runtime.session.clip import ClipGatherer, require_moments, require_same_kind
from edge_vlm_runtime.session.context import StreamContext
from edge_vlm_runtime.session.frames import EncodedFrame
from edge_vlm_runtime.session.ingest import FrameIngest
from edge_vlm_runtime.session.outbox import Outbox
from edge_vlm_runtime.session.stats import SessionStatsCounter
from edge_vlm_runtime.session.stream_clock import StreamClock

if TYPE_CHECKING:
    from edge_vlm_runtime.inference.bundle_model import LoadedBundle


class Turn(str, Enum):
    """What a unit of work is for."""

    ANSWER = "answer"
    WATCH = "watch"


class Session:
    """Owned by one thread. Times are of one monotonic clock; `frames_waiting` is how many frames
    its owner has not handed over yet."""

    def __init__(
        self,
        *,
        engines: LoadedBundle,
        settings: SessionSettings,
        limits: ServerLimits,
        now_ns: int,
        stopwatch_ns: Callable[[], int],
        origin_us: int | None = None,
    ) -> None:
        """`stopwatch_ns`: for durations inside a unit of work; `origin_us`: capture time at which
        the stream begins, if that is not its first frame's. Raises ConfigError when the model
        cannot hold to the settings, and what making the arena raises."""
        self.settings = settings
        self._engines = engines
        self._limits = limits
        self._model = ModelLimits.from_bundle(engines.bundle)
        self._subtitle_ids = self._subtitles_of(settings)
        plan = self._plan(settings, self._subtitle_ids)
        most = question_capacity(self._model, limits) // 2
        require_short_instructions(settings.instructions, most, self._engines.prompt)
        self._outbox = Outbox()
        self._stats = SessionStatsCounter(now_ns)
        clock = StreamClock(origin_us)
        self._context = StreamContext(
            language=engines.language,
            prompt=engines.prompt,
            clock=clock,
            model=self._model,
            capacity=cache_capacity(self._model, limits),
            plan=plan,
        )
        self._alerts = AlertMonitor(
            language=engines.language,
            prompt=engines.prompt,
            context=self._context,
            model=self._model,
            limits=limits,
            outbox=self._outbox,
        )
        self._ingest = FrameIngest(
            vision=engines.vision,
            clip=ClipGatherer(
                vision=engines.vision,
                prompt=engines.prompt,
                context=self._context,
                settings=settings,
                variant=variant_of(engines.bundle.config),
                most_frames=partial(clip_capacity, model=self._model, limits=limits),
                most_s=self._model.max_time_s,
            ),
            settings=settings,
            clock=clock,
            context=self._context,
            alerts=self._alerts,
            stats=self._stats,
            outbox=self._outbox,
            stopwatch_ns=stopwatch_ns,
        )
        self._prompts = PromptBuilder(
            engines=engines, context=self._context, clock=clock, stopwatch_ns=stopwatch_ns
        )
        self._unasked_text = ""
        """What the user has said and not asked yet."""
        self._questions: deque[QueuedQuestion] = deque()
        self._history: deque[np.ndarray] = deque()
        self._answer: Answer | None = None
        self._num_answers = 0

    def events(self, now_ns: int) -> list[protocol.ServerEvent]:
        """What there is to say since the last call. `now_ns` is when the work on it ended: ages
        count up to then."""
        return self._outbox.drain(now_ns)

    @property
    def is_answering(self) -> bool:
        """An answer is under way or waited for."""
        return self._answer is not None or bool(self._questions)

    @property
    def is_decoding(self) -> bool:
        """An answer is under way."""
        return self._answer is not None

    @property
    def takes_frames(self) -> bool:
        """False while as many frames as may wait for the end of the answer under way."""
        return self._answer is None or not self._ingest.is_full

    @property
    def picture_wanted(self) -> EncodedFrame | None:
        """The picture that the next question is to be shown in full detail, if decoding it here
        would take long; see `provide`."""
        if self._answer is not None or not self._questions:
            return None
        picture = self._ingest.newest_picture
        wanted = self._questions[0].question.detail in ("snapshot", "both")
        return picture if wanted and picture is not None and picture.is_dear else None

    def provide(self, picture: EncodedFrame) -> None:
        """What was wanted, with what was made of it."""
        self._ingest.newest_picture = picture

    # ---- what the viewer asks for ------------------------------------------------------------

    def receive_message(
        self,
        message: protocol.ClientMessage,
        now_ns: int,
        *,
        received_ns: int | None = None,
        frames_waiting: int = 0,
    ) -> None:
        """Does what a message asks for; what is refused gets an `error` event.

        `received_ns`: when it came, which may be a while ago; an answer's time to first token
        counts from then.
        """
        came_ns = now_ns if received_ns is None else received_ns
        try:
            if isinstance(message, protocol.SessionUpdate):
                self._update(message)
            elif isinstance(message, protocol.ConversationItemCreate):
                self._keep_text(message.item)
                self._outbox.add(
                    protocol.ConversationItemCreated(item=message.item, event_id=message.event_id)
                )
            elif isinstance(message, protocol.ResponseCreate):
                self._enqueue(message, came_ns, frames_waiting)
            elif isinstance(message, protocol.ResponseCancel):
                self._cancel(message.response_id, now_ns)
            elif isinstance(message, AlertMessage):
                require_moments(message, self.settings)
                self._alerts.take(message)
            else:
                raise UnknownMessageType(
                    f"a session does not take {protocol.tag_of(type(message))}"
                )
        except EdgeVlmError as error:
            self._outbox.add_error(error, message.event_id)

    def _update(self, message: protocol.SessionUpdate) -> None:
        """Applies new settings from the next frame and question on. Raises ConfigError, or what the
        engines raise on a memory in another mode; the old settings then stay in force."""
        changes = message.session.fields()
        settings = self.settings.changed(changes)
        subtitle_ids = self._subtitles_of(settings)
        wanted = message.session.max_output
        if wanted is not None and "max_answer_tokens" not in changes:
            most = longest_answer(settings, self._model, self._limits, len(subtitle_ids))
            settings = settings.changed({"max_answer_tokens": min(wanted, most)})
        plan = self._plan(settings, subtitle_ids)
        require_same_kind(self.settings, settings, self._ingest.has_begun, self._alerts.is_watching)
        if settings.instructions != self.settings.instructions:
            most = question_capacity(self._model, self._limits) // 2
            require_short_instructions(settings.instructions, most, self._engines.prompt)
        if self._answer is None:
            try:
                self._look_at_all(plan)
                self._context.reconfigure(plan)
            finally:
                self._ingest.report_changes()
        self.settings, self._subtitle_ids = settings, subtitle_ids
        self._ingest.configure(settings)
        self._trim_history()
        self._outbox.add(
            protocol.SessionUpdated(
                settings=settings,
                video=video_room(settings, self._model, self._limits, len(subtitle_ids)),
                event_id=message.event_id,
                notes=notes_on(settings, self._model) or None,
            )
        )

    def _subtitles_of(self, settings: SessionSettings) -> np.ndarray:
        return self._engines.prompt.subtitle_ids(settings.subtitles)

    def _plan(self, settings: SessionSettings, subtitle_ids: np.ndarray) -> MemoryPlan:
        """Raises ConfigError as `video_window` does."""
        return plan_memory(settings, self._model, self._limits, len(subtitle_ids))

    def _look_at_all(self, plan: MemoryPlan) -> None:
        """Where every frame has to be in the cache there is none that was postponed."""
        while plan.attention is Attention.FRAME and self._ingest.look(shown=False):
            pass

    def _keep_text(self, item: UserMessage) -> None:
        """Keeps what the user says for the next `response.create`. Raises QuestionTooLong."""
        text = lines([self._unasked_text, item.text])
        if len(text) > MAX_TEXT:
            raise QuestionTooLong(
                f"{len(text)} characters were said and not asked yet", remedy="ask, or say less"
            )
        self._unasked_text = text

    def _enqueue(self, message: protocol.ResponseCreate, came_ns: int, frames_waiting: int) -> None:
        """Raises NoQuestion, SnapshotsUnsupported, NoFrameYet, QuestionTooLong, TooManyQuestions,
        and what `plan_question` raises."""
        unasked = self._unasked_text
        if not has_own_dialogue(message):
            self._unasked_text = ""
        question = question_of(message, unasked, came_ns)
        if not question.text.strip():
            raise NoQuestion(
                "there is no question to answer",
                remedy="give response.create a text, or send conversation.item.create first",
            )
        self._prompts.require(question.detail)
        has_seen = self._context.newest is not None or self._ingest.has_pending
        if not has_seen and frames_waiting == 0 and question.detail != "text":
            raise NoFrameYet("there is no frame to answer from yet", remedy="send a frame first")
        if len(self._questions) >= self._limits.max_queued_questions:
            raise TooManyQuestions(
                f"{len(self._questions)} questions are waiting already",
                remedy="wait for answers or cancel them",
            )
        most = question_capacity(self._model, self._limits)
        require_short(message, question, most, self._engines.prompt)
        asked = plan_question(message, question, self.settings, self._engines.prompt)
        if len(asked.ids) > most:
            shared = " with the session's instructions" if self.settings.instructions else ""
            raise QuestionTooLong(
                f"the question{shared} has {len(asked.ids)} tokens", remedy=f"{most} are allowed"
            )
        if asked.grammar is not None:  # refused now rather than when its turn comes
            self._engines.constraints.matcher(asked.grammar)
        self._questions.append(asked)

    def _cancel(self, response_id: str | None, now_ns: int) -> None:
        """Stops the answer under way; without an id also all questions that wait."""
        if response_id is None:
            self._refuse_questions("the question was cancelled before its answer began")
        if self._answer is not None and response_id in (None, self._answer.response_id):
            self._finish("cancelled", now_ns)
            self._catch_up()

    def _refuse_questions(self, why: str) -> None:
        while self._questions:
            question = self._questions.popleft().question
            self._outbox.add_error(QuestionCancelled(why), question.event_id)
        self._ingest.stop_choosing()

    def close(self, now_ns: int) -> None:
        """Ends the answer under way and gives every waiting question its outcome."""
        self._refuse_questions("the session ended before the answer began")
        if self._answer is not None:
            self._finish("cancelled", now_ns)
        self._alerts.close()
        self._context.close()

    # ---- one unit of work --------------------------------------------------------------------

    def receive_frame(self, frame: EncodedFrame, now_ns: int, *, frames_waiting: int = 0) -> None:
        """Works on the next frame, which gets exactly one `frame.accepted` or `frame.dropped`. Only
        while `takes_frames`."""
        self._ingest.receive(
            frame, now_ns, answering=self._answer is not None, frames_waiting=frames_waiting
        )

    def step(self, turn: Turn, now_ns: int, *, frames_waiting: int = 0) -> bool:
        """One unit of work; False when there is none, and then nothing has changed.

        What the engines raise is reported as an `error` event and ends only what it belongs to.
        """
        if turn is Turn.WATCH:
            if self._answer is not None:
                return False
            return (self._alerts.is_watching and self._ingest.look()) or self._alerts.step()
        if self._answer is not None:
            self._decode_one_token(self._answer, now_ns)
            return True
        if not self._questions:
            return False
        if self._choose_cells():
            return True
        joined = self._ingest.has_pending
        if joined:
            self._ingest.join()
        if self._questions[0].question.detail not in ("snapshot", "text") and self._ingest.look():
            return True
        if self._context.newest is not None or self._questions[0].question.detail == "text":
            self._start_answer(self._questions.popleft(), now_ns)
            return True
        if frames_waiting == 0:  # every frame that came before it turned out unusable
            question = self._questions.popleft().question
            self._outbox.add_error(
                NoFrameYet("there is no frame to answer from yet"), question.event_id
            )
            return True
        return joined

    def _choose_cells(self) -> bool:
        """One frame more of a clip whose cells were not chosen yet; False when there is none."""
        try:
            return self._ingest.choose()
        except EdgeVlmError as error:
            question = self._questions.popleft().question
            self._outbox.add_error(error, question.event_id)
            self._ingest.stop_choosing()
            return True

    # ---- answers -----------------------------------------------------------------------------

    def _start_answer(self, queued: QueuedQuestion, now_ns: int) -> None:
        question = queued.question
        newest = self._context.newest
        self._num_answers += 1
        before = list(self._history) if queued.shows_history else []
        if question.detail not in ("snapshot", "text"):
            before.insert(0, self._subtitle_ids)
        max_tokens = self.settings.max_answer_tokens
        if queued.max_tokens is not None:
            max_tokens = min(max_tokens, queued.max_tokens)
        try:
            view = self._prompts.build(
                question.detail,
                self._ingest.newest_picture,
                sum(map(len, before)) + len(queued.ids) + max_tokens,
            )
            try:
                answer = Answer(
                    engines=self._engines,
                    response_id=f"response_{self._num_answers}",
                    queued=queued,
                    history_ids=before,
                    view=view,
                    newest_frame=protocol.NewestFrame(frame_sequence=0, time_s=0.0, age_s=0.0)
                    if newest is None or question.detail == "text"
                    else protocol.NewestFrame(
                        frame_sequence=newest.seq,
                        time_s=newest.pts_ns * 1e-9,
                        age_s=(now_ns - newest.received_ns) * 1e-9,
                    ),
                    max_tokens=max_tokens,
                    frames_accepted=self._stats.num_accepted,
                )
            except BaseException:
                view.release()
                raise
        except EdgeVlmError as error:
            self._outbox.add_error(error, question.event_id)
            return
        finally:
            if self._ingest.newest_picture is not None:  # it is large, decoded
                self._ingest.newest_picture = self._ingest.newest_picture.as_it_came()
        self._answer = answer
        self._outbox.add(answer.created())

    def _decode_one_token(self, answer: Answer, now_ns: int) -> None:
        try:
            delta = answer.decode_one(now_ns)
        except EdgeVlmError as error:
            self._outbox.add_error(error, answer.question.event_id)
            self._finish("failed", now_ns, error)
            self._catch_up()
            return
        if delta is not None:
            self._outbox.add(delta)
        if answer.finish_reason is not None:
            self._finish("completed", now_ns)
            self._catch_up()

    def _finish(self, status: str, now_ns: int, error: EdgeVlmError | None = None) -> None:
        """Ends the answer: the cache goes back to the video."""
        answer, self._answer = self._answer, None
        assert answer is not None
        done = answer.finish(status, now_ns, time_offset_s=self._context.time_offset_s, error=error)
        if status == "completed" and answer.queued.is_remembered:
            self._history.append(self._engines.prompt.turn_ids(answer.question.text, answer.text))
        self._trim_history()
        self._stats.last_ttft_s, self._stats.last_tokens_per_s = done.ttft_s, done.tokens_per_s
        self._outbox.add(done)

    def _trim_history(self) -> None:
        """Keeps what the settings show and have reserved room for."""
        turns = self.settings.history_turns
        turn_tokens = question_capacity(self._model, self._limits) + self.settings.max_answer_tokens
        while len(self._history) > turns or sum(map(len, self._history)) > turns * turn_tokens:
            self._history.popleft()

    def _catch_up(self) -> None:
        """Settings and frames that came while the answer was decoded."""
        plan = self._plan(self.settings, self._subtitle_ids)
        try:
            self._look_at_all(plan)
            self._context.reconfigure(plan)
        except EdgeVlmError as error:  # the settings were announced: the memory has to go
            self._outbox.add_error(error)
            self._context.forget_all()
            self._context.reconfigure(plan)
        self._ingest.report_changes()
        self._ingest.join()

    # ---- reports -----------------------------------------------------------------------------

    def report_stats(
        self, now_ns: int, *, frames_received: int, frames_dropped: dict[str, int]
    ) -> None:
        """A `session.stats` event about everything so far; rates are since the last one.

        `frames_received` and `frames_dropped` (by reason) count what came to its owner, and what of
        it was dropped before the session got it.
        """
        self._outbox.add(
            self._stats.event(
                now_ns,
                received=frames_received,
                dropped=frames_dropped,
                frames_in_memory=self._context.num_frames,
                kv_tokens=self._context.kv_tokens,
                kv_capacity_tokens=self._context.kv_capacity_tokens,
                questions_waiting=len(self._questions),
            )
        )
