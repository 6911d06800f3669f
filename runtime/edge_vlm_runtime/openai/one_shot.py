"""One request on the engines: a session of its own, made, shown the frames, asked and closed, or a
question to a live one. Lives on the event loop; frames are read on a thread.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, suppress
from typing import Any

from edge_vlm.errors import (
    EdgeVlmError,
    InternalError,
    QuestionTooLong,
    ServerBusy,
)
from edge_vlm.errors.requests import MediaRefused, Unsupported
from edge_vlm_runtime import protocol
from edge_vlm_runtime.engine_thread.handle import SessionHandle
from edge_vlm_runtime.engine_thread.worker import EngineWorker
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.openai.chat_request import ChatRequest
from edge_vlm_runtime.openai.media import MediaRules
from edge_vlm_runtime.openai.shots import Shot, shots_of
from edge_vlm_runtime.protocol.frames import DropReason
from edge_vlm_runtime.protocol.messages import error_from_detail
from edge_vlm_runtime.protocol.responses import (
    DialogueItem,
    DialoguePart,
    OwnResponseOptions,
    ResponseOptions,
)
from edge_vlm_runtime.protocol.settings import (
    Attention,
    DropPolicy,
    ModelLimits,
    ServerLimits,
    SessionSettings,
)
from edge_vlm_runtime.session.asking.questions import QueuedQuestion, plan_question, question_of
from edge_vlm_runtime.session.budget import cache_capacity, video_window
from edge_vlm_runtime.session.frames import EncodedFrame, Encoding

KEEP_ALL = "keep_all"
LATEST_S = 9999.9
"""A time stamp of the greatest length that is counted with."""
MOST_CHARACTERS = 64
"""Of a token, more than there are in any text: what is longer is not counted."""
BUSY_FRAMES = 4
"""Frames that are on their way to the engines at once."""

OnEvent = Callable[[protocol.ServerEvent], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A session for one request."""

    settings: SessionSettings
    limits: ServerLimits
    fps: float
    most_frames: int
    """Of a video."""


