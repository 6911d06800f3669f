"""A finished clip whose cells are chosen together, when a question comes: policy `clip`.

The first blocks and the scores of each frame are computed as it comes and held until then. The
choice is `edge_vlm.pruning.clip_budget`, in the variant of the model: for published STTS weights
that is their published computation. The rest of the vision side then runs frame by frame, so that
other sessions get their turns in between. What is held stays: a question about a longer clip has
all of it chosen anew.

No I/O, no threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edge_vlm.errors import AlertsUnsupported, ClipTooLong, ConfigError
from edge_vlm.pruning.clip_budget import Variant, clip_budget, context_of, num_kept
from edge_vlm_runtime.protocol.alerts import AlertCreate
from edge_vlm_runtime.protocol.settings import CLIP, SessionSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from edge_vlm.text.prompt import PromptFormat
    from edge_vlm_runtime.inference.vision import FrameStem, FrameTokens, VisionPipeline
    from edge_vlm_runtime.session.alerts import AlertMessage
    from edge_vlm_runtime.session.context import StreamContext

REMEDY = "take fewer frames a second (--fps), a lower keep_ratio, or policy stream"


class ClipGatherer:
    """The frames of one session's clip. Owned by the engine thread."""

    def __init__(
        self,
        *,
        vision: VisionPipeline,
        prompt: PromptFormat,
        context: StreamContext,
        settings: SessionSettings,
        variant: Variant,
        most_frames: Callable[[SessionSettings], int],
        most_s: float | None,
    ) -> None:
        """`most_frames` fit into memory under some settings; `most_s` is the last time stamp that
        the model knows."""
        self._vision = vision
        self._prompt = prompt
        self._context = context
        self._settings = settings
        self._variant: Variant = variant
        self._most_frames = most_frames
        self._most_s = most_s
        self._frames: list[FrameStem] = []
        self._marker_tokens = len(prompt.bos_ids)
        """Of the frames so far: time stamps and markers, and what begins the prompt."""
        self._too_long: ClipTooLong | None = None
        self._chosen: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]] | None = None
        """Kept cells and context [F, C] of the frames that are encoded now."""
        self._done: list[FrameTokens] = []
        self.is_open = False
        """There is something whose cells are not chosen, or not as the settings have it."""

    def configure(self, settings: SessionSettings) -> None:
        old, self._settings = self._settings, settings
        fields = ("keep_ratio", "min_cells", "attention", "max_answer_tokens", "window_tokens")
        if self._frames and any(getattr(old, f) != getattr(settings, f) for f in fields):
            self.reopen()

    @property
    def is_choosing(self) -> bool:
        """Some of the chosen frames are not encoded yet."""
        return self._chosen is not None

    def reopen(self) -> None:
        """Whatever was chosen is chosen anew for the next question."""
        self._chosen, self._done, self.is_open = None, [], bool(self._frames)

    def require_room(self, pts_ns: int) -> None:
        """For one more frame. Raises ClipTooLong, and from then on so does `encode_next`: an answer
        about a part of the clip would pass for one about all of it."""
        count, seconds = len(self._frames) + 1, self._seconds(pts_ns)
        tokens = self._marker_tokens + self._markers(pts_ns) + self._num_kept(count)
        most = self._context.window_tokens
        why = None
        if count > self._most_frames(self._settings):
            why = f"a session's memory holds {self._most_frames(self._settings)} frames"
        elif tokens > most:
            why = f"{count} frames are {tokens} tokens, and there is room for {most}"
        elif self._most_s is not None and seconds > self._most_s:
            why = f"the model knows times up to {self._most_s:g} s"
        if why is not None:
            message = f"the clip is too long for a choice over all of it: {why}"
            self._too_long = ClipTooLong(message, remedy=REMEDY)
            self.is_open = True  # what was chosen before is a part of the clip now
            raise self._too_long

    def add(self, stem: FrameStem) -> None:
        self._marker_tokens += self._markers(stem.pts_ns)
        self._frames.append(stem)
        self.is_open = True

    def _seconds(self, pts_ns: int) -> float:
        return (pts_ns - self._frames[0].pts_ns) * 1e-9 if self._frames else 0.0

    def _markers(self, pts_ns: int) -> int:
        """Tokens of a frame besides its cells."""
        return len(self._prompt.frame_ids(self._seconds(pts_ns), 0, first=not self._frames))

    def _num_kept(self, num_frames: int) -> int:
        settings = self._settings
        return num_kept(
            num_frames,
            self._vision.num_cells,
            settings.keep_ratio,
            settings.min_cells,
            variant=self._variant,
        )

    def encode_next(self) -> bool:
        """Chooses, and encodes one frame; whether it was the last. Raises ClipTooLong, and what the
        engines raise: the next call tries again."""
        if self._too_long is not None:
            raise self._too_long
        if self._chosen is None:
            self._choose()
        assert self._chosen is not None
        kept, context = self._chosen
        i = len(self._done)
        self._done.append(self._vision.finish(self._frames[i], kept[i], context[i]))
        return len(self._done) == len(kept)

    def _choose(self) -> None:
        settings, count = self._settings, len(self._frames)
        tokens, most = self._marker_tokens + self._num_kept(count), self._context.window_tokens
        if tokens > most:  # it was less before the settings changed
            raise ClipTooLong(
                f"{count} frames are {tokens} tokens now, and there is room for {most}",
                remedy=REMEDY,
            )
        scores = np.stack([frame.scores for frame in self._frames])
        kept = clip_budget(scores, settings.keep_ratio, settings.min_cells, variant=self._variant)
        self._chosen = kept, context_of(kept, variant=self._variant)
        self._done = []

    def take(self) -> list[FrameTokens]:
        """The frames that were encoded, all of them."""
        done, count = self._done, len(self._done)
        self._chosen, self._done = None, []
        self.is_open = len(self._frames) > count
        return done


NO_MOMENTS = "alerts look at every frame as it comes, policy 'clip' chooses when it is asked"


def require_same_kind(
    before: SessionSettings, after: SessionSettings, has_begun: bool, is_watching: bool
) -> None:
    """Raises ConfigError where a clip would have to become a stream, or the other way round."""
    if (after.policy == CLIP) == (before.policy == CLIP):
        return
    if has_begun:
        raise ConfigError(
            f"policy {before.policy!r} cannot become {after.policy!r} with frames in memory: one "
            "chooses as they come, the other over the finished clip",
            where="session settings",
            remedy="begin another session",
        )
    if after.policy == CLIP and is_watching:
        raise ConfigError(
            NO_MOMENTS,
            where="session settings",
            remedy="take policy stream, or delete the alerts",
        )


def require_moments(message: AlertMessage, settings: SessionSettings) -> None:
    """Raises AlertsUnsupported for a new alert on a clip."""
    if isinstance(message, AlertCreate) and settings.policy == CLIP:
        raise AlertsUnsupported(NO_MOMENTS, remedy="take policy stream")
