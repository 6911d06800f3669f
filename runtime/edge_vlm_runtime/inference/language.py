"""Tokens in, logits out, with the past in a KVArena.

Rotations and masks are made here, on the host: the graph knows neither positions nor frames.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_vlm.config import LanguageConfig
from edge_vlm.errors import NonFinite, PositionsUsedUp, ShapeRange
from edge_vlm.formats.precision import KVLayout
from edge_vlm.text.masks import CAUSAL, Rule, block_rule, branch_rule, rule_bias
from edge_vlm.text.rope import rope_table
from edge_vlm_runtime.engines.base import CacheMemory, Engine
from edge_vlm_runtime.inference.kv_arena import KVArena


class LanguageModel:
    """Stateless but for scratch memory; the conversation is the arena. One thread."""

    def __init__(
        self,
        engine: Engine,
        embed_table: np.ndarray,
        cfg: LanguageConfig,
        patch_id: int,
        layout: KVLayout = KVLayout.TOKEN_MAJOR,
        decode_engine: Engine | None = None,
        memory: CacheMemory | None = None,
    ) -> None:
        """`decode_engine`: another form of the same graph that is faster with one new token.
        `memory`: of the device that is to hold what is remembered; None is the host."""
        self._memory = memory
        self._decode_engine = decode_engine or engine
        self._layout = layout
        self._engine, self._table, self.cfg, self._patch_id = engine, embed_table, cfg, patch_id
        self.max_positions = cfg.max_positions
        self.max_tokens = engine.spec.dims["s"].max
        """New tokens in one run; a longer prefill is cut between frames."""
        self._cos, self._sin = rope_table(cfg, cfg.max_positions)
        self._no_bias = np.zeros(engine.spec.dims["p"].max + 1, np.float32)
        self._last_idx = np.zeros(1, np.int32)
        self._by_rule = any(t.name == "mask_rule" for t in engine.spec.inputs)
        """The graph is told who sees whom by a rule instead of a matrix."""
        self._one = block_rule(np.array([CAUSAL]))
        kinds = [(kind, i) for i in range(cfg.num_layers) for kind in ("k", "v")]
        self._past_names = [f"past_{kind}_{i}" for kind, i in kinds]
        written = "present" if layout is KVLayout.HEAD_MAJOR else "new"
        self._new_names = [f"{written}_{kind}_{i}" for kind, i in kinds]
        self._kv_dtype = next(t.dtype for t in engine.spec.inputs if t.name == "past_k_0")

    def new_arena(self, capacity: int | None = None) -> KVArena:
        """An empty arena of `capacity` tokens, by default as many as the graph can attend to.

        Raises ShapeRange for more than that.
        """
        most = self._engine.spec.dims["p"].max
        if capacity is not None and capacity > most:
            raise ShapeRange(
                f"an arena of {capacity} tokens is more than the graph's {most}",
                remedy="lower the window or export the bundle with a longer past",
            )
        cfg = self.cfg
        return KVArena(
            num_layers=cfg.num_layers,
            capacity=most if capacity is None else capacity,
            num_kv_heads=cfg.num_kv_heads,
            head_dim=cfg.head_dim,
            dtype=self._kv_dtype,
            layout=self._layout,
            memory=self._memory,
        )

    def embed(self, ids: npt.ArrayLike, features: np.ndarray | None = None) -> np.ndarray:
        """Embeddings f32 [n, width] of token ids [n].

        `features` f32 [K, width] are added to the K patch tokens among them, in order. Raises
        ValueError for an id outside the vocabulary or another number of patch tokens.
        """
        ids = np.asarray(ids)
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self._table):
            raise ValueError(f"token ids must lie in 0..{len(self._table) - 1}, got {ids}")
        embeds = np.array(self._table[ids], dtype=np.float32)
        if features is not None:
            places = np.flatnonzero(ids == self._patch_id)
            if len(places) != len(features):
                raise ValueError(f"{len(features)} features for {len(places)} patch tokens")
            embeds[places] += features
        return embeds

    def prefill(
        self, arena: KVArena, embeds: np.ndarray, block_ids: npt.ArrayLike | None = None
    ) -> np.ndarray:
        """Appends s tokens and returns the logits f32 [base_vocab] behind the last of them.

        `block_ids` i32 [s]: tokens with equal ids >= 0 see each other both ways, all others
        (CAUSAL, and everything without `block_ids`) only what came before. A block must arrive
        whole in one call. More than `max_tokens` tokens are run in pieces, cut only where no block
        is cut, with the same result. When anything is raised the arena is as before: KvFull,
        PositionsUsedUp, ShapeRange (one block larger than a run), NonFinite.
        """
        s = len(embeds)
        ids = np.full(s, CAUSAL, np.int32) if block_ids is None else np.asarray(block_ids)
        if s == 0 or embeds.shape != (s, self.cfg.width) or ids.shape != (s,):
            raise ValueError(
                f"need embeds [s, {self.cfg.width}] and block_ids [s] with s > 0, got "
                f"{embeds.shape} and {ids.shape}"
            )
        embeds = np.ascontiguousarray(embeds, np.float32)
        self._require_room(arena, s)
        mark = arena.mark()
        try:
            for start, stop in chunks(ids, self.max_tokens):
                logits = self._run(arena, embeds[start:stop], ids[start:stop])
        except BaseException:
            arena.truncate(mark)
            raise
        return logits

    def measure(self, arena: KVArena, branches: Sequence[np.ndarray]) -> np.ndarray:
        """Logits f32 [len(branches), base_vocab] behind each branch; the arena stays as it is.

        Every branch, embeddings f32 [n, width], continues the arena as if it were alone there: the
        branches do not see each other. As many as fit go through the graph in one run, so that the
        weights are read once for all of them. Raises KvFull, PositionsUsedUp, NonFinite, and
        ValueError for no branch or an empty one.
        """
        if not branches or any(b.ndim != 2 or len(b) == 0 for b in branches):
            raise ValueError("need one or more branches of one or more tokens each")
        for branch in branches:
            self._require_room(arena, len(branch))
        most = min(self.max_tokens, arena.free)
        logits: list[np.ndarray] = []
        group: list[np.ndarray] = []
        size = 0
        for branch in branches:
            if group and size + len(branch) > most:
                logits.append(self._measure_group(arena, group))
                group, size = [], 0
            group.append(branch)
            size += len(branch)
        logits.append(self._measure_group(arena, group))
        return np.concatenate(logits)

    def _measure_group(self, arena: KVArena, branches: list[np.ndarray]) -> np.ndarray:
        lengths = np.array([len(branch) for branch in branches])
        ends = np.cumsum(lengths)
        branch_ids = np.repeat(np.arange(len(branches)), lengths)
        places = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        return self._infer(
            arena,
            np.ascontiguousarray(np.concatenate(branches), np.float32),
            arena.next_position + places,
            branch_rule(branch_ids),
            (ends - 1).astype(np.int32),
        )

    def decode_step(self, arena: KVArena, token_id: int) -> np.ndarray:
        """Appends one token and returns the logits f32 [base_vocab] behind it. As `prefill`."""
        self._require_room(arena, 1)
        return self._run(arena, self.embed([token_id]), None)

    def _require_room(self, arena: KVArena, num_tokens: int) -> None:
        arena.reserve(num_tokens)
        if arena.next_position + num_tokens > self.max_positions:
            raise PositionsUsedUp(
                f"{num_tokens} tokens from position {arena.next_position} pass the model's "
                f"{self.max_positions} positions",
                remedy="prefill the retained frames again from position 0",
            )

    def _run(self, arena: KVArena, embeds: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
        s, first = len(embeds), arena.next_position
        self._last_idx[0] = s - 1
        rule = self._one if s == 1 or ids is None else block_rule(ids)
        logits = self._infer(arena, embeds, slice(first, first + s), rule, self._last_idx)
        arena.append(s)
        rows: npt.NDArray[np.float32] = logits[0]
        return rows

    def _infer(
        self,
        arena: KVArena,
        embeds: np.ndarray,
        positions: slice | np.ndarray,
        rule: Rule,
        rows: np.ndarray,
    ) -> np.ndarray:
        """One run of the graph: logits f32 [n, base_vocab] of the `rows` i32 [n] asked for.

        The new keys and values lie behind the arena's last row, where `append` takes them over.
        """
        engine = self._decode_engine if len(embeds) == len(rows) == 1 else self._engine
        logits = np.empty((len(rows), self.cfg.base_vocab), np.float32)
        engine.bind_array("inputs_embeds", embeds)
        engine.bind_array("cos", self._cos[positions])
        engine.bind_array("sin", self._sin[positions])
        if engine is self._engine and self._by_rule:
            engine.bind_array("mask_rule", rule)
        else:
            past_tokens = arena.length
            one = len(embeds) == 1
            bias = self._no_bias[: past_tokens + 1][None] if one else rule_bias(rule, past_tokens)
            engine.bind_array("attn_bias", bias)
        engine.bind_array("last_idx", rows)
        engine.bind_array("logits", logits)
        past, offset, new = arena.places(len(embeds))
        for past_name, new_name, pointer in zip(
            self._past_names, self._new_names, arena.pointers, strict=True
        ):
            engine.bind(past_name, pointer, past)
            engine.bind(new_name, pointer + offset, new)
        engine.run()
        if not np.isfinite(logits).all():
            raise NonFinite("the logits are not finite", where="llm")
        # A key of minus infinity would only hide its token.
        if self._kv_dtype == "float16" and not arena.takes(len(embeds)):
            raise NonFinite(
                "a key or value is larger than its cache of float16 can hold",
                where="llm",
                remedy="export with base=float32 and without cache=float16",
            )
        return logits


def chunks(block_ids: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Cuts [0, s) into pieces of at most `most` tokens, never through a block.

    Raises ShapeRange if a block does not fit into one piece.
    """
    s = len(block_ids)
    if s <= most:
        return [(0, s)]
    last_of = {int(block): i for i, block in enumerate(block_ids) if block >= 0}
    pieces, start, cut, reach = [], 0, 0, -1
    for i, block in enumerate(block_ids):
        reach = max(reach, last_of.get(int(block), i))
        if i + 1 - start > most:
            if cut == start:
                raise ShapeRange(
                    f"{most} tokens fit into one run, a block of vision tokens has more",
                    remedy="shorten the window or export the bundle with more tokens per run",
                )
            pieces.append((start, cut))
            start = cut
        if reach == i:
            cut = i + 1
    if s - start > most:
        pieces.append((start, cut))
        start = cut
    if start < s:
        pieces.append((start, s))
    return pieces
