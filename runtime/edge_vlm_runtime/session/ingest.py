"""From a picture as it arrived to the features of its kept cells, for one stream.

The order is from cheap to dear: age, JPEG, near-duplicate check on a thumbnail, vision graphs. What
a step turns away costs nothing behind it. No I/O, no threads; the clock is an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edge_vlm.errors import EdgeVlmError, EngineError, FrameDecodeError
from edge_vlm.pixels.frames import Frame, decode_jpeg, decode_picture, thumbnail
from edge_vlm.pruning.policies import RatedPolicy, make_policy
from edge_vlm_runtime.protocol.frames import DropReason
from edge_vlm_runtime.protocol.settings import DropPolicy, SessionSettings
from edge_vlm_runtime.session.frame_queue import EncodedFrame

if TYPE_CHECKING:
    from edge_vlm_runtime.inference.vision import FrameTokens, VisionPipeline

THUMBNAIL = 32
POLICY_FIELDS = ("policy", "policy_seed", "min_cells")
BUDGET_FIELDS = ("keep_ratio", "vision_tokens_per_s")
INTERVAL_NEWS = 0.2
"""Weight of the last interval in what is expected of the next one."""


class FrameRejected(Exception):
    """The frame goes no further. `error` tells more where the reason is an error."""

    def __init__(self, reason: DropReason, error: EdgeVlmError | None = None) -> None:
        super().__init__(reason.value)
        self.reason = reason
        self.error = error


@dataclass(frozen=True, kw_only=True)
class NewestPicture:
    """As it arrived, to be looked at again in full detail."""

    sequence: int
    time_s: float
    """Capture time since the first frame of the session."""
    jpeg: bytes = field(repr=False)


class FrameIngest:
    """State of one stream up to the features: vision state, policy, last thumbnail."""

    def __init__(
        self,
        vision: VisionPipeline,
        settings: SessionSettings,
        clock_ns: Callable[[], int],
    ) -> None:
        self._vision = vision
        self._clock_ns = clock_ns
        self._settings = settings
        self._policy = _policy_of(settings, vision.num_cells)
        self._state = vision.new_state()
        self._interval_s = 1.0 / settings.fps_cap
        self._last_chosen_us: int | None = None
        self._origin_us: int | None = None
        self._last_thumbnail: np.ndarray | None = None
        self._last_encoded_us = 0
        self.newest: NewestPicture | None = None
        """The last one that could be decoded, near-duplicates included. Only one is ever held."""

    def configure(self, settings: SessionSettings) -> None:
        """Other rules for the frames to come. Another policy begins with a whole frame, another
        budget does not."""
        old, self._settings = self._settings, settings
        if _differ(old, settings, POLICY_FIELDS):
            self._policy = _policy_of(settings, self._vision.num_cells)
        elif _differ(old, settings, BUDGET_FIELDS):
            share = settings.keep_ratio * self._vision.num_cells
            self._policy.set_rate(share, share)  # a budget by time sets it anew each frame

    def encode(self, waiting: EncodedFrame) -> tuple[FrameTokens, dict[str, float]]:
        """Features and milliseconds by stage. Raises FrameRejected."""
        settings = self._settings
        begin_ns = self._clock_ns()
        live = settings.delivery is DropPolicy.LIVE
        if live and begin_ns - waiting.received_ns > settings.max_frame_age_s * 1e9:
            raise FrameRejected(DropReason.STALE)
        try:
            rgb = (decode_picture if settings.raw_frames else decode_jpeg)(waiting.jpeg)
        except FrameDecodeError as error:
            raise FrameRejected(DropReason.DECODE_ERROR, error) from error
        decode_ms = (self._clock_ns() - begin_ns) * 1e-6
        if self._origin_us is None:
            self._origin_us = waiting.capture_time_us
        pts_ns = (waiting.capture_time_us - self._origin_us) * 1000
        self.newest = NewestPicture(
            sequence=waiting.sequence, time_s=pts_ns * 1e-9, jpeg=waiting.jpeg
        )
        if live and settings.drop_duplicates and self._is_duplicate(rgb, waiting):
            raise FrameRejected(DropReason.DUPLICATE)
        frame = Frame(rgb=rgb, pts_ns=pts_ns, seq=waiting.sequence)
        self._fund(waiting.capture_time_us)
        try:
            tokens = self._vision.encode(frame, self._state, self._policy)
        except EngineError as error:
            raise FrameRejected(DropReason.ENGINE_ERROR, error) from error
        self._last_chosen_us = waiting.capture_time_us
        return tokens, {"decode": decode_ms, **tokens.stage_ms}

    def _fund(self, capture_time_us: int) -> None:
        """A budget by time grows with the time since the last frame, whatever came between."""
        per_s = self._settings.vision_tokens_per_s
        if per_s == 0.0:
            return
        since_s = self._interval_s
        if self._last_chosen_us is not None:
            since_s = (capture_time_us - self._last_chosen_us) * 1e-6
            self._interval_s += INTERVAL_NEWS * (since_s - self._interval_s)
        self._policy.set_rate(per_s * since_s, per_s * self._interval_s)

    def _is_duplicate(self, rgb: np.ndarray, waiting: EncodedFrame) -> bool:
        """Compares with the last frame let through; a new one takes its place."""
        small = thumbnail(rgb, THUMBNAIL)
        last = self._last_thumbnail
        since_us = waiting.capture_time_us - self._last_encoded_us
        if (
            last is not None
            and since_us < self._settings.heartbeat_s * 1e6
            and np.abs(small - last).max() <= self._settings.duplicate_threshold
        ):
            return True
        self._last_thumbnail = small
        self._last_encoded_us = waiting.capture_time_us
        return False


def _differ(old: SessionSettings, new: SessionSettings, fields: tuple[str, ...]) -> bool:
    return any(getattr(old, field) != getattr(new, field) for field in fields)


def _policy_of(settings: SessionSettings, num_cells: int) -> RatedPolicy:
    keep_ratio = settings.keep_ratio
    if settings.vision_tokens_per_s > 0.0:  # how long the first frame's excess is paid back
        keep_ratio = min(1.0, settings.vision_tokens_per_s / (settings.fps_cap * num_cells))
    return make_policy(
        settings.policy,
        keep_ratio,
        min_cells=settings.min_cells,
        seed=settings.policy_seed,
    )
