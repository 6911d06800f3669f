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
from edge_vlm.errors import SessionError
from edge_vlm.evaluation.offline import seed_of
from edge_vlm.evaluation.runs import (
    FEWER_FRAMES,
    KEEP_ALL,
    LAST_N,
    MAX_ANSWER_TOKENS,
    MIN_CELLS,
    ClipAnswers,
    Run,
)
from edge_vlm.formats.qa_set import ClipQuestions
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
    fields: dict[str, Any] = {
        "delivery": "wait",
        "policy": KEEP_ALL if whole else run.policy,
        "keep_ratio": 1.0 if whole else run.keep_ratio,
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
    url: str, clip: ClipQuestions, run: Run, access: Access | None = None
) -> ClipAnswers:
    """One session: all pictures, and every question at its moment. Of a quiet time most pictures
    are dropped as duplicates, as of any stream.

    Raises what the client raises, and SessionError for a frame that the server did not take,
    because the answers behind it would be about something else.
    """
    async with await Client.connect(url, settings_of(run, clip), access=access) as client:
        texts = [""] * len(clip.questions)
        repeats: Counter[str] = Counter()
        for i, (jpeg, time_s) in enumerate(zip(clip.jpegs, clip.times_s, strict=True)):
            if run.policy != FEWER_FRAMES or run.shows_frame(i):
                await client.send_frame(jpeg, round(time_s * 1e6))
                await client.wait_processed()
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
        num_cells = client.created.model.limits.num_cells
        kept = client.frames.cells_kept
        if run.policy == LAST_N:
            kept = num_cells * min(run.frames_kept(len(clip.jpegs)), len(clip.jpegs))
        if run.policy == CLIP:  # chosen from the frames up to the last question's
            newest = max((question.frame for question in clip.questions), default=-1)
            return ClipAnswers(texts, num_cells * (newest + 1), kept)
        seen = client.frames.cells_seen if clip.num_quiet else num_cells * len(clip.jpegs)
    return ClipAnswers(texts, seen, kept)


class ServedEvaluator:
    """`edge_vlm.evaluation.runs.Evaluator` over a server."""

    def __init__(self, url: str, access: Access, identity: str | None = None) -> None:
        """`identity`: of the bundle, where it is known.

        Raises ServerUnreachable and its leaves, ProtocolError.
        """
        self._url, self._access = url, access
        self._loop = asyncio.new_event_loop()
        try:
            model, version = self._loop.run_until_complete(self._greet())
        except BaseException:
            self.close()
            raise
        self.name = model.bundle
        self.has_scores = bool(model.limits.has_scorer)
        self.attention = VisionAttention(model.limits.trained_attention)
        self.identity = identity or f"{model.bundle} on {version}"

    async def _greet(self) -> tuple[Any, str]:
        async with await Client.connect(self._url, access=self._access) as client:
            return client.created.model, client.created.server

    def can(self, run: Run) -> bool:
        """A session chooses as the frames come, and has no one-way memory of the newest frames."""
        if run.policy == LAST_N:
            return run.attention is VisionAttention.ALL
        if not self.has_scores and run.policy in SCORED_POLICIES:
            return False
        return run.policy == FEWER_FRAMES or run.policy in POLICIES

    def answers(
        self, clip: ClipQuestions, runs: Sequence[Run]
    ) -> Iterator[tuple[Run, ClipAnswers]]:
        for run in runs:
            asking = ask_clip(self._url, clip, run, self._access)
            yield run, self._loop.run_until_complete(asking)

    def close(self) -> None:
        self._loop.close()
