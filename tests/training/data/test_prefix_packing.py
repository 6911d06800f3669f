"""A packed question sees exactly what a live session would see at that moment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edge_vlm.config import VisionAttention
from edge_vlm.model.llm import LanguageModel, rope_tables
from edge_vlm.presets import tiny
from edge_vlm.text.masks import MASKED
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm_training.data.packing.assemble import assemble
from edge_vlm_training.data.packing.batch import IGNORED
from edge_vlm_training.data.packing.budget import CellBudget
from edge_vlm_training.data.packing.prefix import PrefixTokens, as_prefixes
from edge_vlm_training.data.packing.trees import TokenWeights, TreeBuilder
from edge_vlm_training.data.sample import Branch, Sample
from edge_vlm_training.world.vocabulary import build_tokenizer

TURN = ("is it red?", "no")
BRANCHES = [
    Branch(kind="name", frame=0, question="what is it?", answer="cat"),
    Branch(kind="qa", frame=2, question="is it red?", answer="it is red", history=(TURN,)),
    Branch(kind="name", frame=1, question="what is it?", answer="red cat"),
]
COUNTS = np.array([[4, 0, 3], [2, 3, 2]])
TIMES = np.array([[0.0, 0.5, 1.0], [12.5, 13.0, 13.5]])


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> PromptFormat:
    path: Path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    texts = [*TURN, *(t for b in BRANCHES for t in (b.question, b.answer))]
    build_tokenizer(texts, path)
    return PromptFormat(Tokenizer.from_file(path))


def packed(
    prompt: PromptFormat, attention: VisionAttention, *branches: list[Branch]
) -> PrefixTokens:
    """The prefix form of two clips of three frames with `COUNTS` cells kept."""
    kept = torch.arange(tiny().vision.num_cells) < torch.from_numpy(COUNTS.reshape(-1, 1))
    builder = TreeBuilder(prompt, VisionAttention.FRAME)
    pictures = np.zeros((3, 8, 8, 3), np.uint8)
    samples = [
        Sample(name=str(i), times_s=TIMES[i], branches=tuple(asked), load=lambda _: pictures)
        for i, asked in enumerate(branches)
    ]
    trees = [builder.build(sample) for sample in samples]
    budget = CellBudget(cfg=tiny(), keep_ratio=0.5, min_cells=0)
    # Both clips in one row.
    batch = assemble([trees], [pictures] * 2, prompt, TokenWeights(), budget)
    assert batch.branch_kinds == tuple(b.kind for asked in branches for b in asked)
    return as_prefixes(batch.pruned(kept), attention, torch.float32)


@pytest.fixture(scope="module")
def llm() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(tiny(base_vocab=60, extra_vocab=8).language).eval()


@torch.no_grad()
def alone(llm: LanguageModel, prompt: PromptFormat, clip: int, branch: Branch) -> torch.Tensor:
    """Logits of the answer's tokens when the question stands alone after its frames."""
    frames = [
        prompt.frame_ids(float(TIMES[clip, i]), int(COUNTS[clip, i]), i == 0)
        for i in range(branch.frame + 1)
    ]
    blocks = [np.where(prompt.vision_mask(ids), i, -1) for i, ids in enumerate(frames)]
    answer = prompt.answer_ids(branch.answer)
    turns = [prompt.turn_ids(*turn) for turn in branch.history]
    text = [*turns, prompt.question_ids(branch.question), answer[:-1]]
    ids = torch.from_numpy(np.concatenate([prompt.bos_ids, *frames, *text])).long()
    block = np.concatenate([[-1], *blocks, *[np.full(len(t), -1) for t in text]])
    index = np.arange(len(ids))
    allowed = index[None] <= index[:, None]
    allowed |= (block[:, None] == block[None]) & (block[:, None] >= 0)
    bias = torch.from_numpy(np.where(allowed, 0.0, MASKED)).float()[None]
    cos, sin = rope_tables(llm.cfg, torch.from_numpy(index)[None])
    hidden, _ = llm(llm.embed(ids)[None], cos, sin, bias)
    logits: torch.Tensor = llm.head(hidden[0, -len(answer) :])
    return logits


@torch.no_grad()
def test_packed_question_equals_the_question_alone(
    llm: LanguageModel, prompt: PromptFormat
) -> None:
    tokens = packed(prompt, VisionAttention.FRAME, BRANCHES, BRANCHES[::-1])
    prefix = tokens.prefix
    embeds = llm.embed(prefix.ids_RS)
    _, video = llm(embeds, *rope_tables(llm.cfg, prefix.positions_RS), tokens.bias_BPP)
    asked = [(0, b) for b in BRANCHES] + [(1, b) for b in BRANCHES[::-1]]
    met = set()
    for bucket in tokens.buckets:
        past = [(k[bucket.clip_N], v[bucket.clip_N]) for k, v in video]
        tables = rope_tables(llm.cfg, bucket.tokens.positions_RS)
        hidden, _ = llm(llm.embed(bucket.tokens.ids_RS), *tables, bucket.bias_NLK, past)
        trained = bucket.tokens.target_RS != IGNORED
        logits, targets = llm.head(hidden[trained]), bucket.tokens.target_RS[trained]
        for number in set(bucket.tokens.branch_RS[trained].tolist()):
            clip, branch = asked[number]
            mine = bucket.tokens.branch_RS[trained] == number
            expected = alone(llm, prompt, clip, branch)
            torch.testing.assert_close(logits[mine], expected, atol=1e-4, rtol=1e-4)
            answer = prompt.answer_ids(branch.answer)
            assert targets[mine].tolist() == answer.tolist()
            met.add(number)
    assert met == set(range(len(asked)))


def test_with_all_attention_vision_tokens_see_later_frames_and_text_does_not(
    prompt: PromptFormat,
) -> None:
    tokens = packed(prompt, VisionAttention.ALL, BRANCHES, BRANCHES)
    for ids, bias in zip(tokens.prefix.ids_RS, tokens.bias_BPP, strict=True):
        vision = torch.from_numpy(prompt.vision_mask(ids.numpy()))
        assert (bias[vision][:, vision] == 0).all()
        later = torch.arange(len(ids))[None] > torch.arange(len(ids))[:, None]
        assert (bias[~vision][later[~vision]] < -1e3).all()


def test_patch_tokens_stand_for_the_kept_cells_and_ends_for_frames(prompt: PromptFormat) -> None:
    tokens = packed(prompt, VisionAttention.FRAME, BRANCHES, BRANCHES).prefix
    patches = (tokens.ids_RS == prompt.patch_id).sum(1)
    assert patches.tolist() == COUNTS.sum(1).tolist()
    marker = int(prompt.frame_ids(0.0, 0, True)[-1])
    assert tokens.ids_RS.flatten()[tokens.frame_ends(6)].tolist() == [marker] * 6
