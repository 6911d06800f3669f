"""One sequence per clip: the pruned video once, then many questions, masked from each other.

A question is asked after some frame t: it sees the vision tokens up to that frame and nothing
later, and its positions go on where frame t ended. That is exactly a live session's view at that
moment, so one pass over a clip trains many moments.

Shape letters: B clips, L padded length, A answer tokens over the batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edge_vlm.model.vit import MASKED
from edge_vlm.prompt import PromptFormat


@dataclasses.dataclass(frozen=True)
class Branch:
    """A question after frame `frame`, with the turns of dialogue before it (not trained on)."""

    frame: int
    question: str
    answer: str
    history: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Packed:
    """A batch of packed sequences; see `pack`."""

    ids_BL: Tensor
    positions_BL: Tensor
    bias_BLL: Tensor
    answer_index_A: Tensor
    """Into the flattened [B * L]: the positions whose next token is trained on."""
    target_A: Tensor
    weight_A: Tensor
    question_A: Tensor
    """Number of the question, counted over the batch, to which the token belongs."""


class Packer:
    """Builds `Packed` batches; remembers the ids of texts it has met."""

    def __init__(self, prompt: PromptFormat) -> None:
        self.prompt = prompt
        self.question_ids = functools.lru_cache(100_000)(prompt.question_ids)
        self.answer_ids = functools.lru_cache(100_000)(prompt.answer_ids)
        self.turn_ids = functools.lru_cache(100_000)(prompt.turn_ids)
        self._stamp_ids = functools.lru_cache(10_000)(
            lambda pts_s, first: prompt.frame_ids(pts_s, 0, first)
        )

    def _frame(self, pts_s: float, kept: int, first: bool) -> npt.NDArray[np.int32]:
        ids = self._stamp_ids(pts_s, first)
        return np.insert(ids, len(ids) - 1, np.full(kept, self.prompt.patch_id, np.int32))

    def pack(
        self,
        counts_BT: npt.NDArray[np.int64],
        times_BT: npt.NDArray[np.float64],
        branches: Sequence[Sequence[Branch]],
        dtype: torch.dtype = torch.float32,
    ) -> Packed:
        """`counts` kept cells and `times` in seconds of every frame; `branches` of every clip."""
        rows = [
            self._row(counts, times, clip)
            for counts, times, clip in zip(counts_BT, times_BT, branches, strict=True)
        ]
        length = max(len(row["ids"]) for row in rows)

        def padded(name: str, fill: int) -> Tensor:
            out = np.full((len(rows), length), fill, np.int64)
            for line, row in zip(out, rows, strict=True):
                line[: len(row[name])] = row[name]
            return torch.from_numpy(out)

        index = torch.arange(length)
        limit, branch, frame = padded("limit", 0), padded("branch", -1), padded("frame", -1)
        allowed = index[None, None, :] < limit[:, :, None]
        allowed |= (
            (branch[:, :, None] == branch[:, None, :])
            & (branch[:, :, None] > 0)
            & (index[None, None, :] <= index[None, :, None])
        )
        allowed |= (frame[:, :, None] == frame[:, None, :]) & (frame[:, :, None] >= 0)
        bias = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, MASKED)

        def joined(name: str) -> npt.NDArray[np.float64]:
            return np.concatenate([row[name] for row in rows])

        starts = np.cumsum([0, *(len(clip) for clip in branches)])
        at = np.concatenate([row["answer_at"] + b * length for b, row in enumerate(rows)])
        question = np.concatenate(
            [row["question"] + start for row, start in zip(rows, starts, strict=False)]
        )
        return Packed(
            padded("ids", 0), padded("positions", 0), bias, torch.from_numpy(at),
            torch.from_numpy(joined("target").astype(np.int64)),
            torch.from_numpy(joined("weight").astype(np.float32)),
            torch.from_numpy(question),
        )

    def _row(
        self,
        counts: npt.NDArray[np.int64],
        times: npt.NDArray[np.float64],
        branches: Sequence[Branch],
    ) -> dict[str, npt.NDArray[np.generic]]:
        prompt = self.prompt
        frames = [
            self._frame(float(t), int(k), i == 0)
            for i, (t, k) in enumerate(zip(times, counts, strict=True))
        ]
        ends = len(prompt.bos_ids) + np.cumsum([len(f) for f in frames])
        prefix = np.concatenate([prompt.bos_ids, *frames])
        frame = np.full(len(prefix), -1)
        for i, (stop, ids) in enumerate(zip(ends, frames, strict=True)):
            frame[stop - len(ids) : stop][prompt.vision_mask(ids)] = i
        index = np.arange(len(prefix))
        parts = {
            "ids": [prefix], "positions": [index], "limit": [index + 1],
            "branch": [np.zeros_like(index)], "frame": [frame],
        }
        tails: dict[str, list[npt.NDArray[np.generic]]] = {
            "answer_at": [], "target": [], "weight": [], "question": []
        }
        offset = len(prefix)
        for number, item in enumerate(branches):
            turns = [self.turn_ids(q, a) for q, a in item.history]
            answer = self.answer_ids(item.answer)
            asked = np.concatenate([*turns, self.question_ids(item.question)])
            ids = np.concatenate([asked, answer[:-1]])
            own = np.arange(len(ids))
            parts["ids"].append(ids)
            parts["positions"].append(ends[item.frame] + own)
            parts["limit"].append(np.full(len(ids), ends[item.frame]))
            parts["branch"].append(np.full(len(ids), number + 1))
            parts["frame"].append(np.full(len(ids), -1))
            tails["answer_at"].append(offset + len(asked) - 1 + np.arange(len(answer)))
            tails["target"].append(answer)
            # Long answers (points) would drown the short ones at equal weight per token.
            tails["weight"].append(np.full(len(answer), len(answer) ** -0.5))
            tails["question"].append(np.full(len(answer), number))
            offset += len(ids)
        return {name: np.concatenate(lists) for name, lists in (parts | tails).items()}
