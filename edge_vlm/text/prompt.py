"""The Molmo2 prompt as token ids: first token, stamped frames or images, then the dialogue.

Vision comes before every question, so a question never changes what was cached for the frames.
Format: `<|im_end|>0.0 <im_start><im_patch>*K<im_end> 0.5 <im_start>...` and then turns of
`<|im_start|>user\\nQUESTION<|im_end|>\\n<|im_start|>assistant\\nANSWER<|im_end|>\\n` (the published
chat template; K is the number of kept cells here, 81 without pruning). An image is written as
`<low_res_im_start>` patches `<im_end><im_start>` rows of patches, each with `<im_col>`, `<im_end>`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_vlm.config import VisionConfig, require_numbers
from edge_vlm.pixels.stills import ImageConfig, ImageGrid, all_tilings, grid_of
from edge_vlm.text.tokenizer import Tokenizer

Ids = npt.NDArray[np.int32]

IM_END = "<|im_end|>"
"""Ends a turn. The Molmo2 of Qwen also begin the sequence and end an answer with it."""
IM_START = "<|im_start|>"
FRAME_START = "<im_start>"
FRAME_END = "<im_end>"
PATCH = "<im_patch>"
PAD = "<|endoftext|>"
LOW_RES_START = "<low_res_im_start>"
COLUMN = "<im_col>"
"""Ends a row of an image's patches."""
OWN_FRAME_START = "<frame_start>"
OWN_FRAME_END = "<frame_end>"
IMAGE_TOKENS = (PATCH, FRAME_START, FRAME_END, LOW_RES_START, COLUMN)
STAMP_TOKENS = 8
"""Most tokens of a frame's time stamp, up to " 9999.9 "."""
MARKER_TOKENS = 2
KEPT_SUBTITLES = 4
UNUSED_PATCH = "<im_low>"
"""In the vocabulary and among the published vision tokens, but in no prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptStyle:
    """In what checkpoints differ; the defaults are those of models trained here.

    `edge_vlm.model.published.processor.read_processors` reads it from a published folder.
    """

    own_frame_markers: bool = False
    """Frames stand between `<frame_start>` and `<frame_end>` instead of the image markers
    (`use_frame_special_tokens`: off in the released Molmo2, on in the published STTS training)."""
    low_res_columns: bool = False
    """Rows of the low-resolution view end with `<im_col>` too (`use_single_crop_col_tokens`)."""
    low_res_start: bool = True
    """The low-resolution view begins with `<low_res_im_start>` (`use_single_crop_start_token`), or
    like the tiled one with `<im_start>` (MolmoWeb)."""
    space_before_answers: bool = False
    """In a finished turn a space stands before the assistant's part, as the published chat template
    has it there and nowhere else."""
    begin: str = IM_END
    """The first token of every prompt (O-7B: `<|endoftext|>`)."""
    ends: tuple[str, ...] = (IM_END,)
    """An answer ends at any of these; those trained here end with the first."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", tuple(self.ends))
        require_numbers(self)
        if not self.ends or not all(isinstance(token, str) for token in (self.begin, *self.ends)):
            raise ValueError(f"begin = {self.begin!r}, ends = {self.ends!r}: must be tokens")


PLAIN = PromptStyle()
RELEASED = PromptStyle(space_before_answers=True)
"""As the released Molmo2 checkpoints have it."""


def has_image_tokens(tokenizer: Tokenizer) -> bool:
    """Whether a still picture can be written with this vocabulary."""
    with contextlib.suppress(KeyError):
        for token in IMAGE_TOKENS:
            tokenizer.id_of(token)
        return True
    return False


def longest_frame(num_cells: int) -> int:
    """Most tokens of a frame that keeps so many cells."""
    return num_cells + MARKER_TOKENS + STAMP_TOKENS


def longest_image(images: ImageConfig, vision: VisionConfig, style: PromptStyle) -> int:
    """Most tokens of one image alone in a prompt."""
    grids = [grid_of(tiling, vision, images) for tiling in all_tilings(images.max_crops)]
    return max(image_length(grid, style) for grid in grids)


def image_length(grid: ImageGrid, style: PromptStyle) -> int:
    """Tokens of one image alone in a prompt, markers included."""
    columns = grid.rows + grid.low_rows * style.low_res_columns
    return grid.num_tokens + columns + 4


