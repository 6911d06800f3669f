"""The Molmo2 prompt as token ids: begin token, stamped frames, then the dialogue.

Vision comes before every question, so a question never changes what was cached for the frames.
Format: `<|im_end|>0.0 <im_start><im_patch>*K<im_end> 0.5 <im_start>...` and then turns of
`<|im_start|>user\\nQUESTION<|im_end|>\\n<|im_start|>assistant\\nANSWER<|im_end|>\\n` (the published
chat template; K is the number of kept cells here, 81 without pruning).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_vlm.tokenizer import Tokenizer

Ids = npt.NDArray[np.int32]

IM_END = "<|im_end|>"
"""Ends a turn and, as in Molmo2, also begins the sequence."""
IM_START = "<|im_start|>"
FRAME_START = "<im_start>"
FRAME_END = "<im_end>"
PATCH = "<im_patch>"
PAD = "<|endoftext|>"


class PromptFormat:
    """Builds the pieces of a prompt; stateless."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.eos_id = tokenizer.id_of(IM_END)
        self.patch_id = tokenizer.id_of(PATCH)
        self._start_id = tokenizer.id_of(FRAME_START)
        self._end_id = tokenizer.id_of(FRAME_END)

    @property
    def bos_ids(self) -> Ids:
        return np.array([self.eos_id], np.int32)

    def frame_ids(self, pts_s: float, num_cells: int, first: bool) -> Ids:
        """Stamp in seconds with one decimal, start marker, `num_cells` patch tokens, end marker."""
        stamp = self.tokenizer.encode(f"{'' if first else ' '}{pts_s:.1f} ")
        patches = [self.patch_id] * num_cells
        return np.array([*stamp, self._start_id, *patches, self._end_id], np.int32)

    def vision_mask(self, ids: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """True at patch tokens and at the markers around them: those see each other both ways."""
        return np.isin(ids, (self.patch_id, self._start_id, self._end_id))

    def question_ids(self, text: str) -> Ids:
        """A user's turn and the opening of the assistant's."""
        turn = f"{IM_START}user\n{text}{IM_END}\n{IM_START}assistant\n"
        return np.array(self.tokenizer.encode(turn), np.int32)

    def answer_ids(self, text: str) -> Ids:
        """An answer with its end token."""
        return np.array([*self.tokenizer.encode(text), self.eos_id], np.int32)

    def turn_ids(self, question: str, answer: str) -> Ids:
        """A finished turn of the dialogue, as it stands before the next question."""
        turn = f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n{answer}{IM_END}\n"
        return np.array(self.tokenizer.encode(turn), np.int32)
