"""Footage through the vision side, and what the language model then reads: prefixes with questions
and the model's own answers, side by side after the frames they are about.

Shape letters: F frames, S tokens, E language width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edge_vlm.config import ModelConfig, VisionAttention
from edge_vlm.evaluation.offline import Asked, Prefix, choose
from edge_vlm.evaluation.runs import Run
from edge_vlm.formats.qa_set import INDEX, read_question_set
from edge_vlm.model.evaluator import TorchModel
from edge_vlm.pixels.frames import Rgb, decode_jpeg
from edge_vlm.pruning.clip_budget import variant_of
from edge_vlm.text.masks import CAUSAL
from edge_vlm_calibration.footage import shots

PIECE_FRAMES = 16
"""Frames of a video that are read together."""
MOST_QUESTIONS = 16
"""Of one piece: enough to see how questions and answers look to the model."""
ANSWER_TOKENS = 24
QUESTIONS = (
    "What is there now?",
    "Describe the video.",
    "How many things are there now?",
    "What changed?",
)
"""For models whose card names none."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Consecutive pictures that are read together, and questions after some of them."""

    rgbs: Sequence[Rgb]
    times_s: Sequence[float]
    questions: Sequence[tuple[int, str]]
    """The number of the newest picture that each sees, and its text."""


@dataclass(frozen=True, eq=False)
class Reading:
    """One run of the language model over a piece."""

    embeds_SE: Tensor
    positions_S: Tensor
    visible_SS: Tensor
    """bool: who sees whom."""
    answered_from: int
    """The first token of a question or an answer: from there on logits are read."""


def pieces_of(path: Path, fps: float, max_frames: int, questions: Sequence[str]) -> Iterator[Piece]:
    """A question set is asked its own questions, a video `questions` after each piece's last
    picture. Raises as `shots`."""
    if (path / INDEX).is_file():
        left = max_frames
        for clip in read_question_set(path):
            if left <= 0:
                return
            jpegs = clip.jpegs[:left]
            left -= len(jpegs)
            asked = [(q.frame, q.text) for q in clip.questions if q.frame < len(jpegs)]
            yield Piece([decode_jpeg(jpeg) for jpeg in jpegs], clip.times_s, asked[:MOST_QUESTIONS])
        return
    rgbs: list[Rgb] = []
    for is_first, rgb in shots(path, fps, max_frames):
        if rgbs and (is_first or len(rgbs) == PIECE_FRAMES):
            yield _video_piece(rgbs, fps, questions)
            rgbs = []
        rgbs.append(rgb)
    yield _video_piece(rgbs, fps, questions)


def _video_piece(rgbs: list[Rgb], fps: float, questions: Sequence[str]) -> Piece:
    asked = [(len(rgbs) - 1, text) for text in questions[:MOST_QUESTIONS]]
    return Piece(rgbs, [i / fps for i in range(len(rgbs))], asked)


def run_of(config: ModelConfig, keep_ratio: float) -> Run:
    """How cells are chosen: as a stream would, or all of them without scores."""
    policy, ratio = ("stream", keep_ratio) if config.has_scores else ("keep_all", 1.0)
    return Run(policy=policy, keep_ratio=ratio, attention=config.attention)


@torch.inference_mode()
def read(model: TorchModel, piece: Piece, run: Run) -> Reading:
    """Runs the vision side over the piece and asks its questions. Frames that the model has no
    room for are left out, and with them the questions about them."""
    scored = None if model.config.change is None else model.scored
    scores = model.look(piece.rgbs)
    cells = choose(run, scores, piece.rgbs, 0, variant_of(model.config), scored)
    shown = [np.empty(0, np.int32) if chosen is None else chosen for chosen in cells]
    prefix, ends = _prefix(model, piece.times_s, model.features(shown))
    asked = [
        Asked(ends[frame], model.prompt.question_ids(text))
        for frame, text in piece.questions
        if frame < len(ends)
    ]
    (answers,) = model.answer([(prefix, asked)], ANSWER_TOKENS) if asked else ([],)
    branches = [
        np.concatenate([question.ids, model.prompt.answer_ids(answer)])
        for question, answer in zip(asked, answers, strict=True)
    ]
    return _joined(model, prefix, [item.end for item in asked], branches)


def _prefix(
    model: TorchModel, times_s: Sequence[float], features: Sequence[np.ndarray]
) -> tuple[Prefix, list[int]]:
    """Of the first frames, as many as there is room for; where each of them ends."""
    prompt = model.prompt
    ids, blocks = [prompt.bos_ids], [np.full(len(prompt.bos_ids), CAUSAL, np.int64)]
    ends: list[int] = []
    length = len(prompt.bos_ids)
    for i, found in enumerate(features):
        segment = prompt.frame_ids(times_s[i] - times_s[0], len(found), first=i == 0)
        length += len(segment)
        if length > model.max_prefix_tokens:
            break
        block = 0 if model.config.attention is VisionAttention.ALL else i
        ids.append(segment)
        blocks.append(np.where(prompt.vision_mask(segment), block, CAUSAL))
        ends.append(length)
    joined = np.concatenate(features[: len(ends)])
    return Prefix(np.concatenate(ids), joined, np.concatenate(blocks)), ends


def _joined(
    model: TorchModel, prefix: Prefix, ends: Sequence[int], branches: Sequence[np.ndarray]
) -> Reading:
    p, llm = len(prefix.ids), model.model.llm
    ids = torch.from_numpy(np.concatenate([prefix.ids, *branches]).astype(np.int64))
    embeds: Tensor = llm.embed(ids).float()
    places = (ids[:p] == model.prompt.patch_id).nonzero().squeeze(1)
    embeds = embeds.index_add(0, places, torch.from_numpy(prefix.features))
    order = torch.arange(len(ids))
    block = torch.from_numpy(prefix.blocks)
    visible = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    together = (block[:, None] == block) & (block >= 0)[:, None]
    visible[:p, :p] = (order[:p] <= order[:p, None]) | together
    positions, start = order.clone(), p
    for end, branch in zip(ends, branches, strict=True):
        rows = slice(start, start + len(branch))
        visible[rows, :end] = True
        visible[rows, rows] = torch.ones(len(branch), len(branch), dtype=torch.bool).tril()
        positions[rows] = end + torch.arange(len(branch))
        start += len(branch)
    return Reading(embeds, positions, visible, p)