class PromptFormat:
    """Builds the pieces of a prompt."""

    def __init__(self, tokenizer: Tokenizer, style: PromptStyle = PLAIN) -> None:
        """Raises KeyError if the vocabulary lacks a token that every prompt needs."""
        self.tokenizer = tokenizer
        self.style = style
        self.bos_id = tokenizer.id_of(style.begin)
        self.eos_ids = tuple(tokenizer.id_of(token) for token in style.ends)
        """An answer ends at any of these."""
        self.patch_id = tokenizer.id_of(PATCH)
        self._subtitles: dict[str, Ids] = {}
        own = style.own_frame_markers
        self._start_id = tokenizer.id_of(OWN_FRAME_START if own else FRAME_START)
        self._end_id = tokenizer.id_of(OWN_FRAME_END if own else FRAME_END)
        self._vision_ids = [self.patch_id, self._start_id, self._end_id]
        for token in (
            *(FRAME_START, FRAME_END, LOW_RES_START, COLUMN),
            *(OWN_FRAME_START, OWN_FRAME_END, UNUSED_PATCH),
        ):
            with contextlib.suppress(KeyError):  # a vocabulary of video only has fewer of them
                self._vision_ids.append(tokenizer.id_of(token))

    @property
    def eos_id(self) -> int:
        """Ends an answer that is written rather than read."""
        return self.eos_ids[0]

    @property
    def bos_ids(self) -> Ids:
        return np.array([self.bos_id], np.int32)

    def frame_ids(self, pts_s: float, num_cells: int, first: bool) -> Ids:
        """Stamp in seconds with one decimal, start marker, `num_cells` patch tokens, end marker."""
        stamp = self.tokenizer.encode(f"{'' if first else ' '}{pts_s:.1f} ")
        patches = [self.patch_id] * num_cells
        return np.array([*stamp, self._start_id, *patches, self._end_id], np.int32)

    def image_ids(self, grids: Sequence[ImageGrid]) -> Ids:
        """The images of a prompt: one alone, or several, each after its number.

        Raises KeyError if the vocabulary has no image tokens.
        """
        start, end = self.tokenizer.id_of(FRAME_START), self.tokenizer.id_of(FRAME_END)
        low = LOW_RES_START if self.style.low_res_start else FRAME_START
        low_start, column = self.tokenizer.id_of(low), self.tokenizer.id_of(COLUMN)
        ids: list[int] = []
        for number, grid in enumerate(grids, 1):
            if len(grids) > 1:
                ids += self.tokenizer.encode(f"Image {number}")
            low_row = [self.patch_id] * grid.low_columns + [column] * self.style.low_res_columns
            ids += [low_start, *low_row * grid.low_rows, end]
            ids += [start, *([self.patch_id] * grid.columns + [column]) * grid.rows, end]
        return np.array(ids, np.int32)

    def vision_mask(self, ids: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """True at patch tokens and at the markers around them: those see each other both ways."""
        return np.isin(ids, self._vision_ids)

    def subtitle_ids(self, text: str) -> Ids:
        """What stands between the video and the first turn (`edge_vlm.text.subtitles`); not to be
        written to. The last few texts are remembered: a film's take long, and may be read on
        another thread before they are needed."""
        found = self._subtitles.get(text)
        if found is None:
            found = np.array(self.tokenizer.encode(self.tokenizer.plain(text)), np.int32)
            found.flags.writeable = False
            if len(self._subtitles) >= KEPT_SUBTITLES:
                self._subtitles.clear()
            self._subtitles[text] = found
        return found

    def question_ids(self, text: str) -> Ids:
        """A user's turn and the opening of the assistant's; special tokens in `text` are broken."""
        turn = f"{IM_START}user\n{self.tokenizer.plain(text)}{IM_END}\n{IM_START}assistant\n"
        return np.array(self.tokenizer.encode(turn), np.int32)

    def answer_ids(self, text: str) -> Ids:
        """An answer with its end token."""
        return np.array([*self.tokenizer.encode(text), self.eos_id], np.int32)

    def turn_ids(self, question: str, answer: str) -> Ids:
        """A finished turn of the dialogue, as it stands before the next question."""
        gap = " " if self.style.space_before_answers else ""
        question, answer = map(self.tokenizer.plain, (question, answer))
        asked = f"{IM_START}user\n{question}{IM_END}\n"
        turn = f"{asked}{gap}{IM_START}assistant\n{answer}{IM_END}\n"
        return np.array(self.tokenizer.encode(turn), np.int32)
