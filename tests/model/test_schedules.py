"""Whatever order frames, questions, cancels and evictions come in: what the cache says is what one
forward pass over everything says."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edge_vlm.model.llm import KeyValue, rope_tables
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import tiny
from edge_vlm.text.masks import MASKED
from tests.model.prompts import attention_bias

CFG = tiny()
CELLS = CFG.vision.num_cells


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    with torch.no_grad():
        yield


@lru_cache(maxsize=1)
def model() -> VideoLM:
    return VideoLM(CFG).init_weights(torch.Generator().manual_seed(1)).eval()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# ---- the vision side -------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    starts=st.lists(st.booleans(), min_size=1, max_size=8),
    cuts=st.lists(st.booleans(), min_size=7, max_size=7),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 999),
)
def test_frames_in_any_portions_are_the_whole_video(
    starts: list[bool], cuts: list[bool], share: float, seed: int
) -> None:
    """`starts`: a clip begins; `cuts`: a call ends behind that frame; any cells may be kept."""
    frames, generator = len(starts), torch.Generator().manual_seed(seed)
    shape = (frames, CFG.vision.num_patches, CFG.vision.patch_dim)
    pixels, is_first = torch.randn(shape, generator=generator), torch.tensor([True, *starts[1:]])
    keep = torch.rand(frames, CELLS, generator=generator) < share
    nobody = torch.zeros(1, CELLS, CFG.vision.width)
    hidden, cells, scores = model().vit_stem(pixels, nobody, is_first)
    chosen = keep.flatten().nonzero().squeeze(1)
    features = model().vit_trunk(hidden, chosen, chosen // CELLS)

    previous, portions, at = nobody, [], 0
    for stop in range(1, frames + 1):
        if stop < frames and not cuts[stop - 1]:
            continue
        part = model().vit_stem(pixels[at:stop], previous, is_first[at:stop])
        chosen = keep[at:stop].flatten().nonzero().squeeze(1)
        portions.append((*part, model().vit_trunk(part[0], chosen, chosen // CELLS)))
        previous, at = part[1][-1:], stop
    for whole, parts in zip(
        (hidden, cells, scores, features), zip(*portions, strict=True), strict=True
    ):
        close(torch.cat(parts), whole)


# ---- the language model's cache --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Token:
    """One token that was read: where, and which ones it could see (indices into the history)."""

    embed: Tensor
    position: int
    call: int
    """Tokens of one call saw the same past; among themselves those before them."""
    block: int
    """Tokens of one call and block >= 0 see each other both ways."""
    past: list[int]
    """The cache then, as places in the history."""


class Reader:
    """A cache of keys and values beside the list of everything that it was made of."""

    def __init__(self, seed: int) -> None:
        cfg = CFG.language
        self._generator = torch.Generator().manual_seed(seed)
        empty = torch.zeros(1, 0, cfg.num_kv_heads, cfg.head_dim)
        self.past: list[KeyValue] = [(empty, empty)] * cfg.num_layers
        self.history: list[Token] = []
        self.rows: list[int] = []
        """Which tokens of the history the cache holds."""
        self.frames: list[list[int]] = []
        """Tokens of each frame that is still held."""
        self._calls = 0

    def read(self, blocks: list[int]) -> Tensor:
        """Reads new random tokens (-1: causal) and returns their logits [s, V]."""
        first = self.history[self.rows[-1]].position + 1 if self.rows else 0
        embeds = torch.randn(len(blocks), CFG.language.width, generator=self._generator)
        start, past = len(self.history), list(self.rows)
        for i, block in enumerate(blocks):
            self.history.append(Token(embeds[i], first + i, self._calls, block, past))
        self._calls += 1
        new = list(range(start, len(self.history)))
        hidden, keys_values = model().llm(
            embeds[None],
            *rope_tables(CFG.language, torch.arange(first, first + len(blocks))[None]),
            self._bias(new, self.rows + new),
            self.past,
        )
        self.rows += new
        self.past = [
            (torch.cat([k, new_k], 1), torch.cat([v, new_v], 1))
            for (k, v), (new_k, new_v) in zip(self.past, keys_values, strict=True)
        ]
        out: Tensor = model().llm.head(hidden[0])
        return out

    def frame(self, cells: int) -> None:
        """Two tokens of time stamp, a marker, the cells, a marker."""
        start = len(self.history)
        self.read([-1, -1, *[0] * (cells + 2)])
        self.frames.append(list(range(start, len(self.history))))

    def evict(self, number: int) -> None:
        """A frame goes; the newest one as if it had never come."""
        gone = self.frames.pop(number)
        is_newest = self.rows[-1] == gone[-1]
        self._hold([row for row in self.rows if row not in gone])
        if is_newest:
            del self.history[gone[0] :]

    def truncate(self, mark: int) -> None:
        """Everything read since goes, as if it had never been read."""
        first_gone = self.rows[mark] if mark < len(self.rows) else len(self.history)
        self._hold(self.rows[:mark])
        del self.history[first_gone:]

    def _hold(self, rows: list[int]) -> None:
        places = [self.rows.index(row) for row in rows]
        self.past = [(k[:, places], v[:, places]) for k, v in self.past]
        self.rows = rows

    def _bias(self, queries: list[int], keys: list[int]) -> Tensor:
        """What each token could see when it was read: [1, queries, keys]."""
        call = torch.tensor([token.call for token in self.history])
        block = torch.tensor([token.block for token in self.history])
        place = torch.arange(len(self.history))
        together = (block == block[:, None]) & (block >= 0) | (place <= place[:, None])
        visible = (call == call[:, None]) & together
        for i in queries:
            visible[i, self.history[i].past] = True
        return torch.where(visible[queries][:, keys], 0.0, MASKED)[None]

    def in_one_pass(self) -> Tensor:
        """Logits [t, V] of the whole history in a single forward pass without any cache."""
        everything = list(range(len(self.history)))
        positions = torch.tensor([token.position for token in self.history])
        hidden, _ = model().llm(
            torch.stack([token.embed for token in self.history])[None],
            *rope_tables(CFG.language, positions[None]),
            self._bias(everything, everything),
        )
        out: Tensor = model().llm.head(hidden[0])
        return out


actions = st.lists(
    st.one_of(
        st.tuples(st.just("frame"), st.integers(0, CELLS)),
        st.tuples(st.just("ask"), st.integers(0, 4)),
        st.tuples(st.just("evict"), st.integers(0, 9)),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40)
@given(actions, st.integers(0, 999))
def test_any_schedule_is_one_forward_pass(schedule: list[tuple[str, int]], seed: int) -> None:
    """`ask`: a question, so many tokens of an answer, then both are cut off again."""
    reader = Reader(seed)
    reader.read([-1])
    for action, number in [*schedule, ("ask", 2)]:
        if action == "frame":
            reader.frame(number)
        elif action == "evict" and reader.frames:
            reader.evict(number % len(reader.frames))
        elif action == "ask":
            mark, known = len(reader.rows), len(reader.history)
            logits = [reader.read([-1] * 3), *(reader.read([-1]) for _ in range(number))]
            close(torch.cat(logits), reader.in_one_pass()[known:])
            reader.truncate(mark)
            assert len(reader.history) == known


@settings(max_examples=20)
@given(st.lists(st.integers(0, CELLS), min_size=1, max_size=6), st.integers(0, 999))
def test_without_evictions_the_one_pass_is_the_clip(cells: list[int], seed: int) -> None:
    """The mask of that pass is then the model's own: causal, two-way inside a frame."""
    reader = Reader(seed)
    reader.read([-1])
    blocks = [-1]
    for number, count in enumerate(cells):
        reader.frame(count)
        blocks += [-1, -1, *[number] * (count + 2)]
    everything = list(range(len(reader.history)))
    assert torch.equal(reader._bias(everything, everything), attention_bias(blocks, 0, len(blocks)))
    assert [token.position for token in reader.history] == everything