class OneShots:
    """Makes and runs the sessions of requests. One for each server."""

    def __init__(
        self,
        *,
        engines: LoadedBundle,
        worker: EngineWorker,
        limits: ServerLimits,
        settings: SessionSettings,
        rules: MediaRules,
        on_event: OnEvent,
    ) -> None:
        """`settings`: of new sessions; `on_event` is told all that a session says."""
        self._engines = engines
        self._worker = worker
        self._limits = limits
        self._settings = settings
        self._rules = rules
        self._on_event = on_event
        self.model = ModelLimits.from_bundle(engines.bundle)
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def max_model_tokens(self) -> int:
        """Of frames, text and answer together."""
        return cache_capacity(self.model, self._limits)

    # ---- what is asked -----------------------------------------------------------------------

    def plan(self, request: ChatRequest) -> Plan:
        """Raises what `check` does, ConfigError."""
        prompt, most = self._engines.prompt, self.max_model_tokens // 4
        asked = self.check(request)
        changes: dict[str, Any] = {
            "delivery": DropPolicy.WAIT,
            "drop_duplicates": False,
            "window_tokens": 0,
            "history_turns": 0,
            "instructions": "",
            "max_answer_tokens": max(1, min(request.max_tokens or most, most)),
        }
        if request.keep_ratio is not None:
            changes |= {"keep_ratio": request.keep_ratio, "vision_tokens_per_s": 0.0}
        if request.policy is not None:
            changes["policy"] = request.policy
        settings = self._settings.changed(changes)
        if (request.keep_ratio or 1.0) < 1.0 and settings.policy == KEEP_ALL:
            raise Unsupported(
                f"the policy {KEEP_ALL} keeps every cell",
                param="edge_vlm.keep_ratio",
                remedy="give edge_vlm.policy, too: random and difference need no token scorer",
            )
        limits = dataclasses.replace(self._limits, max_question_tokens=len(asked.ids))
        window = video_window(settings, self.model, limits)
        if settings.attention is not Attention.FRAME:
            window = min(window, self.model.max_prefill_tokens)
        per_frame = len(prompt.frame_ids(LATEST_S, 0, first=False)) + (
            self.model.num_cells
            if settings.policy == KEEP_ALL
            else round(settings.keep_ratio * self.model.num_cells)
        )
        room = window - self.model.num_cells  # the first frame may be kept whole
        return Plan(
            settings=settings,
            limits=limits,
            fps=settings.fps_cap,
            most_frames=max(1, room // per_frame),
        )

    def check(self, request: ChatRequest) -> QueuedQuestion:
        """What takes a while is done here, not on the engines' thread: a long text is refused, a
        form compiled. Raises QuestionTooLong, ConfigError, AnswerFormError."""
        talk, most = request.conversation, self.max_model_tokens // 4
        length = len(talk.instructions) + sum(len(turn.text) for turn in talk.turns)
        if length > MOST_CHARACTERS * most:
            raise QuestionTooLong(
                f"the messages have {length} characters", remedy=f"{most} tokens are allowed"
            )
        question = self.question(request, "")
        asked = plan_question(
            question, question_of(question, "", 0), self._settings, self._engines.prompt
        )
        if len(asked.ids) > most:
            raise QuestionTooLong(
                f"the messages have {len(asked.ids)} tokens", remedy=f"{most} are allowed"
            )
        if asked.grammar is not None:
            self._engines.constraints.matcher(asked.grammar)
        return asked

    def question(self, request: ChatRequest, event_id: str) -> protocol.ResponseCreate:
        """As a viewer would ask it. `event_id`: by which its answer is known."""
        talk = request.conversation
        own = OwnResponseOptions()
        if request.temperature is not None:
            own.temperature = request.temperature
        if request.top_p is not None:
            own.top_p = request.top_p
        if request.seed is not None:
            own.seed = request.seed
        if request.stop:
            own.stop = list(request.stop)
        if request.choice:
            own.choice = list(request.choice)
        if request.json_schema is not None:
            own.json_schema = request.json_schema
        options = ResponseOptions(
            input=[
                DialogueItem(role=turn.role, content=[DialoguePart(text=turn.text)])
                for turn in talk.turns
            ],
            conversation="none",
            edge_vlm=own,
        )
        if talk.instructions.strip() or request.session is None:
            options.instructions = talk.instructions
        if request.max_tokens is not None:
            options.max_output_tokens = request.max_tokens
        return protocol.ResponseCreate(
            event_id=event_id, detail=self._detail(request), response=options
        )

    def _detail(self, request: ChatRequest) -> Any:
        """A single picture is looked at closely where the model can, unless the client says that a
        small view will do; several are a video."""
        media = request.conversation.media
        if request.session is not None:
            return request.detail or "video"
        if not media:
            return "text"
        if request.detail is not None:
            return request.detail
        single = len(media) == 1 and media[0].kind == "picture"
        close = single and self._engines.images is not None and not media[0].is_low
        return "snapshot" if close else "video"

    # ---- a session of its own ----------------------------------------------------------------

    async def run(
        self, request: ChatRequest, plan: Plan
    ) -> AsyncGenerator[protocol.ServerEvent, None]:
        """What a session says about the answer, up to `response.done`. Raises what it is refused
        with. Leaving early cancels all of it."""
        events: asyncio.Queue[protocol.ServerEvent | None] = asyncio.Queue()
        handle = await self._open(plan, events)
        try:
            async with aclosing(self._show(request, plan, handle, events)) as shown:
                async for event in shown:
                    yield event
            handle.take(self.question(request, "chat"))
            while True:
                event = await self._next(events)
                yield event
                if isinstance(event, protocol.ResponseDone):
                    return
        finally:
            self._close_soon(handle)

    async def _open(
        self, plan: Plan, events: asyncio.Queue[protocol.ServerEvent | None]
    ) -> SessionHandle:
        loop = asyncio.get_running_loop()
        opened: asyncio.Future[SessionHandle | EdgeVlmError] = loop.create_future()

        def on_open(result: SessionHandle | EdgeVlmError) -> None:
            if not opened.done():
                opened.set_result(result)
            elif isinstance(result, SessionHandle):  # nobody waits any more
                self._close_soon(result)

        def tell(found: list[protocol.ServerEvent]) -> None:
            for event in found:
                self._on_event(event)
                events.put_nowait(event)

        self._worker.open_session(
            plan.settings,
            now_ns=self._worker.clock_ns(),
            send=lambda found: _on_loop(loop, tell, found),
            on_open=lambda result: _on_loop(loop, on_open, result),
            on_failure=lambda: _on_loop(loop, events.put_nowait, None),
            limits=plan.limits,
            is_background=True,
            origin_us=0,
        )
        result = await opened
        if isinstance(result, EdgeVlmError):
            raise result
        return result

    def _close_soon(self, handle: SessionHandle) -> None:
        with suppress(ServerBusy):  # the engine thread has ended, and every session with it
            self._worker.close_session(handle, lambda: None)

    async def _next(
        self, events: asyncio.Queue[protocol.ServerEvent | None]
    ) -> protocol.ServerEvent:
        """Raises the error that it is."""
        event = await events.get()
        if event is None:
            raise InternalError("the session failed", remedy="see the server's log")
        if isinstance(event, protocol.Error):
            raise error_from_detail(event.error)
        return event

    async def _show(
        self,
        request: ChatRequest,
        plan: Plan,
        handle: SessionHandle,
        events: asyncio.Queue[protocol.ServerEvent | None],
    ) -> AsyncGenerator[protocol.ServerEvent, None]:
        """Hands over the frames as fast as the engines take them. Raises what a frame is refused
        with."""
        shots = shots_of(request, self._rules, fps=plan.fps, most=plan.most_frames)
        under_way: dict[int, Shot] = {}
        number, first_s = 0, 0.0
        try:
            shot = await asyncio.to_thread(next, shots, None)
            while shot is not None or under_way:
                if shot is not None and len(under_way) < BUSY_FRAMES:
                    under_way[number] = shot
                    first_s = shot.time_s if number == 0 else first_s
                    handle.put_frame(self._frame(number, shot))
                    number += 1
                    shot = await asyncio.to_thread(next, shots, None)
                    continue
                event = await self._next(events)
                if isinstance(event, protocol.FrameDropped):
                    raise _refusal_of(event, under_way[event.frame_sequence])
                if isinstance(event, protocol.FrameAccepted):
                    under_way.pop(event.frame_sequence, None)
                if isinstance(event, protocol.MemoryEvicted):
                    raise self._too_many(
                        number - max(len(under_way), event.frames), request, under_way, first_s
                    )
                yield event
        finally:
            await _close(shots)

    def _too_many(
        self, about: int, request: ChatRequest, under_way: dict[int, Shot], first_s: float
    ) -> EdgeVlmError:
        kind = "pictures" if request.conversation.pictures else "frames of the video"
        reach_s = self.model.max_time_s
        last_s = max((shot.time_s for shot in under_way.values()), default=first_s)
        if reach_s is not None and last_s - first_s > reach_s:
            return QuestionTooLong(
                f"the {kind} are further apart than the model can tell times: it was made for "
                f"{reach_s:g} seconds, these reach {last_s - first_s:g}",
                remedy="send fewer, or edge_vlm.frame_times closer together"
                if request.conversation.pictures
                else "send a shorter one",
            )
        return QuestionTooLong(
            f"only about {max(about, 1)} {kind} fit into the model's memory",
            remedy="send fewer, or a lower edge_vlm.keep_ratio",
        )

    def _frame(self, number: int, shot: Shot) -> EncodedFrame:
        return EncodedFrame(
            seq=number,
            capture_us=round(shot.time_s * 1e6) + number,  # never two at once
            received_ns=self._worker.clock_ns(),
            data=shot.data,
            encoding=Encoding.STILL,
        )


async def _close(shots: Iterator[Shot]) -> None:
    """Not while it is read on a thread, which a cancelled task has left behind."""
    while True:
        try:
            await asyncio.to_thread(shots.close)  # type: ignore[attr-defined]
        except ValueError:  # it is being executed
            await asyncio.sleep(0.01)
        else:
            return


def _refusal_of(event: protocol.FrameDropped, shot: Shot) -> EdgeVlmError:
    if event.reason == DropReason.DECODE_ERROR.value:
        return MediaRefused(event.message or "the picture cannot be read", param=shot.param)
    if event.reason == DropReason.ENGINE_ERROR.value:
        return InternalError(event.message or "the engines failed")
    return InternalError(f"a frame was dropped ({event.reason})")


def _on_loop(loop: asyncio.AbstractEventLoop, call: Callable[..., Any], *args: object) -> None:
    """For the engine thread, which never waits for a socket."""
    with suppress(RuntimeError):  # the loop is closed: there is nobody left to tell
        loop.call_soon_threadsafe(call, *args)
