"""Answers in torch: side by side and cached = each alone, from the beginning, for every token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from edge_vlm.config import VisionAttention
from edge_vlm.evaluation.offline import Asked, Prefix
from edge_vlm.model.checkpoint import load_checkpoint
from edge_vlm.model.evaluator import TorchModel
from edge_vlm.model.llm import rope_tables
from edge_vlm.text.masks import CAUSAL, MASKED
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from tests.tiny import tiny_checkpoint

QUESTIONS = ("is there a red ball ?", "what colour is the cube ?", "how many cars are there now ?")
FRAMES = 4


@pytest.fixture(scope="module")
def model() -> TorchModel:
    """Random weights, larger than usual: what is said depends on all that came before."""
    tokenizer = Tokenizer.from_file(tiny_checkpoint() / "tokenizer.json")
    weights = load_checkpoint(tiny_checkpoint())
    with torch.no_grad():
        for parameter in weights.llm.blocks.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return TorchModel(weights, PromptFormat(tokenizer))


@pytest.fixture(scope="module")
def rgbs() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (40, 60, 3), dtype=np.uint8) for _ in range(FRAMES)]


def prefix_of(
    model: TorchModel, rgbs: Sequence[np.ndarray], attention: VisionAttention
) -> tuple[Prefix, list[int]]:
    """Of frames that keep fewer and fewer cells."""
    num_cells = model.config.vision.num_cells
    model.look(rgbs)
    kept = [np.arange(num_cells - i, dtype=np.int32) for i in range(len(rgbs))]
    features = model.features(kept)
    ids, blocks, ends = [model.prompt.bos_ids], [np.array([CAUSAL])], []
    for i in range(len(rgbs)):
        ids.append(model.prompt.frame_ids(i / 2, num_cells - i, i == 0))
        block = 0 if attention is VisionAttention.ALL else i
        blocks.append(np.where(model.prompt.vision_mask(ids[-1]), block, CAUSAL))
        ends.append(sum(map(len, ids)))
    return Prefix(np.concatenate(ids), np.concatenate(features), np.concatenate(blocks)), ends


@torch.inference_mode()
def alone(model: TorchModel, prefix: Prefix, asked: Asked, most: int) -> str:
    """Everything anew for every token, one position after the other: no cache, no padding."""
    llm = model.model.llm
    ids, blocks = list(prefix.ids[: asked.end]), list(prefix.blocks[: asked.end])
    ids += asked.ids.tolist()
    blocks += [CAUSAL] * len(asked.ids)
    said: list[int] = []
    while len(said) < most:
        embeds = llm.embed(torch.tensor(ids))
        places = [i for i, token in enumerate(ids) if token == model.prompt.patch_id]
        for i, feature in zip(places, prefix.features, strict=False):
            embeds[i] += torch.from_numpy(feature)
        bias = torch.full((len(ids), len(ids)), MASKED)
        for row, own in enumerate(blocks):
            for column, other in enumerate(blocks):
                if column <= row or (own == other != CAUSAL):
                    bias[row, column] = 0
        tables = rope_tables(llm.cfg, torch.arange(len(ids))[None])
        hidden, _ = llm(embeds[None], *tables, bias[None])
        token = int(llm.head(hidden[0, -1]).argmax())
        if token == model.prompt.eos_id:
            break
        said.append(token)
        ids.append(token)
        blocks.append(CAUSAL)
    return model.prompt.tokenizer.decode(said)


@pytest.mark.parametrize("attention", VisionAttention)
def test_answers_side_by_side_are_those_of_each_alone(
    model: TorchModel, rgbs: list[np.ndarray], attention: VisionAttention
) -> None:
    prefix, ends = prefix_of(model, rgbs, attention)
    moments = [ends[-1]] * 3 if attention is VisionAttention.ALL else [ends[0], ends[3], ends[2]]
    asked = [
        Asked(end, model.prompt.question_ids(text))
        for end, text in zip(moments, QUESTIONS, strict=True)
    ]
    (told,) = model.answer([(prefix, asked)], 6)
    assert told == [alone(model, prefix, item, 6) for item in asked]
    assert len(set(told)) > 1  # else nothing could be told apart


def test_prefixes_of_other_lengths_do_not_matter(model: TorchModel, rgbs: list[np.ndarray]) -> None:
    """As with `ALL` attention, where every moment has a prefix of its own."""
    views = []
    for num_frames in (2, 4, 1):
        prefix, ends = prefix_of(model, rgbs[:num_frames], VisionAttention.ALL)
        views.append((prefix, [Asked(ends[-1], model.prompt.question_ids(q)) for q in QUESTIONS]))
    told = model.answer(views, 5)
    assert told == [[alone(model, prefix, item, 5) for item in asked] for prefix, asked in views]


def test_rows_that_have_ended_leave_the_others_alone(
    model: TorchModel, rgbs: list[np.ndarray]
) -> None:
    """The end token is whatever the first question's second token is."""
    prefix, ends = prefix_of(model, rgbs, VisionAttention.FRAME)
    asked = [Asked(end, model.prompt.question_ids(QUESTIONS[0])) for end in ends]
    eos_ids = model.prompt.eos_ids
    words = [model.prompt.tokenizer.encode(text) for text in model.answer([(prefix, asked)], 4)[0]]
    try:
        model.prompt.eos_ids = (words[0][1],)
        (told,) = model.answer([(prefix, asked)], 4)
        assert told == [alone(model, prefix, item, 4) for item in asked]
    finally:
        model.prompt.eos_ids = eos_ids


def test_features_are_those_of_each_frame_alone(model: TorchModel, rgbs: list[np.ndarray]) -> None:
    cells = [np.array(kept, np.int32) for kept in ([0, 3, 8], [], [1], [2, 4])]
    model.look(rgbs)
    features = model.features(cells)
    assert [len(part) for part in features] == [3, 0, 1, 2]
    none = np.empty(0, np.int32)
    for i, chosen in enumerate(cells):
        lonely = model.features([chosen if i == j else none for j in range(FRAMES)])
        np.testing.assert_allclose(features[i], lonely[i], atol=1e-5)


def test_a_clip_forgets_the_one_before(model: TorchModel, rgbs: list[np.ndarray]) -> None:
    first = model.look(rgbs)
    model.look(rgbs[::-1])
    np.testing.assert_array_equal(model.look(rgbs), first)
