"""One answer, from the question to `response.done`."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm.errors import EdgeVlmError
from edge_vlm.text.tokenizer import StreamDetokenizer
from edge_vlm_runtime import protocol
from edge_vlm_runtime.inference.generate import generate
from edge_vlm_runtime.session.asking.pointing import pointed_at
from edge_vlm_runtime.session.asking.prompt_view import PromptView
from edge_vlm_runtime.session.asking.questions import QueuedQuestion, StopText
from edge_vlm_runtime.session.stream_times import in_stream_time

if TYPE_CHECKING:
    from edge_vlm_runtime.inference.bundle_model import LoadedBundle


class Answer:
    """The answer that is being decoded after what it was shown."""

    def __init__(
        self,
        *,
        engines: LoadedBundle,
        response_id: str,
        queued: QueuedQuestion,
        history_ids: list[np.ndarray],
        view: PromptView,
        newest_frame: protocol.NewestFrame,
        max_tokens: int,
        frames_accepted: int,
    ) -> None:
        """Prefills `history_ids` (subtitles, earlier turns) and the question. Raises what
        `LanguageModel.prefill` and `Constraints.matcher` raise; the view then is still the
        caller's."""
        ids = np.concatenate([*history_ids, queued.ids])
        language, prompt = engines.language, engines.prompt
        matcher = None if queued.grammar is None else engines.constraints.matcher(queued.grammar)
        logits = language.prefill(view.arena, language.embed(ids))
        self.response_id = response_id
        self.queued = queued
        self.question = queued.question
        self.max_tokens = max_tokens
        self.text = ""
        self._view = view
        self._newest_frame = newest_frame
        self._frames_accepted = frames_accepted
        self._text_tokens = len(ids)
        self._output_tokens = 0
        self._first_delta_ns: int | None = None
        self._detokenizer = StreamDetokenizer(prompt.tokenizer)
        self._stop = StopText(queued.stop)
        self._tokens: Generator[int, None, str] = generate(
            language, view.arena, logits, queued.sampling, prompt.eos_ids, max_tokens, matcher
        )
        self.finish_reason: str | None = None
        """Set when the last token was decoded."""

    def created(self) -> protocol.ResponseCreated:
        return protocol.ResponseCreated(
            response_id=self.response_id,
            text=self.question.text,
            newest_frame=self._newest_frame,
            snapshot=self._view.snapshot,
            event_id=self.question.event_id,
        )

    def decode_one(self, now_ns: int) -> protocol.ResponseOutputTextDelta | None:
        """The next token; its text if it completes some. Raises what the engines raise."""
        try:
            token = next(self._tokens)
        except StopIteration as end:
            self.finish_reason = end.value
            delta, is_over = self._stop.push(self._detokenizer.flush())
            delta += "" if is_over else self._stop.flush()
        else:
            self._output_tokens += 1
            delta, is_over = self._stop.push(self._detokenizer.push(token))
        if is_over:
            self.finish_reason = "stop"
        if self.queued.is_choice and not self.text:
            delta = delta.lstrip(" ")
        if not delta:
            return None
        if self._first_delta_ns is None:
            self._first_delta_ns = now_ns
        self.text += delta
        return protocol.ResponseOutputTextDelta(response_id=self.response_id, delta=delta)

    def finish(
        self,
        status: str,
        now_ns: int,
        *,
        time_offset_s: float,
        error: EdgeVlmError | None = None,
    ) -> protocol.ResponseDone:
        """Gives the arena back."""
        self._tokens.close()
        view = self._view
        kv_tokens = view.arena.length
        view.release()
        ttft_s = tokens_per_s = None
        if self._first_delta_ns is not None:
            ttft_s = (self._first_delta_ns - self.question.received_ns) * 1e-9
            decoding_s = (now_ns - self._first_delta_ns) * 1e-9
            if self._output_tokens > 1 and decoding_s > 0:
                tokens_per_s = (self._output_tokens - 1) / decoding_s
        return protocol.ResponseDone(
            response_id=self.response_id,
            status=status,
            finish_reason=self.finish_reason,
            text=self.text,
            text_in_stream_time=in_stream_time(self.text, view.frames),
            usage=protocol.Usage(
                vision_tokens=view.vision_tokens,
                text_tokens=self._text_tokens,
                output_tokens=self._output_tokens,
            ),
            ttft_s=ttft_s,
            tokens_per_s=tokens_per_s,
            newest_frame=self._newest_frame,
            kv_tokens=kv_tokens,
            time_offset_s=time_offset_s,
            snapshot=view.snapshot,
            points=pointed_at(self.text, view.frames, view.snapshot),
            error_code=None if error is None else error.code,
            frames_shown=len(view.frames),
            frames_accepted=self._frames_accepted,
        )
