"""Answers as a user gets them: the path `served` of `edge-vlm eval`.

Each clip is one session in each run. Its pictures go over the websocket as JPEG, a question is
asked when the frames up to its own have been processed, and what comes back is the generated text.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, cast

from edge_vlm.config import VisionAttention
from edge_vlm.errors import ConfigError, SessionError
from edge_vlm.evaluation.offline import seed_of
from edge_vlm.evaluation.runs import (
    FEWER_FRAMES,
    KEEP_ALL,
    LAST_N,
    MAX_ANSWER_TOKENS,
    MIN_CELLS,
    THRESHOLD,
    ClipAnswers,
    Run,
)
from edge_vlm.formats.qa_set import ClipQuestions
from edge_vlm.pixels.sampling import FrameRule
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.client.connection import Access
from edge_vlm_runtime.protocol.frames import DropReason
from edge_vlm_runtime.protocol.settings import CLIP, POLICIES, Attention
from edge_vlm_runtime.protocol.typed import Settings
from edge_vlm_runtime.session.budget import SCORED_POLICIES

DUPLICATE = DropReason.DUPLICATE.value


def settings_of(run: Run, clip: ClipQuestions) -> Settings:
    """The session's settings for a run over a clip."""
    whole = run.policy in (FEWER_FRAMES, LAST_N)
    attention = Attention.FRAME if run.attention is VisionAttention.FRAME else Attention.EXACT
    by_threshold = run.policy == THRESHOLD
    fields: dict[str, Any] = {
        "delivery": "wait",
        "policy": KEEP_ALL if whole else "stream" if by_threshold else run.policy,
        "keep_ratio": 1.0 if whole or by_threshold else run.keep_ratio,
        "change_threshold": run.keep_ratio if by_threshold else 0.0,
        "policy_seed": seed_of(clip),
        "min_cells": 0 if run.policy == CLIP else MIN_CELLS,
        "attention": (Attention.LAST_N if run.policy == LAST_N else attention).value,
        "last_n": run.frames_kept(len(clip.jpegs) - clip.num_quiet),
        "max_answer_tokens": MAX_ANSWER_TOKENS,
        "history_turns": 0,
        "window_tokens": 0,  # as many as fit: a default may be smaller than the clip
    }
    return cast(Settings, fields)


async def ask_clip(
    url: str,
    clip: ClipQuestions,
    run: Run,
    access: Access | None = None,
    reuse: float = 0.0,
) -> ClipAnswers:
    """One session: all pictures, and every question at its moment. Of a quiet time most pictures
    are dropped as duplicates, as of any stream. `reuse`: the session's, 0: the server's.

    Raises what the client raises, SessionError for a frame that the server did not take and
    ConfigError for a clip that the session does not hold, because the answers behind it would be
    about something else.
    """
    memory = _Memory(clip, run)
    settings = settings_of(run, clip)
    if reuse:
        settings["reuse"] = reuse
    async with await Client.connect(url, settings, on_event=memory.note, access=access) as client:
        texts = [""] * len(clip.questions)
        repeats: Counter[str] = Counter()
        for i, (jpeg, time_s) in enumerate(zip(clip.jpegs, clip.times_s, strict=True)):
            if run.policy != FEWER_FRAMES or run.shows_frame(i):
                await client.send_frame(jpeg, round(time_s * 1e6))
                await client.wait_processed()
                memory.require_whole()
            if i <= clip.num_quiet:
                repeats[DUPLICATE] = client.frames.dropped[DUPLICATE]
            for reason in client.frames.dropped - repeats:
                raise SessionError(
                    f"frame {i} was dropped ({reason})",
                    where=f"clip {clip.name}, run {run.name}",
                    remedy="evaluate on a server that nobody else uses",
                )
            for number, question in enumerate(clip.questions):
                if question.frame == i:
                    texts[number] = (await client.ask(question.text)).shown_text
                    memory.require_whole()  # frames may join it just before an answer
        num_cells = client.created.model.limits.num_cells
        kept = client.frames.cells_kept
        if run.policy == LAST_N:
            kept = num_cells * min(run.frames_kept(len(clip.jpegs)), len(clip.jpegs))
        if run.policy == CLIP:  # chosen from the frames up to the last question's
            newest = max((question.frame for question in clip.questions), default=-1)
            return ClipAnswers(texts, num_cells * (newest + 1), kept)
        seen = client.frames.cells_seen if clip.num_quiet else num_cells * len(clip.jpegs)
    return ClipAnswers(texts, seen, kept)


class _Memory:
    """What a session still holds of a clip."""

    def __init__(self, clip: ClipQuestions, run: Run) -> None:
        self._where = f"clip {clip.name}, run {run.name}"
        self._may_forget = bool(clip.num_quiet)
        self._last_n = run.frames_kept(len(clip.jpegs)) if run.policy == LAST_N else None
        self._accepted = self._evicted = 0

    def note(self, event: protocol.ServerEvent) -> None:
        if isinstance(event, protocol.FrameAccepted):
            self._accepted += 1
        elif isinstance(event, protocol.MemoryEvicted):
            self._evicted += event.frames

    def require_whole(self) -> None:
        """Raises ConfigError if something is forgotten that the run would show. What comes late in
        a stream is asked about as it is remembered then."""
        held = self._accepted - self._evicted
        is_shown = self._last_n is not None and held > self._last_n
        if not self._evicted or self._may_forget or is_shown:
            return
        raise ConfigError(
            f"the session holds {held} frames at once, and the clip has more",
            where=self._where,
            remedy=f"take about {held} frames (--max-frames), or export and serve the model with "
            "more memory",
        )


class ServedEvaluator:
    """`edge_vlm.evaluation.runs.Evaluator` over a server."""

    def __init__(
        self, url: str, access: Access, identity: str | None = None, reuse: float = 0.0
    ) -> None:
        """`identity`: of the bundle, where it is known. `reuse`: of its sessions.

        Raises ServerUnreachable and its leaves, ProtocolError.
        """
        self._url, self._access, self._reuse = url, access, reuse
        self._loop = asyncio.new_event_loop()
        try:
            model, version = self._loop.run_until_complete(self._greet())
        except BaseException:
            self.close()
            raise
        self.name = model.bundle
        limits = model.limits
        self._by_change: bool = limits.scorer == "change"
        self.has_scores = bool(limits.has_scorer)
        self.attention = VisionAttention(limits.trained_attention)
        self.frames: FrameRule | None = None
        if limits.clip_frames:
            self.frames = FrameRule(num_frames=limits.clip_frames, max_fps=limits.clip_fps)
        self.identity = identity or f"{model.bundle} on {version}"
        if reuse:
            self.identity += f", reuse {reuse:g}"

    async def _greet(self) -> tuple[Any, str]:
        async with await Client.connect(self._url, access=self._access) as client:
            return client.created.model, client.created.server

    def can(self, run: Run) -> bool:
        """A session chooses as the frames come, and has no one-way memory of the newest frames."""
        if run.policy == LAST_N:
            return run.attention is VisionAttention.ALL
        if not self.has_scores and run.policy in SCORED_POLICIES:
            return False
        if run.policy == THRESHOLD:
            return self._by_change
        return run.policy == FEWER_FRAMES or run.policy in POLICIES

    def answers(
        self, clip: ClipQuestions, runs: Sequence[Run]
    ) -> Iterator[tuple[Run, ClipAnswers]]:
        for run in runs:
            asking = ask_clip(self._url, clip, run, self._access, self._reuse)
            yield run, self._loop.run_until_complete(asking)

    def close(self) -> None:
        self._loop.close()
