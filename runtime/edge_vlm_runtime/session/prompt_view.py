"""What a question is shown: the video in memory, the newest picture at full detail, or both.

The picture alone is what published checkpoints know: a prompt about one image. It is written into
an arena of its own, or into the session's where that is written anew for each question anyway.
Behind the video it is one more block of vision tokens, which the answer's end truncates away.
Either way the stream goes on as if nobody had asked.

No I/O, no threads; the clock is an argument.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from edge_vlm.errors import NoFrameYet, SnapshotsUnsupported, SnapshotTooLarge
from edge_vlm.pixels.frames import decode_picture
from edge_vlm.pixels.stills import ImageConfig, image_grid
from edge_vlm.text.masks import CAUSAL
from edge_vlm.text.prompt import image_length
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.settings import Attention, ModelLimits
from edge_vlm_runtime.session.context import Segment, ShownFrame, StreamContext

if TYPE_CHECKING:
    from edge_vlm_runtime.inference.bundle_model import LoadedBundle
    from edge_vlm_runtime.inference.image_encoder import ImageTokens, ImageVision
    from edge_vlm_runtime.inference.kv_arena import KVArena
    from edge_vlm_runtime.session.ingest import FrameIngest

Detail = Literal["video", "snapshot", "both"]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What lies in front of a question."""

    arena: KVArena
    mark: int
    """Length of the arena to go back to when the answer ends."""
    vision_tokens: int
    frames: list[ShownFrame]
    """Frames of the video, oldest first; empty for a snapshot alone."""
    snapshot: protocol.Snapshot | None
    has_own_arena: bool = False

    def forget(self) -> None:
        """The arena as it was before, or, where it is written anew for each question, empty."""
        if self.has_own_arena:
            self.arena.close()
        else:
            self.arena.truncate(self.mark)


class PromptView:
    """Of one session."""

    def __init__(
        self,
        *,
        engines: LoadedBundle,
        context: StreamContext,
        arena: KVArena,
        model: ModelLimits,
        intake: FrameIngest,
        clock_ns: Callable[[], int],
    ) -> None:
        self._engines = engines
        self._context = context
        self._arena = arena
        self._model = model
        self._intake = intake
        self._clock_ns = clock_ns

    def require(self, detail: Detail) -> None:
        """Raises SnapshotsUnsupported if the bundle cannot show this."""
        if detail != "video":
            self._image_vision()

    def show(self, detail: Detail, num_behind: int) -> Shown:
        """Writes what is to be seen into an arena with room for `num_behind` more tokens.

        Raises SnapshotTooLarge (not even one crop fits), FrameDecodeError, and what
        `LanguageModel.prefill` and the vision graphs raise; everything is then as before.
        """
        if detail == "video":
            self._context.show()
            mark = self._arena.mark()
            frames = self._context.shown()
            return Shown(
                arena=self._arena, mark=mark, vision_tokens=mark, frames=frames, snapshot=None
            )
        if detail == "both":
            return self._show_both(num_behind)
        return self._show_alone(num_behind)

    def _show_both(self, num_behind: int) -> Shown:
        arena, context = self._arena, self._context
        anew = context.attention is not Attention.FRAME
        # With the published mask frames and picture are one block, and a block is one run.
        run = self._model.max_prefill_tokens - (context.shown_tokens if anew else 0)
        used = context.shown_tokens if anew else arena.length
        position = context.shown_tokens if anew else arena.next_position
        tokens, snapshot = self._encode(
            min(
                run,
                arena.capacity - used - num_behind,
                self._model.max_positions - position - num_behind,
            ),
            "shorten the video with window_tokens, or ask about the snapshot alone",
        )
        mark = 0 if anew else arena.mark()
        context.show(self._segment(tokens))
        return Shown(
            arena=arena,
            mark=mark,
            vision_tokens=arena.length,
            frames=context.shown(),
            snapshot=snapshot,
        )

    def _show_alone(self, num_behind: int) -> Shown:
        model, language = self._model, self._engines.language
        begin = self._engines.prompt.bos_ids
        rest = num_behind + len(begin)
        tokens, snapshot = self._encode(
            min(
                model.max_prefill_tokens - len(begin),
                # An arena of its own is no larger than the session's, which has a bound in bytes.
                min(self._arena.capacity, model.max_positions) - rest,
            ),
            "export the bundle with more tokens per run, or ask about the video",
        )
        picture = self._segment(tokens)
        own = self._context.attention is Attention.FRAME
        arena = self._arena
        if own:
            arena = language.new_arena(len(picture.embeds) + rest)
        arena.clear()
        shown = Shown(
            arena=arena,
            mark=0,
            vision_tokens=len(begin) + len(picture.embeds),
            frames=[],
            snapshot=snapshot,
            has_own_arena=own,
        )
        try:
            language.prefill(
                arena,
                np.concatenate([language.embed(begin), picture.embeds]),
                np.concatenate(
                    [np.full(len(begin), CAUSAL), np.where(picture.is_vision, 0, CAUSAL)]
                ),
            )
        except BaseException:
            shown.forget()
            raise
        return shown

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

    def _encode(self, room: int, remedy: str) -> tuple[ImageTokens, protocol.Snapshot]:
        """The newest picture in as many crops as fit into `room` tokens."""
        vision, picture = self._image_vision(), self._intake.newest
        if picture is None:
            raise NoFrameYet("there is no picture to look at yet", remedy="send a frame first")
        begin_ns = self._clock_ns()
        rgb = decode_picture(picture.jpeg)
        height, width = rgb.shape[:2]
        cut = self._cut(vision.images, height, width, room, remedy)
        tokens = vision.encode(rgb, cut)
        return tokens, protocol.Snapshot(
            frame_sequence=picture.sequence,
            time_s=picture.time_s,
            width=width,
            height=height,
            crops=tokens.crops,
            tokens=image_length(tokens.grid, self._engines.prompt.style),
            encode_ms=(self._clock_ns() - begin_ns) * 1e-6,
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
