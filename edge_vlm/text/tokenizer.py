"""Text to token ids and back, through a `tokenizer.json` of the `tokenizers` library."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_vlm.errors import BundleError, MissingExtraError

if TYPE_CHECKING:
    import tokenizers


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise MissingExtraError.for_library("tokenizers", "serve") from error
    return tokenizers


def _byte_of_character() -> dict[str, int]:
    """How byte-level vocabularies write bytes: those that can be seen as themselves, the others
    from U+0100 on (Radford et al. 2019, GPT-2)."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }


MOST_IDS = 1 << 21
"""Ids above these are no vocabulary's; tables by id would fill the memory."""
_BYTE_OF = _byte_of_character()


PIECE = 1000
"""Characters that are looked at one after the other."""
TOKENS_PER_CUT = 32
"""Of a piece, that may be there only because it was cut off."""


class Tokenizer:
    """The published Molmo2 vocabulary or a small one of our own: both are the same file format."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder().values()
        special = sorted((token.content for token in added if token.special), key=len, reverse=True)
        for content in special:  # `plain` would break one character up for ever
            if len(content) < 2:
                raise ValueError(f"the special token {content!r} is shorter than two characters")
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Raises MissingExtraError without the library, BundleError on a file it cannot read."""
        library = _tokenizers()
        try:
            return cls(library.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception on any bad file
            raise BundleError(
                f"not a readable tokenizer.json ({error})",
                where=path,
                remedy="copy the file anew or export the bundle again",
            ) from error

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, special tokens in it recognised, nothing added."""
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # as above: a vocabulary that cannot write every text
            raise BundleError(
                f"the vocabulary cannot write {text[:80]!r}: {error}",
                remedy="take the tokenizer.json that belongs to the weights",
            ) from error

        return self._known(ids)

    def _known(self, ids: list[int]) -> list[int]:
        """Raises BundleError for ids that no table has."""
        if max(ids, default=0) > MOST_IDS:
            raise BundleError(
                f"the vocabulary has the id {max(ids)}",
                remedy="take the tokenizer.json that belongs to the weights",
            )
        return ids

    def has_more(self, text: str, most: int) -> bool:
        """Whether a part of `text` shows that it has more than `most` tokens: one that is much too
        long is not read to its end. False may be said of any other."""
        found = 0
        for start in range(0, len(text), PIECE):
            found += len(self.encode(text[start : start + PIECE])) - TOKENS_PER_CUT
            if found > 2 * most:
                return True
        return False

    def plain(self, text: str) -> str:
        """`text` without special tokens: a zero-width space breaks each up.

        What a person writes must neither end a turn nor stand for a picture. Other text is
        returned as it is.
        """
        while self._special.search(text):  # parts of one may be joined to another
            text = self._special.sub(lambda found: f"{found[0][0]}\u200b{found[0][1:]}", text)
        return text

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without special tokens."""
        return self._backend.decode(ids, skip_special_tokens=True)

    def token_bytes(self) -> list[bytes]:
        """What each id stands for in an answer, by id; b"" where it stands for nothing, as special
        tokens do. Raises ValueError for a decoder that is not known here."""
        kind = type(self._backend.decoder).__name__
        if kind not in ("ByteLevel", "Fuse", "NoneType"):
            raise ValueError(f"the bytes of a {kind} vocabulary are not known")
        added = self._backend.get_added_tokens_decoder()
        texts = [b""] * self._backend.get_vocab_size(with_added_tokens=True)
        for token, token_id in self._backend.get_vocab(with_added_tokens=True).items():
            if token_id > MOST_IDS:
                raise ValueError(f"the token {token[:80]!r} has the id {token_id}")
            if token_id >= len(texts):
                texts.extend([b""] * (token_id + 1 - len(texts)))
            if token_id in added:
                if not added[token_id].special:
                    texts[token_id] = token.encode()
            elif kind == "ByteLevel":
                texts[token_id] = bytes(_BYTE_OF[character] for character in token)
            else:
                texts[token_id] = token.encode()
        unknown = getattr(self._backend.model, "unk_token", None)
        if unknown is not None and (place := self._backend.token_to_id(unknown)) is not None:
            texts[place] = b""
        return texts

    def id_of(self, token: str) -> int:
        """Raises KeyError for a token that the vocabulary lacks, BundleError as `encode`."""
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise KeyError(f"the vocabulary has no token {token!r}")
        return self._known([token_id])[0]


class StreamDetokenizer:
    """Turns ids into text as they come, holding back text that a later token may still change.

    A byte-level token can end inside a UTF-8 character; what is returned never has to be taken
    back. All that was returned, with what `flush` returns, is `Tokenizer.decode` of the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = _tokenizers().decoders.DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._num_sent = 0
        """Characters."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""
        self._ids.append(token_id)
        delta: str = self._stream.step(self._tokenizer._backend, token_id) or ""
        self._num_sent += len(delta)
        return delta

    def flush(self) -> str:
        """What is left, an incomplete character included."""
        delta = self._tokenizer.decode(self._ids)[self._num_sent :]
        self._num_sent += len(delta)
        return delta
