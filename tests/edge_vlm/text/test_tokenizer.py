"""Text that comes token by token is the text of all tokens, whatever the model says."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_vlm.text.tokenizer import StreamDetokenizer, Tokenizer
from tests.preprocessing_record import PUBLISHED_4B
from tests.tiny import tiny_bundle

PUBLISHED = PUBLISHED_4B / "tokenizer.json"
VOCABULARIES = {
    "demo": lambda: tiny_bundle() / "tokenizer.json",
    "published": lambda: PUBLISHED,
}
needs_published = pytest.mark.skipif(
    not PUBLISHED.is_file(), reason="needs the published 4B folder beside the clone"
)
each_vocabulary = pytest.mark.parametrize(
    "name", ["demo", pytest.param("published", marks=needs_published)]
)


@cache
def vocabulary(name: str) -> tuple[Tokenizer, int, list[int], list[int]]:
    """With its size, its pieces that end inside a character, and its added tokens."""
    path: Path = VOCABULARIES[name]()
    tokenizer = Tokenizer.from_file(path)
    backend = tokenizer._backend
    size = backend.get_vocab_size()
    pieces = [number for number in range(size) if "\ufffd" in tokenizer.decode([number])]
    return tokenizer, size, pieces, sorted(backend.get_added_tokens_decoder())


@each_vocabulary
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_pieces_of_a_stream_are_the_decoded_whole(name: str, data: st.DataObject) -> None:
    """Any ids: broken UTF-8, special tokens inside a character, ids that stand for nothing."""
    tokenizer, size, pieces, added = vocabulary(name)
    one = st.integers(0, size - 1) | st.sampled_from(added)
    if pieces:
        one |= st.sampled_from(pieces)
    ids = data.draw(st.lists(one, max_size=40))
    stream = StreamDetokenizer(tokenizer)
    deltas = [stream.push(number) for number in ids]
    assert "".join([*deltas, stream.flush()]) == tokenizer.decode(ids)
    assert stream.flush() == ""
    for count in range(len(ids) + 1):  # nothing is returned too early
        so_far = "".join(deltas[:count])
        assert tokenizer.decode(ids[:count]).startswith(so_far)


@needs_published
@pytest.mark.parametrize(
    "text",
    [
        "\U0001f468\u200d\U0001f469\u200d\U0001f467 caf\u00e9",
        "\u732b\u3068\u72ac",
        "\u0928\u092e\u0938\u094d\u0924\u0947",
    ],
)
def test_no_half_character_is_ever_shown(text: str) -> None:
    tokenizer, _, pieces, _ = vocabulary("published")
    ids = tokenizer.encode(text)
    assert set(ids) & set(pieces) or "caf" not in text
    stream = StreamDetokenizer(tokenizer)
    deltas = [stream.push(number) for number in ids]
    assert not any("\ufffd" in delta for delta in deltas)
    assert "".join(deltas) == text
    assert stream.flush() == ""


def test_an_incomplete_character_comes_with_the_end() -> None:
    if not PUBLISHED.is_file():
        pytest.skip("needs the published 4B folder beside the clone")
    tokenizer, _, pieces, _ = vocabulary("published")
    stream = StreamDetokenizer(tokenizer)
    assert stream.push(pieces[0]) == ""
    assert stream.flush() == tokenizer.decode([pieces[0]])


@each_vocabulary
def test_a_token_costs_the_same_however_long_the_answer_is(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, not timed: the whole is decoded once, at the end."""
    tokenizer, size, _, _ = vocabulary(name)
    decoded: list[int] = []
    whole = Tokenizer.decode

    def decode(self: Tokenizer, ids: list[int]) -> str:
        decoded.append(len(ids))
        return whole(self, ids)

    monkeypatch.setattr(Tokenizer, "decode", decode)
    stream = StreamDetokenizer(tokenizer)
    for number in range(500):
        stream.push(number % size)
    assert decoded == []
    stream.flush()
    assert decoded == [500]
