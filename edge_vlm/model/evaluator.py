"""A checkpoint that answers questions about clips, in torch: the path `torch` of `edge-vlm eval`.

Shape letters: F frames, N patches per frame, C cells per frame, G kept cells, D ViT width, V views,
P prefix tokens (padded), R questions, S new tokens of all of them, K everything they may look at.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edge_vlm.errors import ConfigError
from edge_vlm.evaluation.offline import Asked, Prefix, View, answer_clip, can_run
from edge_vlm.evaluation.runs import (
    CHANGE,
    MAX_ANSWER_TOKENS,
    ClipAnswers,
    EvaluatorOptions,
    Run,
)
from edge_vlm.formats.bundle import sha256_of_file
from edge_vlm.formats.qa_set import ClipQuestions
from edge_vlm.model.layers import additive_bias
from edge_vlm.model.llm import KeyValue, LanguageModel, attend_past, rope_tables
from edge_vlm.model.published.folder import open_folder
from edge_vlm.model.reuse import new_state, reuse_step
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.pixels.frames import Rgb
from edge_vlm.pixels.patches import to_pixel_values
from edge_vlm.pruning.change import frame_changes
from edge_vlm.pruning.policies import Cells, Scores
from edge_vlm.pruning.reuse import CellsComputed, ReuseRule
from edge_vlm.text.masks import CAUSAL, block_bias
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer

ROOM = 128
"""Positions left free after a video for a question and its answer."""
FRAMES_AT_ONCE = 32
"""That the vision transformer works on together: those of a long clip would take many GB."""


class TorchModel:
    """A model and its words; `edge_vlm.evaluation.offline.ClipModel`."""

    def __init__(self, model: VideoLM, prompt: PromptFormat) -> None:
        self.model = model.eval()
        self.config = model.cfg
        self.prompt = prompt
        self.max_prefix_tokens = self.config.language.max_positions - ROOM
        self.max_block_tokens = self.max_prefix_tokens
        self.reuse: ReuseRule | None = None
        """By which a clip is looked at from now on; None: every cell is computed."""
        self._hidden_FND: Tensor | None = None
        self._scored_FND: Tensor | None = None

    @torch.inference_mode()
    def look(self, rgbs: Sequence[Rgb]) -> Scores:
        """Frame by frame scores of a clip that begins with the first picture, f32 [F, C]."""
        if self.reuse is not None:
            return self._look_at_changes(rgbs, self.reuse)
        vision = self.config.vision
        before = torch.zeros(1, vision.num_cells, vision.width)
        hidden, scored, scores = [], [], []
        for start in range(0, len(rgbs), FRAMES_AT_ONCE):
            part = [rgbs[i] for i in range(start, min(start + FRAMES_AT_ONCE, len(rgbs)))]
            pixels = torch.from_numpy(np.stack([to_pixel_values(rgb, vision) for rgb in part]))
            if self.config.change is not None:
                seen, rated = self.model.change_stem(pixels)
                scored.append(rated)
            elif self.model.scorer is None:
                seen = self.model.embed_frames(pixels)
                scores.append(np.ones((len(part), vision.num_cells), np.float32))
            else:
                is_first = torch.arange(start, start + len(part)) == 0
                seen, cells, rated = self.model.vit_stem(pixels, before, is_first)
                before = cells[-1:]
                scores.append(rated.float().numpy())
            hidden.append(seen)
        self._hidden_FND = torch.cat(hidden)
        if scored:
            self._scored_FND = torch.cat(scored)
            return frame_changes(self._scored_FND.numpy())
        return np.concatenate(scores)

    def _look_at_changes(self, rgbs: Sequence[Rgb], rule: ReuseRule) -> Scores:
        vision = self.config.vision
        cells, state = CellsComputed(vision.num_cells, rule), new_state(self.config)
        hidden, scored, scores = [], [], []
        for i, rgb in enumerate(rgbs):
            pixels, size = to_pixel_values(rgb, vision), (rgb.shape[0], rgb.shape[1])
            chosen = cells.next(pixels, size)
            cells.computed(pixels, size, chosen)
            rated = state.resting_1C
            if len(chosen):
                index = torch.from_numpy(chosen.astype(np.int64))
                changed = torch.from_numpy(pixels)[self.model.vit.cell_patches_C9[index]]
                is_first = torch.tensor([i == 0])
                rated, state = reuse_step(self.model, changed, index, is_first, state)
            hidden.append(state.hidden_1ND)
            if state.scored_1ND is not None:
                scored.append(state.scored_1ND)
            if rated is not None:
                scores.append(rated.float().numpy())
        self._hidden_FND = torch.cat(hidden)
        if scored:
            self._scored_FND = torch.cat(scored)
            return frame_changes(self._scored_FND.numpy())
        return np.concatenate(scores)

    def scored(self, frame: int) -> npt.NDArray[np.float32]:
        """[N, D] of a frame of the clip looked at last: what its change is scored by."""
        assert self._scored_FND is not None, "look at a clip first"
        return self._scored_FND[frame].numpy()

    @torch.inference_mode()
    def features(self, cells: Sequence[Cells]) -> list[npt.NDArray[np.float32]]:
        """[K, E] of the chosen cells of each frame of the clip looked at last."""
        assert self._hidden_FND is not None, "look at a clip first"
        found: list[npt.NDArray[np.float32]] = []
        for start in range(0, len(cells), FRAMES_AT_ONCE):
            stop = start + FRAMES_AT_ONCE
            found += self._features(self._hidden_FND[start:stop], cells[start:stop])
        return found

    def _features(
        self, hidden_FND: Tensor, cells: Sequence[Cells]
    ) -> list[npt.NDArray[np.float32]]:
        counts = [len(chosen) for chosen in cells]
        width = self.config.language.width
        if not sum(counts):
            return [np.empty((0, width), np.float32) for _ in counts]
        frame_id = torch.from_numpy(np.repeat(np.arange(len(cells)), counts))
        within = torch.from_numpy(np.concatenate(cells).astype(np.int64))
        cell_idx = frame_id * self.config.vision.num_cells + within
        features = self.model.vit_trunk(hidden_FND, cell_idx, frame_id)
        return [part.numpy() for part in features.split(counts)]

    @torch.inference_mode()
    def answer(self, views: Sequence[View], max_tokens: int = MAX_ANSWER_TOKENS) -> list[list[str]]:
        """One pass over all prefixes, then all questions side by side, each with its own past."""
        if not views:
            return []
        past = self._prefill([prefix for prefix, _ in views])
        asked = [(number, item) for number, (_, items) in enumerate(views) for item in items]
        tokens = iter(_Decoding(self.model.llm, past, asked, self.prompt.eos_ids, max_tokens).run())
        decode = self.prompt.tokenizer.decode
        return [[decode(next(tokens)) for _ in items] for _, items in views]

    def _prefill(self, prefixes: Sequence[Prefix]) -> list[KeyValue]:
        """Keys and values of prefixes [V, P, ...], padded after their ends."""
        llm = self.model.llm
        longest = max(len(prefix.ids) for prefix in prefixes)
        ids_VP = torch.zeros(len(prefixes), longest, dtype=torch.int64)
        block_VP = np.full(ids_VP.shape, CAUSAL)
        for ids, block, prefix in zip(ids_VP, block_VP, prefixes, strict=True):
            ids[: len(prefix.ids)] = torch.from_numpy(prefix.ids.astype(np.int64))
            block[: len(prefix.ids)] = prefix.blocks
        embeds = llm.embed(ids_VP)
        features = torch.from_numpy(np.concatenate([prefix.features for prefix in prefixes]))
        places = (ids_VP == self.prompt.patch_id).flatten().nonzero().squeeze(1)
        embeds = embeds.flatten(0, 1).index_add(0, places, features).view_as(embeds)
        order = torch.arange(longest)
        bias_VPP = torch.from_numpy(block_bias(block_VP))
        past: list[KeyValue] = llm(embeds, *rope_tables(llm.cfg, order[None]), bias_VPP)[1]
        return past


class _Decoding:
    """Greedy answers to several questions over their prefixes, all in one sequence.

    Prefixes and questions lie end to end and are told apart by the mask, so that a prefix is held
    once however many questions read it. K counts everything so far, R the questions not yet
    answered.
    """

    def __init__(
        self,
        llm: LanguageModel,
        past: list[KeyValue],
        asked: Sequence[tuple[int, Asked]],
        eos_ids: Collection[int],
        max_tokens: int,
    ) -> None:
        """`asked` are questions with the number of their prefix in `past` [V, P, ...]."""
        self.llm = llm
        self.max_tokens = max_tokens
        self.eos_ids = eos_ids
        self.tokens: list[list[int]] = [[] for _ in asked]
        self.rows = list(range(len(asked)))
        num_views, longest = past[0][0].shape[:2]
        place = torch.arange(longest).repeat(num_views)
        view = torch.arange(num_views).repeat_interleave(longest)
        view_R = torch.tensor([number for number, _ in asked])
        ends_R = torch.tensor([item.end for _, item in asked])
        self.seen_RK = (view == view_R[:, None]) & (place < ends_R[:, None])
        lengths_R = torch.tensor([len(item.ids) for _, item in asked])
        room = int(lengths_R.sum()) + len(asked) * max_tokens
        self.past = [(_with_room(k, room), _with_room(v, room)) for k, v in past]
        self.length = num_views * longest
        last_R = lengths_R.cumsum(0) - 1
        row_S = torch.arange(len(asked)).repeat_interleave(lengths_R)
        order = torch.arange(len(row_S))
        within_S = order - (last_R + 1 - lengths_R)[row_S]
        own_SS = (row_S == row_S[:, None]) & (order <= order[:, None])
        ids_S = torch.from_numpy(np.concatenate([item.ids for _, item in asked]).astype(np.int64))
        seen_SK = torch.cat([self.seen_RK[row_S], own_SS], -1)
        hidden = self._step(ids_S, ends_R[row_S] + within_S, seen_SK)
        self.seen_RK = torch.cat([self.seen_RK, row_S == torch.arange(len(asked))[:, None]], -1)
        self.next_R = ends_R + lengths_R
        self.logits_R = self.llm.head(hidden[last_R])

    def run(self) -> list[list[int]]:
        """Token ids of each answer, in the order of the questions, without the end token."""
        for number in range(self.max_tokens):
            chosen_R = self.logits_R.argmax(-1)
            alive = [i for i, token in enumerate(chosen_R.tolist()) if token not in self.eos_ids]
            self.rows = [self.rows[i] for i in alive]
            chosen_R = chosen_R[alive]
            for row, token in zip(self.rows, chosen_R.tolist(), strict=True):
                self.tokens[row].append(token)
            if not alive or number + 1 == self.max_tokens:
                break
            own_RR = torch.eye(len(alive), dtype=torch.bool)
            self.seen_RK = torch.cat([self.seen_RK[alive], own_RR], -1)
            hidden = self._step(chosen_R, self.next_R[alive], self.seen_RK)
            self.next_R = self.next_R[alive] + 1
            self.logits_R = self.llm.head(hidden)
        return self.tokens

    def _step(self, ids_S: Tensor, positions_S: Tensor, seen_SK: Tensor) -> Tensor:
        """Hidden states [S, D] of new tokens, whose keys and values join the past."""
        tables = rope_tables(self.llm.cfg, positions_S[None])
        embeds, bias = self.llm.embed(ids_S[None]), additive_bias(seen_SK)[None]
        hidden: Tensor = self.llm(embeds, *tables, bias, self.past, self._attend)[0]
        self.length += len(ids_S)
        first: Tensor = hidden[0]
        return first

    def _attend(
        self,
        q_BSHd: Tensor,
        k_BShd: Tensor,
        v_BShd: Tensor,
        bias_BSK: Tensor,
        past: KeyValue | None,
    ) -> tuple[Tensor, KeyValue]:
        """As `attend_past`, with a past that has room for the new keys and values."""
        assert past is not None
        k, v = (buffer[:, : self.length + k_BShd.shape[1]] for buffer in past)
        k[:, self.length :], v[:, self.length :] = k_BShd, v_BShd
        out, _ = attend_past(q_BSHd, k, v, bias_BSK, None)
        return out, past


def _with_room(x_VPhd: Tensor, room: int) -> Tensor:
    """One row [1, V P + room, ...] that begins with all of `x`."""
    num_views, longest = x_VPhd.shape[:2]
    buffer = x_VPhd.new_empty(1, num_views * longest + room, *x_VPhd.shape[2:])
    buffer[:, : num_views * longest] = x_VPhd.flatten(0, 1)
    return buffer


class TorchEvaluator:
    """`edge_vlm.evaluation.runs.Evaluator` over a folder of weights (`open_folder`)."""

    def __init__(self, folder: Path, by_change: bool = False, reuse: float = 0.0) -> None:
        """`by_change`: with the scorer that has no weights instead of its own. `reuse`: threshold
        of change of what is computed anew, 0: everything. Raises as `open_folder`, and what its
        tokenizer raises; ConfigError for `reuse` without scores."""
        found = open_folder(folder)
        tokenizer = Tokenizer.from_file(found.require_tokenizer())
        self.name = folder.resolve().name
        model = found.load()
        if by_change:
            model.score_by_change()
        self.frames = found.usage.frames
        self._model = TorchModel(model, PromptFormat(tokenizer, found.usage.style))
        self.attention, self.has_scores = model.cfg.attention, model.cfg.has_scores
        self.identity = sha256_of_file(found.weight_files[0]) + by_change * ", scorer change"
        if reuse:
            if not self.has_scores:
                raise ConfigError(
                    "reuse is about the blocks in front of the scorer, and the weights have none",
                    where=folder,
                    remedy="add --scorer change, or leave --reuse out",
                )
            self._model.reuse = ReuseRule(threshold=reuse)
            self.identity += f", reuse {reuse:g}"

    def can(self, run: Run) -> bool:
        return can_run(self._model.config, run)

    def answers(
        self, clip: ClipQuestions, runs: Sequence[Run]
    ) -> Iterator[tuple[Run, ClipAnswers]]:
        return answer_clip(self._model, clip, runs)


@contextmanager
def open_checkpoint(target: str | None, options: EvaluatorOptions) -> Iterator[TorchEvaluator]:
    """The path `torch`. Raises ConfigError without a target, and as TorchEvaluator."""
    if target is None:
        raise ConfigError("the path torch needs a checkpoint", remedy="name its folder")
    torch.set_num_threads(options.threads)
    yield TorchEvaluator(Path(target), options.scorer == CHANGE, options.reuse)
