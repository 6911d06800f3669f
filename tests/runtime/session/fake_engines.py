"""Engines without a model, for states that a real one does not reach on demand: exact durations,
failures at a chosen frame or token, an answer of known words. Everything else is tested with the
real tiny bundle."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from edge_vlm.errors import NonFinite
from edge_vlm.formats.graph_spec import DynamicDim
from edge_vlm.pixels.frames import Frame
from edge_vlm.pruning.change import LastKept
from edge_vlm.pruning.policies import KeepAll, KeepPolicy
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm_runtime.inference.kv_arena import KVArena
from edge_vlm_runtime.inference.vision import FrameStem, FrameTokens
from tests.tiny import tiny_bundle, tiny_config

ANSWER = "is there a red ball ?"


class FakeClock:
    """Nanoseconds that pass only when told to."""

    def __init__(self) -> None:
        self.ns = 1_000_000_000

    def __call__(self) -> int:
        return self.ns

    def pass_s(self, seconds: float) -> None:
        self.ns += round(seconds * 1e9)


class FakeVision:
    def __init__(self, num_cells: int, width: int, clock: FakeClock) -> None:
        self.num_cells = num_cells
        self.is_memoryless = False
        self._width = width
        self._clock = clock
        self.fails_on: set[int] = set()
        """Numbers of frames whose scores are not finite."""
        self.takes_s = 0.01
        self.encoded: list[int] = []

    def new_state(self) -> SimpleNamespace:
        return SimpleNamespace(
            is_first=True, last_kept=LastKept(self.num_cells), forget_kept=lambda: None
        )

    def set_reuse(self, state: SimpleNamespace, rule: None) -> None:
        assert rule is None

    def encode(self, frame: Frame, state: SimpleNamespace, policy: KeepPolicy) -> FrameTokens:
        self._clock.pass_s(self.takes_s)
        if frame.seq in self.fails_on:
            raise NonFinite("the token scores of a frame are not finite", where="vit_stem")
        scores = np.random.default_rng(frame.seq).random(self.num_cells, dtype=np.float32)
        cells = policy.select(scores, frame.rgb, state.is_first)
        state.is_first = False
        self.encoded.append(frame.seq)
        return FrameTokens(
            embeds=np.zeros((len(cells), self._width), np.float32),
            cells=cells,
            scores=scores,
            pts_ns=frame.pts_ns,
            seq=frame.seq,
            stage_ms={"vit_stem": self.takes_s * 1e3},
        )

    def look(self, frame: Frame, state: SimpleNamespace) -> FrameStem:
        seen = self.encode(frame, state, KeepAll())
        return FrameStem(
            hidden=np.zeros((1, 1, 1), np.float32),
            scores=seen.scores,
            pts_ns=seen.pts_ns,
            seq=seen.seq,
            stage_ms=seen.stage_ms,
        )

    def finish(self, stem: FrameStem, kept: np.ndarray, context: np.ndarray) -> FrameTokens:
        cells = np.flatnonzero(kept).astype(np.int32)
        return FrameTokens(
            embeds=np.zeros((len(cells), self._width), np.float32),
            cells=cells,
            scores=stem.scores,
            pts_ns=stem.pts_ns,
            seq=stem.seq,
            stage_ms=stem.stage_ms,
            received_ns=stem.received_ns,
        )


class FakeLanguage:
    """Says `answer_ids` after every prefill without vision blocks, and yes or no when measured."""

    def __init__(
        self,
        width: int,
        vocab: int,
        answer_ids: Sequence[int],
        yes_no: tuple[int, int],
        clock: FakeClock,
    ) -> None:
        self._yes_no = yes_no
        self.yes = 0.5
        """Probability of yes against no; NaN: the logits are not finite."""
        self.measured: list[int] = []
        """Branches of each measurement."""
        self._width = width
        self._vocab = vocab
        self._answer_ids = list(answer_ids)
        self._clock = clock
        self._said: WeakKeyDictionary[KVArena, int] = WeakKeyDictionary()
        """Tokens of the answer under way, by session: another one's frame may be read in the middle
        of it."""
        self.fails_at_token: int | None = None
        self.token_takes_s = 0.02
        self.prefills: list[tuple[int, int]] = []
        """Tokens and vision blocks of each prefill."""
        self.prefills_until_failure: int | None = None
        """So many prefills go well, the next one fails, and those after it go well again."""
        self.arena_error: Exception | None = None
        """What making an arena raises."""

    def new_arena(self, capacity: int) -> KVArena:
        if self.arena_error is not None:
            raise self.arena_error
        return KVArena(num_layers=1, capacity=capacity, num_kv_heads=1, head_dim=2)

    def embed(self, ids: Any, features: np.ndarray | None = None) -> np.ndarray:
        return np.zeros((len(ids), self._width), np.float32)

    def prefill(
        self, arena: KVArena, embeds: np.ndarray, block_ids: np.ndarray | None = None
    ) -> np.ndarray:
        if self.prefills_until_failure is not None:
            self.prefills_until_failure -= 1
            if self.prefills_until_failure < 0:
                self.prefills_until_failure = None
                raise NonFinite("the logits are not finite", where="llm")
        arena.append(len(embeds))
        blocks = 0 if block_ids is None else len(set(block_ids[block_ids >= 0].tolist()))
        self.prefills.append((len(embeds), blocks))
        self._clock.pass_s(self.token_takes_s)
        self._said[arena] = 0
        return self._logits(arena)

    def measure(self, arena: KVArena, branches: Sequence[np.ndarray]) -> np.ndarray:
        self.measured.append(len(branches))
        self._clock.pass_s(self.token_takes_s)
        if math.isnan(self.yes):
            raise NonFinite("the logits are not finite", where="llm")
        logits = np.full((len(branches), self._vocab), -30.0, np.float32)
        for token, share in zip(self._yes_no, (self.yes, 1.0 - self.yes), strict=True):
            logits[:, token] = math.log(max(share, 1e-12))
        return logits

    def decode_step(self, arena: KVArena, token_id: int) -> np.ndarray:
        if self._said[arena] == self.fails_at_token:
            raise NonFinite("the logits are not finite", where="llm")
        arena.append(1)
        self._clock.pass_s(self.token_takes_s)
        return self._logits(arena)

    def _logits(self, arena: KVArena) -> np.ndarray:
        said = self._said[arena]
        logits = np.zeros(self._vocab, np.float32)
        logits[self._answer_ids[min(said, len(self._answer_ids) - 1)]] = 1.0
        self._said[arena] = said + 1
        return logits


@lru_cache(maxsize=1)
def _prompt() -> PromptFormat:
    return PromptFormat(Tokenizer.from_file(tiny_bundle() / "tokenizer.json"))


class FakeBundle:
    images = None

    def __init__(self, clock: FakeClock, max_positions: int = 512) -> None:
        config = tiny_config()
        language = dataclasses.replace(config.language, max_positions=max_positions)
        self.prompt = _prompt()
        self.bundle = SimpleNamespace(
            name="fake",
            images=None,
            frames=None,
            config=dataclasses.replace(config, language=language),
            defaults={},
            specs={
                "llm": SimpleNamespace(
                    inputs=[
                        SimpleNamespace(name=f"past_{kind}_{layer}", dtype="float32")
                        for kind in "kv"
                        for layer in range(language.num_layers)
                    ],
                    dims={
                        "s": DynamicDim(min=1, opt=16, max=512),
                        "p": DynamicDim(min=0, opt=16, max=512),
                    },
                )
            },
        )
        self.vision = FakeVision(config.vision.num_cells, config.language.width, clock)
        self.language = FakeLanguage(
            config.language.width,
            config.language.base_vocab,
            self.prompt.answer_ids(ANSWER).tolist(),
            (self.prompt.tokenizer.id_of(" yes"), self.prompt.tokenizer.id_of(" no")),
            clock,
        )
