"""The pruned video once, then many questions about it, each asked at its own moment.

A question is asked after some frame t: it sees the tokens up to that frame and nothing later, and
its positions go on where frame t ended. That is exactly a live session's view at that moment, so
one pass over a clip trains many moments. The video is a prefix whose keys and values all of its
questions read as their past; questions of like length run side by side.

Shape letters: B clips, P prefix tokens (padded), N questions of a bucket, L their tokens (padded),
A answer tokens of a bucket.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edge_vlm.config import VisionAttention
from edge_vlm.model.layers import additive_bias
from edge_vlm.text.masks import CAUSAL, block_bias
from edge_vlm.text.prompt import PromptFormat

BUCKETS = (0.5, 0.8, 0.9, 0.96, 1.0)
"""Where the questions, sorted by length, are cut: few are long (dialogue before them, points), and
with equal parts more than half of all tokens were padding."""


@dataclasses.dataclass(frozen=True)
class Branch:
    """A question after frame `frame`, with the turns of dialogue before it (not trained on)."""

    frame: int
    question: str
    answer: str
    history: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Questions of like length; additive bias over prefix and own tokens."""

    clip_N: Tensor
    ids_NL: Tensor
    positions_NL: Tensor
    bias_NLK: Tensor
    """K = P + L: the prefix comes first."""
    answer_index_A: Tensor
    """Into the flattened [N * L]: the positions whose next token is trained on."""
    target_A: Tensor
    weight_A: Tensor
    question_A: Tensor
    """Number of the question, counted over the batch, to which the token belongs."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """A batch of clips with their questions; see `Packer.pack`."""

    ids_BP: Tensor
    bias_BPP: Tensor
    end_BT: Tensor
    """Where in the prefix each frame's end marker stands."""
    buckets: tuple[Bucket, ...]
    num_questions: int


def _padded(rows: Sequence[npt.NDArray[np.integer]], fill: int) -> Tensor:
    out = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(out)


class Packer:
    """Builds `Packed` batches; remembers the ids of texts it has met.

    With `ALL` attention a vision token sees those of later frames too, so that every question must
    be asked after the clip's last frame.
    """

    def __init__(
        self, prompt: PromptFormat, attention: VisionAttention = VisionAttention.FRAME
    ) -> None:
        self.prompt, self.attention = prompt, attention
        self.question_ids = functools.lru_cache(100_000)(prompt.question_ids)
        self.answer_ids = functools.lru_cache(100_000)(prompt.answer_ids)
        self.turn_ids = functools.lru_cache(100_000)(prompt.turn_ids)
        self._stamp_ids = functools.lru_cache(10_000)(
            lambda pts_s, first: prompt.frame_ids(pts_s, 0, first)
        )

    def pack(
        self,
        counts_BT: npt.NDArray[np.int64],
        times_BT: npt.NDArray[np.floating],
        branches: Sequence[Sequence[Branch]],
        dtype: torch.dtype = torch.float32,
    ) -> Packed:
        """`counts` kept cells and `times` in seconds of every frame; `branches` of every clip."""
        prefixes, blocks, ends = zip(
            *(self._prefix(c, t) for c, t in zip(counts_BT, times_BT, strict=True)), strict=True
        )
        ids_BP, block_BP = _padded(prefixes, 0), _padded(blocks, CAUSAL)
        bias_BPP = torch.from_numpy(block_bias(block_BP.numpy())).to(dtype)
        asked = [(clip, item) for clip, items in enumerate(branches) for item in items]
        lines = []
        for number, (clip, item) in enumerate(asked):
            turns = [self.turn_ids(q, a) for q, a in item.history]
            text = np.concatenate([*turns, self.question_ids(item.question)])
            lines.append((number, clip, int(ends[clip][item.frame]), text, item.answer))
        lines.sort(key=lambda line: len(line[3]) + len(self.answer_ids(line[4])))
        cuts = sorted({0, *(round(share * len(lines)) for share in BUCKETS)})
        buckets = tuple(
            self._bucket(lines[start:end], ids_BP.shape[1], dtype)
            for start, end in itertools.pairwise(cuts)
        )
        end_BT = torch.from_numpy(np.stack(ends)) - 1
        return Packed(ids_BP, bias_BPP, end_BT, buckets, len(asked))

    def _prefix(
        self, counts: npt.NDArray[np.int64], times: npt.NDArray[np.floating]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Token ids, the block of vision tokens that each belongs to (CAUSAL: text), frame ends."""
        prompt = self.prompt
        ids, blocks, ends = [prompt.bos_ids], [np.array([CAUSAL])], []
        length = 1
        for i, (pts_s, kept) in enumerate(zip(times, counts, strict=True)):
            empty = self._stamp_ids(float(pts_s), i == 0)
            patches = np.full(int(kept), prompt.patch_id, np.int32)
            ids.append(np.insert(empty, len(empty) - 1, patches))
            block = 0 if self.attention is VisionAttention.ALL else i
            blocks.append(np.where(prompt.vision_mask(ids[-1]), block, CAUSAL))
            length += len(ids[-1])
            ends.append(length)
        return np.concatenate(ids), np.concatenate(blocks), np.array(ends)

    def _bucket(
        self,
        lines: Sequence[tuple[int, int, int, npt.NDArray[np.int32], str]],
        num_prefix: int,
        dtype: torch.dtype,
    ) -> Bucket:
        answers = [self.answer_ids(answer) for *_, answer in lines]
        rows = [
            np.concatenate([text, answer[:-1]])
            for (*_, text, _), answer in zip(lines, answers, strict=True)
        ]
        ids_NL = _padded(rows, 0)
        length = ids_NL.shape[1]
        start_N = torch.tensor([start for _, _, start, _, _ in lines])
        own = torch.arange(length)
        prefix = (torch.arange(num_prefix)[None] < start_N[:, None])[:, None].expand(-1, length, -1)
        causal = (own[None] <= own[:, None])[None].expand(len(lines), -1, -1)
        at = [
            n * length + len(text) - 1 + np.arange(len(answer))
            for n, ((*_, text, _), answer) in enumerate(zip(lines, answers, strict=True))
        ]
        sizes = np.array([len(answer) for answer in answers])
        numbers = np.array([number for number, *_ in lines])
        return Bucket(
            clip_N=torch.tensor([clip for _, clip, *_ in lines]),
            ids_NL=ids_NL,
            positions_NL=start_N[:, None] + own,
            bias_NLK=additive_bias(torch.cat([prefix, causal], -1), dtype),
            answer_index_A=torch.from_numpy(np.concatenate(at)),
            target_A=torch.from_numpy(np.concatenate(answers).astype(np.int64)),
            # Long answers (points) would drown the short ones at equal weight per token.
            weight_A=torch.from_numpy(np.repeat(sizes**-0.5, sizes).astype(np.float32)),
            question_A=torch.from_numpy(np.repeat(numbers, sizes)),
        )
