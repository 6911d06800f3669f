"""A checkpoint that answers questions about clips, in torch: the path `torch` of `edge-vlm eval`.

Shape letters: F frames, N patches per frame, C cells per frame, G kept cells, D ViT width, P prefix
tokens, Q questions, L tokens of a question (padded), S tokens behind the prefix, V vocabulary.
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
from edge_vlm.clip_answers import Asked, Prefix, answer_clip, can_run
from edge_vlm.errors import ConfigError
from edge_vlm.evaluation import MAX_ANSWER_TOKENS, ClipAnswers, EvaluatorOptions, Run
from edge_vlm.model.checkpoint import TOKENIZER, WEIGHTS, load_checkpoint
from edge_vlm.model.layers import MASKED
from edge_vlm.model.llm import KeyValue, rope_tables
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
    def answer(
        self, prefix: Prefix, asked: Sequence[Asked], max_tokens: int = MAX_ANSWER_TOKENS
    ) -> list[str]:
        """One pass over the prefix, then all questions side by side, each with its own past."""
        past = self._prefill(prefix)
        tokens = _Decoding(self.model, past, asked, self.prompt.eos_id).run(max_tokens)
        return [self.prompt.tokenizer.decode(ids) for ids in tokens]

    def _prefill(self, prefix: Prefix) -> list[KeyValue]:
        llm = self.model.llm
        ids = torch.from_numpy(prefix.ids.astype(np.int64))
        embeds = llm.embed(ids)
        places = (ids == self.prompt.patch_id).nonzero().squeeze(1)
        embeds = embeds.index_add(0, places, torch.from_numpy(prefix.features))
        order = torch.arange(len(ids))
        block = torch.from_numpy(prefix.blocks)
        seen = order[None] <= order[:, None]
        seen |= (block[None] == block[:, None]) & (block[None] >= 0)
        tables = rope_tables(llm.cfg, order[None])
        _, past = llm(embeds[None], *tables, _bias(seen)[None])
        return past


def _bias(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill_(~allowed, MASKED)


class _Decoding:
    """Greedy answers to several questions over one prefix. A row is a question not yet answered."""

    def __init__(
        self, model: VideoLM, past: list[KeyValue], asked: Sequence[Asked], eos_id: int
    ) -> None:
        self.llm = model.llm
        self.eos_id = eos_id
        self.tokens: list[list[int]] = [[] for _ in asked]
        self.rows = list(range(len(asked)))
        ends_Q = torch.tensor([item.end for item in asked])
        self.past = [
            (k.expand(len(asked), -1, -1, -1), v.expand(len(asked), -1, -1, -1)) for k, v in past
        ]
        num_prefix = past[0][0].shape[1]
        self.seen_QS = torch.arange(num_prefix)[None] < ends_Q[:, None]
        lengths_Q = torch.tensor([len(item.ids) for item in asked])
        ids_QL = torch.zeros(len(asked), int(lengths_Q.max()), dtype=torch.int64)
        for row, item in zip(ids_QL, asked, strict=True):
            row[: len(item.ids)] = torch.from_numpy(item.ids.astype(np.int64))
        self.next_Q = ends_Q + lengths_Q
        own = torch.arange(ids_QL.shape[1])
        causal_QLL = (own[None] <= own[:, None])[None].expand(len(asked), -1, -1)
        seen = self.seen_QS[:, None].expand(-1, len(own), -1)
        hidden = self._step(ids_QL, ends_Q[:, None] + own, torch.cat([seen, causal_QLL], -1))
        self.seen_QS = torch.cat([self.seen_QS, own[None] < lengths_Q[:, None]], -1)
        self.logits_QV = self.llm.head(hidden[torch.arange(len(asked)), lengths_Q - 1])

    def run(self, max_tokens: int) -> list[list[int]]:
        for number in range(max_tokens):
            chosen_Q = self.logits_QV.argmax(-1)
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
            self.logits_QV = self.llm.head(hidden[:, -1])
        return self.tokens

    def _keep(self, index: Tensor) -> None:
        """Goes on with some of the rows only."""
        self.rows = [self.rows[i] for i in index.tolist()]
        self.past = [(k[index], v[index]) for k, v in self.past]
        self.seen_QS, self.next_Q = self.seen_QS[index], self.next_Q[index]

    def _step(self, ids_QS: Tensor, positions_QS: Tensor, seen_QSK: Tensor) -> Tensor:
        """Hidden states of new tokens, whose keys and values join the past."""
        tables = rope_tables(self.llm.cfg, positions_QS)
        hidden, new = self.llm(self.llm.embed(ids_QS), *tables, _bias(seen_QSK), self.past)
        self.past = [
            (torch.cat([k, new_k], 1), torch.cat([v, new_v], 1))
            for (k, v), (new_k, new_v) in zip(self.past, new, strict=True)
        ]
        return hidden


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
