"""Text to token ids and back, through a `tokenizer.json` of the `tokenizers` library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edge_vlm.errors import BundleError, MissingExtraError

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """The published Molmo2 vocabulary or a small one of our own: both are the same file format."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Raises MissingExtraError without the library, BundleError on a file it cannot read."""
        try:
            import tokenizers
        except ImportError as error:
            raise MissingExtraError.for_library("tokenizers", "ort") from error
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception on any bad file
            raise BundleError(
                f"not a readable tokenizer.json ({error})",
                where=path,
                remedy="copy the file anew or export the bundle again",
            ) from error

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, special tokens in it recognised, nothing added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without special tokens."""
        return self._backend.decode(ids, skip_special_tokens=True)

    def id_of(self, token: str) -> int:
        """Raises KeyError for a token that the vocabulary lacks."""
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise KeyError(f"the vocabulary has no token {token!r}")
        return token_id


class StreamDetokenizer:
    """Turns ids into text as they come, holding back text that a later token may still change.

    A byte-level token can end inside a UTF-8 character; what is returned never has to be taken
    back.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._sent = ""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        delta, self._sent = text[len(self._sent) :], text
        return delta

    def flush(self) -> str:
        """What is left, an incomplete character included."""
        text = self._tokenizer.decode(self._ids)
        delta, self._sent = text[len(self._sent) :], text
        return delta
