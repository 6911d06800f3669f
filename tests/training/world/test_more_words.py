"""A larger vocabulary: known words keep their weights, wherever their numbers move to."""

from __future__ import annotations

import pytest
import torch

from edge_vlm_training.world.more_words import with_more_words

KNOWN = {"a": 0, "c": 1, "<x>": 2}
WANTED = {"a": 0, "b": 1, "c": 2, "<x>": 3}


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 4, generator=generator)
    return {
        "llm.embed.weight": rows,
        "llm.head.weight": rows[:2] + 10,
        "llm.norm.weight": rows[0],
    }


def test_known_words_keep_their_rows_and_all_else_stays() -> None:
    old = weights()
    new = with_more_words(old, KNOWN, WANTED, head_rows=3)
    for word, row in KNOWN.items():
        assert torch.equal(new["llm.embed.weight"][WANTED[word]], old["llm.embed.weight"][row])
    assert torch.equal(new["llm.head.weight"][[0, 2]], old["llm.head.weight"])
    assert new["llm.head.weight"].shape == (3, 4)
    assert new["llm.embed.weight"].shape == (4, 4)
    assert new["llm.norm.weight"] is old["llm.norm.weight"]


def test_new_words_begin_among_the_others_but_differ() -> None:
    new = with_more_words(weights(), KNOWN, WANTED, head_rows=3)["llm.head.weight"]
    assert 7 < new[1].mean() < 13
    assert not torch.equal(new[1], new[0])
    assert not torch.equal(new[1], new[2])


def test_the_same_vocabulary_changes_nothing() -> None:
    old = weights()
    new = with_more_words(old, KNOWN, KNOWN, head_rows=2)
    assert all(torch.equal(new[name], old[name]) for name in old)


def test_a_word_that_is_gone_is_named() -> None:
    with pytest.raises(ValueError, match="lacks 'c'"):
        with_more_words(weights(), KNOWN, {"a": 0, "<x>": 1}, head_rows=1)
