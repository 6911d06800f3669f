"""A packed question sees exactly what a live session would see at that moment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edge_vlm.config import VisionAttention, tiny
from edge_vlm.model.llm import LanguageModel, rope_tables
from edge_vlm.text.masks import MASKED
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm_training.data.prefix_packing import Branch, Packer
from edge_vlm_training.world.vocabulary import build_tokenizer

TURN = ("is it red?", "no")
BRANCHES = [
    Branch(0, "what is it?", "cat"),
    Branch(2, "is it red?", "it is red", (TURN,)),
    Branch(1, "what is it?", "red cat"),
]
COUNTS = np.array([[4, 0, 3], [2, 3, 2]])
TIMES = np.array([[0.0, 0.5, 1.0], [12.5, 13.0, 13.5]])


@pytest.fixture(scope="module")
def packer(tmp_path_factory: pytest.TempPathFactory) -> Packer:
    path: Path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    texts = [t for b in BRANCHES for t in (b.question, b.answer)]
    build_tokenizer(texts, path)
    return Packer(PromptFormat(Tokenizer.from_file(path)))


@pytest.fixture(scope="module")
def llm() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(tiny(base_vocab=60, extra_vocab=8).language).eval()


@torch.no_grad()
def alone(llm: LanguageModel, packer: Packer, clip: int, branch: Branch) -> torch.Tensor:
    """Logits of the answer's tokens when the question stands alone behind its frames."""
    prompt = packer.prompt
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
    return llm.head(hidden[0, -len(answer) :])


@torch.no_grad()
def test_packed_question_equals_the_question_alone(llm: LanguageModel, packer: Packer) -> None:
    packed = packer.pack(COUNTS, TIMES, [BRANCHES, BRANCHES[::-1]])
    positions = torch.arange(packed.ids_BP.shape[1])[None]
    embeds = llm.embed(packed.ids_BP)
    _, video = llm(embeds, *rope_tables(llm.cfg, positions), packed.bias_BPP)
    asked = [(0, b) for b in BRANCHES] + [(1, b) for b in BRANCHES[::-1]]
    met = set()
    for bucket in packed.buckets:
        past = [(k[bucket.clip_N], v[bucket.clip_N]) for k, v in video]
        tables = rope_tables(llm.cfg, bucket.positions_NL)
        hidden, _ = llm(llm.embed(bucket.ids_NL), *tables, bucket.bias_NLK, past)
        logits = llm.head(hidden.flatten(0, 1)[bucket.answer_index_A])
        for number in set(bucket.question_A.tolist()):
            clip, branch = asked[number]
            mine = bucket.question_A == number
            expected = alone(llm, packer, clip, branch)
            torch.testing.assert_close(logits[mine], expected, atol=1e-4, rtol=1e-4)
            answer = packer.prompt.answer_ids(branch.answer)
            assert bucket.target_A[mine].tolist() == answer.tolist()
            met.add(number)
    assert met == set(range(packed.num_questions)) == set(range(len(asked)))


def test_with_all_attention_vision_tokens_see_later_frames_and_text_does_not(
    packer: Packer,
) -> None:
    everywhere = Packer(packer.prompt, VisionAttention.ALL)
    packed = everywhere.pack(COUNTS, TIMES, [BRANCHES, BRANCHES])
    for ids, bias in zip(packed.ids_BP, packed.bias_BPP, strict=True):
        vision = torch.from_numpy(packer.prompt.vision_mask(ids.numpy()))
        assert (bias[vision][:, vision] == 0).all()
        later = torch.arange(len(ids))[None] > torch.arange(len(ids))[:, None]
        assert (bias[~vision][later[~vision]] < -1e3).all()


def test_patch_tokens_stand_for_the_kept_cells(packer: Packer) -> None:
    packed = packer.pack(COUNTS, TIMES, [BRANCHES, BRANCHES])
    patches = (packed.ids_BP == packer.prompt.patch_id).sum(1)
    assert patches.tolist() == COUNTS.sum(1).tolist()
