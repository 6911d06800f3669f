"""Packed batches made by hand, and a stream of them: clips of unequal length, short branches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from edge_vlm.config import ModelConfig, VisionConfig
from edge_vlm_training.data.packing.batch import (
    IGNORED,
    NOWHERE,
    PADDING,
    PackedBatch,
    PackedTokens,
    positions_of,
)

STAMP, START, END, PATCH = 5, 6, 7, 8
"""Token ids of a frame, below the base vocabulary of the tiny model."""
FIELDS = [field.name for field in dataclasses.fields(PackedTokens)]


def make_batch(
    vision: VisionConfig,
    rows: tuple[tuple[int, ...], ...],
    seed: int,
    *,
    keep_ratio: float = 0.5,
    branches: int = 2,
) -> PackedBatch:
    """Rows of clips of so many frames each, every one with `branches` of random words."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(10, 60, (count,), generator=generator).tolist()

    lines: list[list[dict[str, float]]] = []
    frame, clip, branch = 0, 0, 0
    for row in rows:
        line: list[dict[str, float]] = []
        for frames in row:
            line.append(_token(3, clip, frame=frame))
            for f in range(frame, frame + frames):
                line.append(_token(STAMP, clip, frame=f))
                line.append(_token(START, clip, frame=f, vision=1))
                for cell in range(vision.num_cells):
                    number = f * vision.num_cells + cell
                    line.append(_token(PATCH, clip, frame=f, vision=1, cell=number))
                line.append(_token(END, clip, frame=f, vision=1))
            for number in range(branches):
                # The first sees the whole clip, the others a part of it.
                drawn = int(torch.randint(frames, (), generator=generator))
                seen = frame + (drawn if number else frames - 1)
                question, answer = words(4), words(3)
                ids = [*question, *answer]
                for offset, token in enumerate(ids[:-1]):
                    item = _token(token, clip, frame=seen, branch=branch, offset=offset)
                    if offset >= len(question) - 1:
                        item |= {"target": ids[offset + 1], "weight": 0.3 + 0.2 * offset}
                    line.append(item)
                branch += 1
            frame, clip = frame + frames, clip + 1
        lines.append(line)
    longest = max(map(len, lines))
    columns = {}
    for name in FIELDS:
        key, fill = name.removesuffix("_RS"), PADDING.get(name, 0)
        values = [[t[key] for t in line] + [fill] * (longest - len(line)) for line in lines]
        dtype = {"weight_RS": torch.float32, "vision_RS": torch.bool}.get(name, torch.int64)
        columns[name] = torch.tensor(values, dtype=dtype)
    counts = tuple(n for row in rows for n in row)
    tokens = PackedTokens(**columns)
    tokens = dataclasses.replace(tokens, positions_RS=positions_of(tokens, counts))
    side = vision.image_size
    pictures = torch.randint(256, (frame, side, side, 3), generator=generator, dtype=torch.uint8)
    return PackedBatch(
        frames_FSS3=pictures,
        times_s_F=torch.cat([torch.arange(n) / 2 for n in counts]),
        frames_per_clip=counts,
        tokens=tokens,
        keep_ratio=keep_ratio,
        min_cells=1,
        clip_names=tuple(f"clip {seed}.{i}" for i in range(len(counts))),
        branch_kinds=("word",) * branch,
    )


def _token(token_id: int, clip: int, **other: float) -> dict[str, float]:
    plain = {"positions": 0, "target": IGNORED, "weight": 0.0, "branch": NOWHERE, "vision": 0}
    return {"ids": token_id, "clip": clip, "cell": NOWHERE, "offset": 0} | plain | other


SHAPES = (((3, 2),), ((4,),), ((2, 1),), ((1, 3),))


class HandStream:
    """Batches by number; process `rank` of `size` takes every size-th one."""

    def __init__(self, cfg: ModelConfig, rank: int = 0, size: int = 1) -> None:
        self._cfg, self._rank, self._size, self._batches = cfg, rank, size, 0

    def __iter__(self) -> Iterator[PackedBatch]:
        while True:
            number = self._batches * self._size + self._rank
            self._batches += 1
            yield make_batch(self._cfg.vision, SHAPES[number % len(SHAPES)], number)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._batches, "lanes": {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batches = state["batches"]
