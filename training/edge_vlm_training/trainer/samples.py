"""What the model answers right now, word by word, to questions of a batch it has not trained on."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm_training.data.packing.batch import (
    IGNORED,
    NOWHERE,
    Batch,
    PackedBatch,
    PackedTokens,
)
from edge_vlm_training.objective.objective import Objective

NUM_QUESTIONS = 2


@torch.no_grad()
def sample_answers(
    objective: Objective, batch: Batch, tokenizer: Tokenizer, eos_id: int, num_tokens: int
) -> list[str]:
    """Greedy answers to the first branches of a batch, as `question | answer | wanted` lines.

    Every process makes the same number of calls, whatever its answers are, as sharded weights need.
    A batch without questions gives none.
    """
    if not isinstance(batch, PackedBatch):
        return []
    was_training = objective.training
    objective.eval()
    try:
        seen = objective.see(batch)
        tokens = batch.pruned(seen.kept_FC)
        lines = []
        for number in range(NUM_QUESTIONS):
            branch = number % len(batch.branch_kinds)
            asked, wanted = _question(tokens, branch)
            mine = seen.features_GE[_features_of(tokens, asked)]
            said: list[int] = []
            for _ in range(num_tokens):
                hidden = objective.hidden_states(asked, mine)
                best = int(objective.logits(hidden[0, -1:]).argmax())
                said.append(best)
                asked = _grown(asked, best)
            answer = said[: said.index(eos_id)] if eos_id in said else said
            wanted_ids = [t for t in wanted.tolist() if t != eos_id]
            question = asked.ids_RS[0][asked.branch_RS[0] != NOWHERE][: -num_tokens or None]
            lines.append(
                f"{batch.branch_kinds[branch]}: {_text(tokenizer, question.tolist())} | "
                f"{_text(tokenizer, answer)} | wanted {_text(tokenizer, wanted_ids)}"
            )
        return list(dict.fromkeys(lines))
    finally:
        objective.train(was_training)


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
    return " ".join(tokenizer.decode(ids).split())


def _question(tokens: PackedTokens, branch: int) -> tuple[PackedTokens, Tensor]:
    """One row [1, S]: the clip's prefix and the branch up to its first trained token, and the ids
    that should follow."""
    row = int((tokens.branch_RS == branch).any(1).nonzero()[0, 0])
    own = tokens.branch_RS[row] == branch
    clip = int(tokens.clip_RS[row][own][0])
    trained = own & (tokens.target_RS[row] != IGNORED)
    first = int(trained.nonzero()[0, 0])
    place = torch.arange(len(own), device=own.device)
    prefix = (tokens.clip_RS[row] == clip) & (tokens.branch_RS[row] == NOWHERE)
    chosen = prefix | (own & (place <= first))
    columns = {
        f.name: getattr(tokens, f.name)[row][chosen][None] for f in dataclasses.fields(tokens)
    }
    return PackedTokens(**columns), tokens.target_RS[row][trained]


def _features_of(tokens: PackedTokens, asked: PackedTokens) -> Tensor:
    """bool over all kept cells: those of the clip that is asked about."""
    patches = tokens.cell_RS != NOWHERE
    return tokens.clip_RS[patches] == asked.clip_RS[0, 0]


def _grown(tokens: PackedTokens, token_id: int) -> PackedTokens:
    """With one more token at the end of its branch."""
    columns = {}
    for field in dataclasses.fields(tokens):
        column = getattr(tokens, field.name)
        columns[field.name] = torch.cat([column, column[:, -1:]], 1)
    columns["ids_RS"][0, -1] = token_id
    for name in ("positions_RS", "offset_RS"):
        columns[name][0, -1] += 1
    return PackedTokens(**columns)
