"""The pruned video once, then many questions about it, each asked at its own moment.

A question is asked after some frame t: it sees the tokens up to that frame and nothing later, and
its positions go on where frame t ended. That is exactly a live session's view at that moment, so
one pass over a clip trains many moments. The video is a prefix whose keys and values all of its
questions read as their past; questions of like length run side by side. What each token sees is
what it sees in a packed row (`masks`).

Shape letters: B clips, P prefix tokens (padded), F frames of all clips, N questions of a bucket, L
their tokens (padded), A answer tokens of a bucket.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edge_vlm.config import VisionAttention
from edge_vlm.model.layers import MASKED
from edge_vlm.text.prompt import PromptFormat
from edge_vlm_training.data.packing.batch import Batch
from edge_vlm_training.data.packing.trees import BranchTokens, TokenWeights, Tree

BUCKETS = (0.5, 0.8, 0.9, 0.96, 1.0)
"""Where the questions, sorted by length, are cut: few are long (dialogue before them, points), and
with equal parts more than half of all tokens were padding."""


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
    branch_A: Tensor
    """Number of the branch, counted over the batch, to which the token belongs."""


@dataclasses.dataclass(frozen=True)
class PrefixTokens:
    """A batch of clips with their questions, the kept cells' tokens only."""

    ids_BP: Tensor
    bias_BPP: Tensor
    end_F: Tensor
    """Where in the flattened [B * P] each frame's end marker stands."""
    buckets: tuple[Bucket, ...]
    lengths_B: Tensor
    """int64: tokens of each clip with all of its questions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixBatch(Batch):
    """Pictures and message trees; the tokens are laid out when it is known what is kept."""

    trees: tuple[Tree, ...]
    prompt: PromptFormat
    weights: TokenWeights

    @property
    def weight(self) -> float:
        return math.fsum(
            len(branch.answer) * self.weights.of(tree, branch)
            for tree in self.trees
            for branch in tree.branches
        )

    def kept(self, kept_FC: Tensor, attention: VisionAttention, dtype: torch.dtype) -> PrefixTokens:
        """The tokens if these cells (bool) are kept, on their device; biases are of `dtype`.

        With `ALL` attention a vision token sees those of later frames too, so that every question
        must be asked after the clip's last frame.
        """
        counts = kept_FC.sum(1).cpu().split(list(self.frames_per_clip))
        every = attention is VisionAttention.ALL
        ids, blocks, ends = zip(
            *(
                _prefix(tree, self.prompt, kept.tolist(), every)
                for tree, kept in zip(self.trees, counts, strict=True)
            ),
            strict=True,
        )
        ids_BP, block_BP = _padded(ids, 0), _padded(blocks, -1)
        size = ids_BP.shape[1]
        index = torch.arange(size)
        allowed = (index[None, :] <= index[:, None])[None] | (
            (block_BP[:, :, None] == block_BP[:, None, :]) & (block_BP[:, :, None] >= 0)
        )
        lines = [
            _Line(clip, ends[clip][branch.frame], branch, self.weights.of(tree, branch))
            for clip, tree in enumerate(self.trees)
            for branch in tree.branches
        ]
        order = sorted(range(len(lines)), key=lambda number: len(lines[number].branch))
        cuts = sorted({0, *(round(share * len(lines)) for share in BUCKETS)})
        buckets = tuple(
            _bucket([(n, lines[n]) for n in order[start:end]], size, dtype, kept_FC.device)
            for start, end in itertools.pairwise(cuts)
        )
        end_F = np.concatenate([clip * size + np.array(e) - 1 for clip, e in enumerate(ends)])
        lengths = [tree.length(int(k.sum())) for tree, k in zip(self.trees, counts, strict=True)]
        tensors = ids_BP, _additive(allowed, dtype), torch.from_numpy(end_F)
        return PrefixTokens(
            *(tensor.to(kept_FC.device) for tensor in tensors), buckets, torch.tensor(lengths)
        )


@dataclasses.dataclass(frozen=True)
class _Line:
    clip: int
    start: int
    """Prefix tokens that it sees."""
    branch: BranchTokens
    weight: float


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, MASKED)


def _padded(rows: Sequence[npt.NDArray[np.integer]], fill: int) -> Tensor:
    out = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for line, row in zip(out, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(out)


def _prefix(
    tree: Tree, prompt: PromptFormat, counts: Sequence[int], every: bool
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], list[int]]:
    """Token ids, the block of vision tokens that each belongs to (-1: text), frame ends."""
    ids, blocks, ends = [prompt.bos_ids], [np.full(len(prompt.bos_ids), -1)], []
    length = len(prompt.bos_ids)
    for i, (stamp, kept) in enumerate(zip(tree.stamps, counts, strict=True)):
        patches = np.full(kept, prompt.patch_id, np.int32)
        ids.append(np.insert(stamp, len(stamp) - 1, patches))
        blocks.append(np.where(prompt.vision_mask(ids[-1]), 0 if every else i, -1))
        length += len(ids[-1])
        ends.append(length)
    return np.concatenate(ids), np.concatenate(blocks), ends


def _bucket(
    numbered: Sequence[tuple[int, _Line]],
    num_prefix: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Bucket:
    lines = [line for _, line in numbered]
    texts = [line.branch.text for line in lines]
    answers = [line.branch.answer for line in lines]
    ids_NL = _padded([np.append(t, a[:-1]) for t, a in zip(texts, answers, strict=True)], 0)
    length = ids_NL.shape[1]
    start_N = torch.tensor([line.start for line in lines])
    own = torch.arange(length)
    prefix = (torch.arange(num_prefix)[None] < start_N[:, None])[:, None].expand(-1, length, -1)
    causal = (own[None] <= own[:, None])[None].expand(len(lines), -1, -1)
    at = [
        n * length + len(text) - 1 + np.arange(len(answer))
        for n, (text, answer) in enumerate(zip(texts, answers, strict=True))
    ]
    sizes = [len(answer) for answer in answers]
    weights = np.array([line.weight for line in lines], np.float32)
    columns = (
        torch.tensor([line.clip for line in lines]),
        ids_NL,
        start_N[:, None] + own,
        _additive(torch.cat([prefix, causal], -1), dtype),
        torch.from_numpy(np.concatenate(at)),
        torch.from_numpy(np.concatenate(answers).astype(np.int64)),
        torch.from_numpy(np.repeat(weights, sizes)),
        torch.from_numpy(np.repeat([number for number, _ in numbered], sizes)),
    )
    return Bucket(*(column.to(device) for column in columns))
