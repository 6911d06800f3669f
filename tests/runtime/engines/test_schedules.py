"""Through the engines, the arena and the context: any schedule of frames, questions, cancels and
changed settings says what torch says in one forward pass over everything that was prefilled."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_vlm.pixels.frames import Frame
from edge_vlm.pixels.patches import to_pixel_values
from edge_vlm.pruning.policies import POLICY_NAMES, make_policy
from edge_vlm.text.masks import CAUSAL, MASKED
from edge_vlm_runtime import protocol
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.inference.kv_arena import KVArena
from edge_vlm_runtime.inference.language import LanguageModel
from edge_vlm_runtime.inference.vision import FrameTokens
from edge_vlm_runtime.protocol.settings import Attention, ModelLimits
from edge_vlm_runtime.session.budget import MemoryPlan
from edge_vlm_runtime.session.context import Evicted, Rebased, StreamContext
from edge_vlm_runtime.session.stream_clock import StreamClock
from tests.runtime.cameras.pictures import picture
from tests.runtime.session.fake_engines import FakeClock
from tests.runtime.session.viewer import LIMITS, Viewer
from tests.tiny import tiny_bundle, tiny_checkpoint, tiny_config

torch = pytest.importorskip("torch")

QUESTION = "is there a red ball ?"


@pytest.fixture(scope="module")
def engines() -> Iterator[LoadedBundle]:
    with LoadedBundle.open(tiny_bundle(), threads=1) as opened:
        yield opened


@lru_cache(maxsize=1)
def torch_model() -> Any:
    from edge_vlm.model.checkpoint import load_checkpoint

    return load_checkpoint(tiny_checkpoint())


# ---- what was ever prefilled, and by whom it was seen ----------------------------------------


@dataclasses.dataclass(frozen=True)
class Token:
    embed: np.ndarray
    position: int
    call: int
    block: int
    past: list[int]
    """What the arena held before the call, as places in the history."""


class Ledger:
    """Stands before a language model and its arena and writes down what they are told."""

    def __init__(self, language: LanguageModel, capacity: int | None = None) -> None:
        self._language = language
        self.arena = language.new_arena(capacity)
        self.history: list[Token] = []
        self.rows: list[int] = []
        self._evict, self._truncate, self._clear = (
            self.arena.evict,
            self.arena.truncate,
            self.arena.clear,
        )
        for name in ("evict", "truncate", "clear"):
            setattr(self.arena, name, getattr(self, name))
        self._calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._language, name)

    def new_arena(self, capacity: int) -> KVArena:
        assert self.arena.capacity == capacity
        return self.arena

    def prefill(
        self, arena: KVArena, embeds: np.ndarray, block_ids: np.ndarray | None = None
    ) -> np.ndarray:
        logits = self._language.prefill(arena, embeds, block_ids)
        blocks = np.full(len(embeds), CAUSAL) if block_ids is None else np.asarray(block_ids)
        self._add(embeds, blocks)
        return logits

    def decode_step(self, arena: KVArena, token_id: int) -> np.ndarray:
        logits = self._language.decode_step(arena, token_id)
        self._add(self._language.embed([token_id]), np.array([CAUSAL]))
        return logits

    def _add(self, embeds: np.ndarray, blocks: np.ndarray) -> None:
        past, start = list(self.rows), len(self.history)
        first = self.history[past[-1]].position + 1 if past else 0
        for i, (embed, block) in enumerate(zip(embeds, blocks, strict=True)):
            self.history.append(Token(embed, first + i, self._calls, int(block), past))
        self._calls += 1
        self.rows += range(start, len(self.history))
        assert self.arena.positions.tolist() == [self.history[row].position for row in self.rows]

    def evict(self, start: int, stop: int) -> None:
        self._evict(start, stop)
        del self.rows[start:stop]

    def truncate(self, mark: int) -> None:
        """What comes after has never seen what is cut off, so it leaves the history."""
        self._truncate(mark)
        if mark < len(self.rows):
            del self.history[self.rows[mark] :], self.rows[mark:]

    def clear(self) -> None:
        self._clear()
        self.history.clear()
        self.rows.clear()

    def in_one_pass(self) -> np.ndarray:
        """Logits behind the newest token, from torch, in one forward pass without a cache."""
        from edge_vlm.model.llm import rope_tables

        llm = torch_model().llm
        call = np.array([token.call for token in self.history])
        block = np.array([token.block for token in self.history])
        visible = np.tri(len(call), dtype=np.bool_)
        visible |= (block[:, None] == block) & (block >= 0)
        visible &= call[:, None] == call
        for place, token in enumerate(self.history):
            visible[place, token.past] = True
        positions = torch.tensor([[token.position for token in self.history]])
        embeds = torch.from_numpy(np.stack([token.embed for token in self.history]))[None]
        bias = torch.from_numpy(np.where(visible, np.float32(0), np.float32(MASKED)))[None]
        with torch.no_grad():
            hidden, _ = llm(embeds, *rope_tables(llm.cfg, positions), bias)
            logits: np.ndarray = llm.head(hidden[0, -1]).numpy()
        return logits


# ---- the context -----------------------------------------------------------------------------


class Stream:
    """A context over a ledger, fed with frames of one video."""

    def __init__(self, engines: LoadedBundle, frames: list[FrameTokens]) -> None:
        self._engines = engines
        self._frames = frames
        self.ledger = Ledger(engines.language)
        self._settings: dict[str, Any] = {
            "attention": Attention.FRAME,
            "window_tokens": 120,
            "last_n": 2,
            "reserve_tokens": 40,
        }
        limits = ModelLimits.from_bundle(engines.bundle)
        self.context = StreamContext(
            language=cast(LanguageModel, self.ledger),
            prompt=engines.prompt,
            clock=StreamClock(),
            model=dataclasses.replace(limits, max_time_s=None, max_positions=220),
            capacity=limits.max_cache_tokens,
            plan=MemoryPlan(**self._settings),
        )
        self.shown: list[FrameTokens] = []
        self.evicted = 0
        """Frames forgotten since all that is left was last prefilled: later ones have seen them."""

    def show(self, count: int) -> None:
        frames = self._frames[len(self.shown) :][:count]
        self.shown += frames
        self.context.add(frames)
        for change in self.context.changes():
            self._note(change)

    def change(self, **settings: Any) -> None:
        before = self._settings["attention"]
        self._settings |= settings
        self.context.reconfigure(MemoryPlan(**self._settings))
        for change in self.context.changes():
            self._note(change)
        if self._settings["attention"] is not before:
            self.evicted = 0  # what is left is prefilled anew

    def _note(self, change: Evicted | Rebased) -> None:
        if isinstance(change, Rebased):
            self.evicted = 0
        else:
            self.evicted += change.frames

    def ask(self, answer_tokens: int) -> np.ndarray:
        """Logits behind the question, after it was asked, answered and taken back."""
        ledger, engines = self.ledger, self._engines
        with self.context.branch() as arena:
            rows = list(ledger.rows)
            ids = engines.prompt.question_ids(QUESTION)
            first = logits = ledger.prefill(arena, engines.language.embed(ids))
            close(logits, ledger.in_one_pass())
            for _ in range(answer_tokens):
                logits = ledger.decode_step(arena, int(logits.argmax()))
                close(logits, ledger.in_one_pass())
        assert ledger.rows == rows
        assert ledger.arena.length == len(rows)
        return first

    def remembered(self) -> list[FrameTokens]:
        return [self._frames[i] for i in self.context.frame_numbers()]


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def frames(engines: LoadedBundle) -> list[FrameTokens]:
    state, policy = engines.vision.new_state(), make_policy("stream", 0.5)
    return [
        engines.vision.encode(Frame(rgb=picture(i), pts_ns=i * 5 * 10**8, seq=i), state, policy)
        for i in range(60)
    ]


actions = st.lists(
    st.one_of(
        st.tuples(st.just("show"), st.integers(1, 6)),
        st.tuples(st.just("ask"), st.integers(0, 5)),
        st.tuples(st.just("window_tokens"), st.sampled_from([45, 80, 120])),
        st.tuples(st.just("attention"), st.sampled_from(list(Attention))),
    ),
    max_size=14,
)


EVENTFUL: list[tuple[str, Any]] = [
    *([("show", 6), ("ask", 3)] * 2),
    ("window_tokens", 80),
    *([("show", 1)] * 24),
    ("ask", 1),
    ("window_tokens", 45),
    *([("show", 5), ("show", 1), ("ask", 0)] * 2),
    ("attention", Attention.EXACT),
    ("show", 4),
    ("ask", 2),
    ("attention", Attention.FRAME),
    ("show", 3),
]


def test_the_eventful_schedule_is_one(engines: LoadedBundle, frames: list[FrameTokens]) -> None:
    """It evicts and counts positions anew, so the schedules below are tried on both."""
    changes: list[type] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "_note", lambda self, change: changes.append(type(change)))
        stream = Stream(engines, frames)
        stream.show(1)
        for action, value in EVENTFUL:
            if action == "show":
                stream.show(value)
            elif action != "ask":
                stream.change(**{action: value})
    assert changes.count(Evicted) > 5, changes
    assert changes.count(Rebased) > 0, changes


@settings(max_examples=30)
@given(schedule=actions)
@example(schedule=EVENTFUL)
def test_any_schedule_is_one_forward_pass(
    engines: LoadedBundle, frames: list[FrameTokens], schedule: list[tuple[str, Any]]
) -> None:
    """`ask`: a question, so many tokens of its answer, then it is cancelled."""
    stream = Stream(engines, frames)
    stream.show(1)
    for action, value in [*schedule, ("ask", 1)]:
        if action == "show":
            stream.show(value)
        elif action == "ask":
            again = [stream.ask(value) for _ in range(2)]
            assert np.array_equal(again[0], again[1])
        else:
            stream.change(**{action: value})
        known = stream.context.frame_numbers()
        assert known[0] == 0
        assert known[-1] == len(stream.shown) - 1
        assert known[1:] == list(range(len(stream.shown) - len(known) + 1, len(stream.shown)))


@settings(max_examples=20)
@given(schedule=actions)
def test_what_was_not_evicted_is_as_if_it_came_in_one_clip(
    engines: LoadedBundle, frames: list[FrameTokens], schedule: list[tuple[str, Any]]
) -> None:
    """In `frame` mode, as long as nothing was evicted since all was last prefilled."""
    stream = Stream(engines, frames)
    stream.show(1)
    for action, value in schedule:
        if action == "show":
            stream.show(value)
        elif action == "ask":
            stream.ask(value)
        else:
            stream.change(**{action: value})
    stream.change(attention=Attention.FRAME)
    if stream.evicted == 0:
        clip = Stream(engines, stream.remembered())
        clip.change(window_tokens=500)
        clip.show(len(stream.remembered()))
        close(stream.ask(0), clip.ask(0))


# ---- whole sessions --------------------------------------------------------------------------


def arena_rows(viewer: Viewer) -> np.ndarray:
    """Keys and values of every layer: [layers, 2, length, heads, head_dim]."""
    layers = tiny_config().language.num_layers
    return np.stack([np.stack(viewer.arena.rows(layer)) for layer in range(layers)])


def last_answer(viewer: Viewer) -> protocol.ResponseDone:
    viewer.ask(QUESTION)
    viewer.run()
    return viewer.of(protocol.ResponseDone)[-1]


@settings(max_examples=15)
@given(
    st.lists(
        st.sampled_from(["frame", "frame", "ask", "cancel", "cancel_all", "step", "step"]),
        max_size=24,
    ),
    st.sampled_from(["stream", "random", "frame_topk", "difference"]),
)
def test_interrupting_a_session_leaves_no_trace_in_its_memory(
    engines: LoadedBundle, actions: list[str], policy: str
) -> None:
    """Questions at any time, cancelled or not: in the end it is as if only frames had come."""
    options: dict[str, Any] = {"policy": policy, "max_answer_tokens": 6}
    busy, quiet = (Viewer(engines, FakeClock(), **options) for _ in range(2))
    for viewer in (busy, quiet):
        viewer.show(1)
    for number, action in enumerate(actions, start=2):
        if action == "frame":
            while busy.handle.frames_waiting >= LIMITS.max_unacknowledged_frames:
                busy.step()  # a sender that is to lose no frame waits
            busy.put(number)
            quiet.show(number)
            if not busy.session.is_answering:
                busy.run()
        elif action == "ask" and len(busy.session._questions) < 3:
            busy.ask("how many cars are there now ?")
        elif action == "cancel" and busy.of(protocol.ResponseCreated):
            busy.cancel(busy.of(protocol.ResponseCreated)[-1].response_id)
        elif action == "cancel_all":
            busy.cancel(None)
        elif action == "step":
            busy.step()
    busy.run()
    assert not busy.drop_reasons()
    assert not busy.of(protocol.MemoryEvicted)
    assert busy.context.frame_numbers() == quiet.context.frame_numbers()
    np.testing.assert_allclose(arena_rows(busy), arena_rows(quiet), atol=1e-5, rtol=1e-4)
    positions = [viewer.arena.positions.tolist() for viewer in (busy, quiet)]
    assert positions[0] == positions[1]
    answers = [last_answer(viewer) for viewer in (busy, quiet)]
    assert answers[0].usage == answers[1].usage


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_a_keep_ratio_of_one_is_unpruned_torch(engines: LoadedBundle, policy: str) -> None:
    """Streamed through the engines against every cell of the whole clip in torch."""
    model, vision = torch_model(), tiny_config().vision
    pictures = [picture(i) for i in range(5)]
    state, chosen = engines.vision.new_state(), make_policy(policy, 1.0)
    streamed = [
        engines.vision.encode(Frame(rgb=rgb, pts_ns=i, seq=i), state, chosen).embeds
        for i, rgb in enumerate(pictures)
    ]
    pixels = torch.from_numpy(np.stack([to_pixel_values(rgb, vision) for rgb in pictures]))
    nobody = torch.zeros(1, vision.num_cells, vision.width)
    with torch.no_grad():
        x, _, _ = model.vit_stem(pixels, nobody, torch.arange(5) == 0)
        taps = {}
        for i in range(model.trunk_start, vision.num_layers):
            x = taps[i] = model.vit.blocks[i](x)  # dense, on whole frames
        joined = torch.cat([taps[i] for i in vision.feature_layers], -1)
        expected = model.connector(model.vit.cells(joined).flatten(0, 1)).numpy()
    close(np.concatenate(streamed), expected)
