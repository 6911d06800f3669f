"""What a question is shown: the video in memory, the newest picture at full detail, both, or none.

The picture alone is what published checkpoints know: a prompt about one image. It is written into
an arena aside of the stream's. After the video it is one more block of vision tokens, which is cut
off when the answer ends. Either way the stream goes on as if nobody had asked.

No I/O, no threads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from edge_vlm.errors import NoFrameYet, SnapshotsUnsupported, SnapshotTooLarge
from edge_vlm.pixels.stills import ImageConfig, image_grid
from edge_vlm.text.masks import CAUSAL
from edge_vlm.text.prompt import image_length
from edge_vlm_runtime import protocol
from edge_vlm_runtime.session.context import Segment, ShownFrame, StreamContext

if TYPE_CHECKING:
    from edge_vlm_runtime.inference.bundle_model import LoadedBundle
    from edge_vlm_runtime.inference.image_encoder import ImageTokens, ImageVision
    from edge_vlm_runtime.inference.kv_arena import KVArena
    from edge_vlm_runtime.session.frames import EncodedFrame
    from edge_vlm_runtime.session.stream_clock import StreamClock

Detail = Literal["video", "snapshot", "both", "text"]


@dataclass(frozen=True, kw_only=True)
class PromptView:
    """What comes before a question."""

    arena: KVArena
    """Ends with what is shown; the question and its answer are written after that."""
    vision_tokens: int
    frames: list[ShownFrame]
    """Frames of the video, oldest first; empty for a snapshot alone."""
    snapshot: protocol.Snapshot | None
    lent: ExitStack

    def release(self) -> None:
        """Gives the arena back."""
        self.lent.close()


class PromptBuilder:
    """Makes the views of one session."""

    def __init__(
        self,
        *,
        engines: LoadedBundle,
        context: StreamContext,
        clock: StreamClock,
        stopwatch_ns: Callable[[], int],
    ) -> None:
        self._engines = engines
        self._context = context
        self._clock = clock
        self._stopwatch_ns = stopwatch_ns

    def require(self, detail: Detail) -> None:
        """Raises SnapshotsUnsupported if the bundle cannot show this."""
        if detail in ("snapshot", "both"):
            self._image_vision()

    def build(self, detail: Detail, picture: EncodedFrame | None, num_after: int) -> PromptView:
        """Writes what is to be seen into an arena with room for `num_after` more tokens.

        `picture` is the newest one of the stream. Raises SnapshotTooLarge (not even one crop fits),
        NoFrameYet, FrameDecodeError, and what `LanguageModel.prefill` and the vision graphs raise;
        everything is then as before.
        """
        context = self._context
        with ExitStack() as lent:
            snapshot, frames = None, context.shown()
            if detail == "video":
                arena = lent.enter_context(context.branch())
            elif detail == "text":
                frames, begin = [], self._engines.prompt.bos_ids
                arena = lent.enter_context(context.aside(len(begin) + num_after))
                self._engines.language.prefill(arena, self._engines.language.embed(begin))
            elif detail == "both":
                tokens, snapshot = self._encode(
                    picture,
                    context.picture_room(num_after),
                    "shorten the video with window_tokens, or ask about the snapshot alone",
                )
                arena = lent.enter_context(context.branch(self._segment(tokens)))
            else:
                begin = self._engines.prompt.bos_ids
                tokens, snapshot = self._encode(
                    picture,
                    context.picture_room_aside(len(begin), num_after),
                    "export the bundle with more tokens per run, or ask about the video",
                )
                segment, frames = self._segment(tokens), []
                num_tokens = len(begin) + len(segment.embeds)
                arena = lent.enter_context(context.aside(num_tokens + num_after))
                self._prefill_alone(arena, begin, segment)
            return PromptView(
                arena=arena,
                vision_tokens=0 if detail == "text" else arena.length,
                frames=frames,
                snapshot=snapshot,
                lent=lent.pop_all(),
            )

    def _prefill_alone(self, arena: KVArena, begin: np.ndarray, picture: Segment) -> None:
        language = self._engines.language
        blocks = [np.full(len(begin), CAUSAL), np.where(picture.is_vision, 0, CAUSAL)]
        embeds = np.concatenate([language.embed(begin), picture.embeds])
        language.prefill(arena, embeds, np.concatenate(blocks))

    # ---- the picture -------------------------------------------------------------------------

    def _image_vision(self) -> ImageVision:
        vision = self._engines.images
        if vision is None:
            raise SnapshotsUnsupported(
                f"the model {self._engines.bundle.name} reads video only, it has no graph for "
                "pictures at full detail",
                remedy="ask about the video, or serve a bundle exported from a Molmo2 checkpoint",
            )
        return vision

    def _encode(
        self, picture: EncodedFrame | None, room: int, remedy: str
    ) -> tuple[ImageTokens, protocol.Snapshot]:
        """The picture in as many crops as fit into `room` tokens."""
        vision = self._image_vision()
        if picture is None:
            raise NoFrameYet("there is no picture to look at yet", remedy="send a frame first")
        begin_ns = self._stopwatch_ns()
        rgb = picture.decode()
        height, width = rgb.shape[:2]
        cut = self._cut(vision.images, height, width, room, remedy)
        tokens = vision.encode(rgb, cut)
        return tokens, protocol.Snapshot(
            frame_sequence=picture.seq,
            time_s=self._clock.pts_ns(picture.capture_us) * 1e-9,
            width=width,
            height=height,
            crops=tokens.crops,
            tokens=image_length(tokens.grid, self._engines.prompt.style),
            encode_ms=(self._stopwatch_ns() - begin_ns) * 1e-6,
        )

    def _cut(
        self, most: ImageConfig, height: int, width: int, room: int, remedy: str
    ) -> ImageConfig:
        needed = 0
        for max_crops in range(most.max_crops, 0, -1):
            cut = dataclasses.replace(most, max_crops=max_crops)
            grid = image_grid(height, width, self._engines.bundle.config.vision, cut)
            needed = image_length(grid, self._engines.prompt.style)
            if needed <= room:
                return cut
        raise SnapshotTooLarge(
            f"the picture needs {needed} tokens at least, and there is room for {max(room, 0)}",
            remedy=remedy,
        )

    def _segment(self, tokens: ImageTokens) -> Segment:
        prompt = self._engines.prompt
        ids = prompt.image_ids([tokens.grid])
        embeds = self._engines.language.embed(ids, tokens.embeds)
        return Segment(embeds, prompt.vision_mask(ids))
