"""A bundle that answers questions about clips in this process, without server and socket: the path
`bundle` of `edge-vlm eval`. Offers runs that no live session could, such as the paper's budget over
the finished clip.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_vlm.evaluation.offline import Asked, Prefix, View, answer_clip, can_run
from edge_vlm.evaluation.runs import MAX_ANSWER_TOKENS, ClipAnswers, Run
from edge_vlm.formats.bundle import MANIFEST, EngineBundle, sha256_of_file
from edge_vlm.formats.qa_set import ClipQuestions
from edge_vlm.pixels.frames import Frame, Rgb
from edge_vlm.pixels.patches import to_pixel_values
from edge_vlm.pruning.change import frame_changes
from edge_vlm.pruning.policies import Cells, Scores
from edge_vlm.pruning.reuse import ReuseRule
from edge_vlm_runtime.engines.base import Engine
from edge_vlm_runtime.engines.names import Backend
from edge_vlm_runtime.engines.open import open_graphs
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.inference.generate import generate
from edge_vlm_runtime.inference.kv_arena import KVArena
from edge_vlm_runtime.inference.sampling import Sampling
from edge_vlm_runtime.protocol.settings import ModelLimits
from edge_vlm_runtime.session.budget import require_reuse

ROOM = 128
"""Cache rows left free behind a video for a question and its answer."""


class OfflineBundle:
    """The graphs of a bundle; `edge_vlm.evaluation.offline.ClipModel`."""

    def __init__(
        self, bundle: EngineBundle, graphs: Mapping[str, Engine], reuse: ReuseRule | None = None
    ) -> None:
        """`reuse`: by which clips are looked at; None: every cell is computed."""
        self._reuse = reuse
        self._engines = LoadedBundle(bundle, dict(graphs))
        self._stem, self._trunk = graphs["vit_stem"], graphs["vit_trunk"]
        self.config = bundle.config
        self.prompt = self._engines.prompt
        longest = min(bundle.specs["llm"].dims["p"].max, self.config.language.max_positions)
        self.max_prefix_tokens = longest - ROOM
        self.max_block_tokens = bundle.specs["llm"].dims["s"].max
        self._arena = self._engines.language.new_arena(longest)
        self._hidden: list[npt.NDArray[np.float32]] = []
        self._scored: list[npt.NDArray[np.float32]] = []

    def look(self, rgbs: Sequence[Rgb]) -> Scores:
        """Frame by frame scores of a clip that begins with the first picture, f32 [F, C]."""
        if self._reuse is not None:
            return self._look_at_changes(rgbs, self._reuse)
        vision, stem = self.config.vision, self._stem
        scores = np.ones((len(rgbs), vision.num_cells), np.float32)
        prev = np.zeros((1, vision.num_cells, vision.width), np.float32)
        cells = np.empty_like(prev)
        self._hidden, self._scored = [], []
        for i, rgb in enumerate(rgbs):
            hidden = np.empty((1, vision.num_patches, vision.width), np.float32)
            stem.bind_array("pixels", to_pixel_values(rgb, vision)[None])
            stem.bind_array("hidden", hidden)
            if self.config.change is not None:
                self._scored.append(np.empty_like(hidden))
                stem.bind_array("scored", self._scored[-1])
            if self.config.scorer is not None:
                stem.bind_array("is_first", np.array([i == 0]))
                stem.bind_array("prev_cells", prev)
                stem.bind_array("cells", cells)
                stem.bind_array("scores", scores[i : i + 1])
            stem.run()
            prev, cells = cells, prev
            self._hidden.append(hidden)
        if self.config.change is not None:
            return frame_changes(np.concatenate(self._scored))
        return scores

    def _look_at_changes(self, rgbs: Sequence[Rgb], rule: ReuseRule) -> Scores:
        vision = self._engines.vision
        state = vision.new_state()
        vision.set_reuse(state, rule)
        scores = []
        self._hidden, self._scored = [], []
        for i, rgb in enumerate(rgbs):
            seen = vision.look(Frame(rgb=rgb, pts_ns=i, seq=i), state)
            scores.append(seen.scores)
            self._hidden.append(seen.hidden)
            if self.config.change is not None:
                self._scored.append(vision.scored[None].copy())
        return frame_changes(np.concatenate(self._scored)) if self._scored else np.stack(scores)

    def scored(self, frame: int) -> npt.NDArray[np.float32]:
        """[N, D] of a frame of the clip looked at last: what its change is scored by."""
        scored: npt.NDArray[np.float32] = self._scored[frame][0]
        return scored

    def features(self, cells: Sequence[Cells]) -> list[npt.NDArray[np.float32]]:
        """[K, E] of the chosen cells of each frame of the clip looked at last."""
        return [
            self._frame_features(hidden, chosen)
            for hidden, chosen in zip(self._hidden, cells, strict=True)
        ]

    def _frame_features(
        self, hidden: npt.NDArray[np.float32], cells: Cells
    ) -> npt.NDArray[np.float32]:
        features = np.empty((len(cells), self.config.language.width), np.float32)
        if len(cells):
            trunk = self._trunk
            trunk.bind_array("hidden", hidden)
            trunk.bind_array("cell_idx", np.ascontiguousarray(cells, np.int32))
            trunk.bind_array("frame_id", np.zeros(len(cells), np.int32))
            trunk.bind_array("features", features)
            trunk.run()
        return features

    def answer(self, views: Sequence[View], max_tokens: int = MAX_ANSWER_TOKENS) -> list[list[str]]:
        """A prefix grows from question to question; each answer is taken off again."""
        return [self._view(prefix, asked, max_tokens) for prefix, asked in views]

    def _view(self, prefix: Prefix, asked: Sequence[Asked], max_tokens: int) -> list[str]:
        language, arena = self._engines.language, self._arena
        arena.clear()
        embeds = language.embed(prefix.ids, prefix.features)
        texts = [""] * len(asked)
        length = 0
        for number in sorted(range(len(asked)), key=lambda number: asked[number].end):
            end = asked[number].end
            if end > length:
                language.prefill(arena, embeds[length:end], prefix.blocks[length:end])
                length = end
            texts[number] = self._answer(arena, asked[number], max_tokens)
            arena.truncate(length)
        return texts

    def _answer(self, arena: KVArena, asked: Asked, max_tokens: int) -> str:
        language, prompt = self._engines.language, self.prompt
        logits = language.prefill(arena, language.embed(asked.ids))
        tokens = generate(language, arena, logits, Sampling(), prompt.eos_ids, max_tokens)
        return prompt.tokenizer.decode(list(tokens))

    def close(self) -> None:
        self._engines.close()


def identity_of(folder: Path, backend: Backend) -> str:
    """Of a bundle and, since answers may differ, of what runs it if that is not usual."""
    manifest = sha256_of_file(folder / MANIFEST)
    return manifest if backend is Backend.ORT else f"{manifest} {backend.value}"


class BundleEvaluator:
    """`edge_vlm.evaluation.runs.Evaluator` over a bundle's graphs on the CPU."""

    def __init__(
        self, folder: Path, threads: int, backend: Backend = Backend.ORT, reuse: float = 0.0
    ) -> None:
        """`reuse`: as of `TorchEvaluator`. Raises BundleError and its leaves, MissingExtraError,
        EngineError, ConfigError."""
        bundle = EngineBundle.open(folder)
        self.name = folder.resolve().name
        self.attention = bundle.config.attention
        self.has_scores = bundle.config.has_scores
        self.identity = identity_of(folder, backend)
        self.frames = bundle.frames
        rule = None
        if reuse:
            rule = ReuseRule(threshold=reuse)
            self.identity += f", reuse {reuse:g}"
            require_reuse(ModelLimits.from_bundle(bundle), reuse)
        opened = open_graphs(bundle, backend, threads=threads).graphs
        self.model = OfflineBundle(bundle, opened, rule)

    def can(self, run: Run) -> bool:
        return can_run(self.model.config, run)

    def answers(
        self, clip: ClipQuestions, runs: Sequence[Run]
    ) -> Iterator[tuple[Run, ClipAnswers]]:
        return answer_clip(self.model, clip, runs)

    def close(self) -> None:
        self.model.close()
