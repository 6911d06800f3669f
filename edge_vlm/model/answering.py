"""A checkpoint that answers questions about clips, in torch: the path `torch` of `edge-vlm eval`.

Shape letters: F frames, N patches per frame, C cells per frame, G kept cells, D ViT width, V views,
P prefix tokens (padded), Q questions, L tokens of a question (padded), S tokens behind the prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edge_vlm.bundle import sha256_of_file
from edge_vlm.clip_answers import CAUSAL, Asked, Prefix, View, answer_clip, can_run
from edge_vlm.errors import ConfigError
from edge_vlm.evaluation import MAX_ANSWER_TOKENS, ClipAnswers, EvaluatorOptions, Run
from edge_vlm.model.checkpoint import TOKENIZER, WEIGHTS, load_checkpoint
from edge_vlm.model.layers import MASKED
from edge_vlm.model.llm import KeyValue, LanguageModel, attend_past, rope_tables
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.patches import to_pixel_values
from edge_vlm.prompt import PromptFormat
from edge_vlm.pruning import Cells, Rgb, Scores
from edge_vlm.question_set import ClipQuestions
from edge_vlm.tokenizer import Tokenizer

ROOM = 128
"""Positions left free behind a video for a question and its answer."""


class TorchModel:
    """A model and its words; `edge_vlm.clip_answers.ClipModel`."""

    def __init__(self, model: VideoLM, prompt: PromptFormat) -> None:
        self.model = model.eval()
        self.config = model.cfg
        self.prompt = prompt
        self.max_prefix_tokens = self.config.language.max_positions - ROOM
        self._hidden_FND: Tensor | None = None

    @torch.inference_mode()
    def look(self, rgbs: Sequence[Rgb]) -> Scores:
        """Frame by frame scores of a clip that begins with the first picture, f32 [F, C]."""
        vision = self.config.vision
        pixels = torch.from_numpy(np.stack([to_pixel_values(rgb, vision) for rgb in rgbs]))
        if self.model.scorer is None:
            self._hidden_FND = self.model.vit.embed(pixels)
            return np.ones((len(rgbs), vision.num_cells), np.float32)
        is_first = torch.arange(len(rgbs)) == 0
        nobody = pixels.new_zeros(1, vision.num_cells, vision.width)
        self._hidden_FND, _, scores = self.model.vit_stem(pixels, nobody, is_first)
        return scores.float().numpy()

    @torch.inference_mode()
    def features(self, cells: Sequence[Cells]) -> list[npt.NDArray[np.float32]]:
        """[K, E] of the chosen cells of each frame of the clip looked at last."""
        assert self._hidden_FND is not None, "look at a clip first"
        counts = [len(chosen) for chosen in cells]
        width = self.config.language.width
        if not sum(counts):
            return [np.empty((0, width), np.float32) for _ in counts]
        frame_id = torch.from_numpy(np.repeat(np.arange(len(cells)), counts))
        within = torch.from_numpy(np.concatenate(cells).astype(np.int64))
        cell_idx = frame_id * self.config.vision.num_cells + within
        features = self.model.vit_trunk(self._hidden_FND, cell_idx, frame_id)
        return [part.numpy() for part in features.split(counts)]

    @torch.inference_mode()
    def answer(self, views: Sequence[View], max_tokens: int = MAX_ANSWER_TOKENS) -> list[list[str]]:
        """One pass over all prefixes, then all questions side by side, each with its own past."""
        if not views:
            return []
        past = self._prefill([prefix for prefix, _ in views])
        asked = [(number, item) for number, (_, items) in enumerate(views) for item in items]
        tokens = iter(_Decoding(self.model.llm, past, asked, self.prompt.eos_id).run(max_tokens))
        decode = self.prompt.tokenizer.decode
        return [[decode(next(tokens)) for _ in items] for _, items in views]

    def _prefill(self, prefixes: Sequence[Prefix]) -> list[KeyValue]:
        """Keys and values of prefixes [V, P, ...], padded behind their ends."""
        llm = self.model.llm
        longest = max(len(prefix.ids) for prefix in prefixes)
        ids_VP = torch.zeros(len(prefixes), longest, dtype=torch.int64)
        block_VP = torch.full_like(ids_VP, CAUSAL)
        for ids, block, prefix in zip(ids_VP, block_VP, prefixes, strict=True):
            ids[: len(prefix.ids)] = torch.from_numpy(prefix.ids.astype(np.int64))
            block[: len(prefix.ids)] = torch.from_numpy(prefix.blocks)
        embeds = llm.embed(ids_VP)
        features = torch.from_numpy(np.concatenate([prefix.features for prefix in prefixes]))
        places = (ids_VP == self.prompt.patch_id).flatten().nonzero().squeeze(1)
        embeds = embeds.flatten(0, 1).index_add(0, places, features).view_as(embeds)
        order = torch.arange(longest)
        together = (block_VP[:, None] == block_VP[:, :, None]) & (block_VP[:, None] >= 0)
        seen_VPP = (order[None] <= order[:, None])[None] | together
        _, past = llm(embeds, *rope_tables(llm.cfg, order[None]), _bias(seen_VPP))
        return past


def _bias(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill_(~allowed, MASKED)


class _Decoding:
    """Greedy answers to several questions over their prefixes. A row is one not yet answered."""

    def __init__(
        self,
        llm: LanguageModel,
        past: list[KeyValue],
        asked: Sequence[tuple[int, Asked]],
        eos_id: int,
    ) -> None:
        """`asked` are questions with the number of their prefix in `past`."""
        self.llm = llm
        self.eos_id = eos_id
        self.tokens: list[list[int]] = [[] for _ in asked]
        self.rows = list(range(len(asked)))
        view_Q = torch.tensor([number for number, _ in asked])
        questions = [item for _, item in asked]
        ends_Q = torch.tensor([item.end for item in questions])
        self.past = [(k[view_Q], v[view_Q]) for k, v in past]
        num_prefix = past[0][0].shape[1]
        self.seen_QS = torch.arange(num_prefix)[None] < ends_Q[:, None]
        lengths_Q = torch.tensor([len(item.ids) for item in questions])
        ids_QL = torch.zeros(len(asked), int(lengths_Q.max()), dtype=torch.int64)
        for row, item in zip(ids_QL, questions, strict=True):
            row[: len(item.ids)] = torch.from_numpy(item.ids.astype(np.int64))
        self.next_Q = ends_Q + lengths_Q
        own = torch.arange(ids_QL.shape[1])
        causal_QLL = (own[None] <= own[:, None])[None].expand(len(asked), -1, -1)
        seen = self.seen_QS[:, None].expand(-1, len(own), -1)
        hidden = self._step(ids_QL, ends_Q[:, None] + own, torch.cat([seen, causal_QLL], -1))
        self.seen_QS = torch.cat([self.seen_QS, own[None] < lengths_Q[:, None]], -1)
        self.logits_Q = self.llm.head(hidden[torch.arange(len(asked)), lengths_Q - 1])

    def run(self, max_tokens: int) -> list[list[int]]:
        for number in range(max_tokens):
            chosen_Q = self.logits_Q.argmax(-1)
            alive = [i for i, token in enumerate(chosen_Q.tolist()) if token != self.eos_id]
            for i in alive:
                self.tokens[self.rows[i]].append(int(chosen_Q[i]))
            if not alive or number + 1 == max_tokens:
                break
            if len(alive) < len(self.rows):
                self._keep(torch.tensor(alive))
                chosen_Q = chosen_Q[alive]
            self.seen_QS = torch.cat(
                [self.seen_QS, torch.ones(len(alive), 1, dtype=torch.bool)], -1
            )
            hidden = self._step(chosen_Q[:, None], self.next_Q[:, None], self.seen_QS[:, None])
            self.next_Q = self.next_Q + 1
            self.logits_Q = self.llm.head(hidden[:, -1])
        return self.tokens

    def _keep(self, index: Tensor) -> None:
        """Goes on with some of the rows only."""
        self.rows = [self.rows[i] for i in index.tolist()]
        self.past = [(k[index], v[index]) for k, v in self.past]
        self.seen_QS, self.next_Q = self.seen_QS[index], self.next_Q[index]

    def _step(self, ids_QS: Tensor, positions_QS: Tensor, seen_QSK: Tensor) -> Tensor:
        """Hidden states of new tokens, whose keys and values join the past."""
        tables = rope_tables(self.llm.cfg, positions_QS)
        bias = _bias(seen_QSK)
        hidden, self.past = self.llm(self.llm.embed(ids_QS), *tables, bias, self.past, _attend)
        return hidden


def _attend(
    q_QSHd: Tensor, k_QShd: Tensor, v_QShd: Tensor, bias_QSK: Tensor, past: KeyValue | None
) -> tuple[Tensor, KeyValue]:
    """As `attend_past`, but what it returns is the whole past of the next call: joined once."""
    assert past is not None
    k, v = torch.cat([past[0], k_QShd], 1), torch.cat([past[1], v_QShd], 1)
    out, _ = attend_past(q_QSHd, k, v, bias_QSK, None)
    return out, (k, v)


class TorchEvaluator:
    """`edge_vlm.evaluation.Evaluator` over a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError and its leaves, BundleError for its tokenizer."""
        tokenizer = Tokenizer.from_file(folder / TOKENIZER)
        self.name = folder.resolve().name
        self._model = TorchModel(load_checkpoint(folder), PromptFormat(tokenizer))
        self.identity = sha256_of_file(folder / WEIGHTS)

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
    yield TorchEvaluator(Path(target))
