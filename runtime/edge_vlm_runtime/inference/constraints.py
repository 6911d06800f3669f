"""Answers that must have a form: one of some texts, or JSON of a schema.

Before each token is chosen, those that the form does not allow are taken out of the logits. The
grammars are those of llguidance (https://github.com/guidance-ai/llguidance), imported only here.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import MissingExtraError
from edge_vlm.errors.requests import AnswerFormError
from edge_vlm.json_text import MALFORMED
from edge_vlm.text.tokenizer import Tokenizer

MAX_KEPT = 32
"""Grammars that stay compiled."""
MAX_FORM = 1 << 18
"""Characters of a form: a few times what OpenAI allows, and compiled within a second."""
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""Without room for a model to go on in white space for ever."""


def _llguidance() -> Any:
    try:
        import llguidance
        import llguidance.numpy
    except ImportError as error:
        raise MissingExtraError.for_library("llguidance", "serve") from error
    return llguidance


def choice_grammar(choices: Sequence[str]) -> str:
    """One of these texts, perhaps behind a space: in many vocabularies words begin with one.

    Raises AnswerFormError, MissingExtraError."""
    if not choices or not all(choices):
        raise AnswerFormError("a choice is of one or more texts, none of them empty")
    texts = " | ".join(json.dumps(text) for text in choices)
    _require_short(texts)
    return str(_llguidance().LLMatcher.grammar_from_lark(f'start: " "? ({texts})'))


def schema_grammar(schema: Any) -> str:
    """JSON of a schema, a dictionary. Raises AnswerFormError, MissingExtraError."""
    try:
        grammar = str(_llguidance().LLMatcher.grammar_from_json_schema(schema, defaults=JSON_STYLE))
    except ValueError as error:
        raise AnswerFormError(f"not a JSON schema: {error}") from error
    _require_short(grammar)
    return grammar


def _require_short(form: str) -> None:
    if len(form) > MAX_FORM:
        raise AnswerFormError(f"a form of {len(form)} characters", remedy=f"{MAX_FORM} are allowed")


def _told(error: str) -> str:
    """Without the state of the library, which comes after its words."""
    return error.partition("<state>")[0].strip()


class Matcher:
    """Follows one answer."""

    def __init__(
        self, library: Any, matcher: Any, num_tokens: int, never: npt.NDArray[np.intp]
    ) -> None:
        """`never`: ids that stand for no text and no end. A vocabulary that cannot write a form is
        offered its word for the unknown."""
        self._matcher = matcher
        self._never = never
        self._bits = np.full((1, (num_tokens + 31) // 32), -1, np.int32)
        self._fill = library.numpy.fill_next_token_bitmask

    def mask(self, logits: np.ndarray) -> None:
        """What may not come next gets -inf, in place. Raises AnswerFormError when the vocabulary
        has nothing that may."""
        self._fill(self._matcher, self._bits)
        self._require()
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: len(logits)]
        logits[np.flatnonzero(allowed == 0)] = -np.inf
        logits[len(allowed) :] = -np.inf
        logits[self._never] = -np.inf
        if not np.isfinite(logits).any():
            raise _cannot_write()

    def take(self, token: int) -> None:
        """The token that was chosen."""
        self._matcher.consume_token(token)
        self._require()

    @property
    def is_complete(self) -> bool:
        """Nothing but an end may come."""
        return bool(self._matcher.is_stopped())

    def _require(self) -> None:
        if self._matcher.is_error():
            raise AnswerFormError(
                f"the form cannot be followed: {_told(self._matcher.get_error())}"
            )


class Constraints:
    """Compiles forms for one vocabulary. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Collection[int], num_tokens: int) -> None:
        """`num_tokens`: length of the logits."""
        self._tokenizer = tokenizer
        self._eos_ids = list(eos_ids)
        self._num_tokens = num_tokens
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._never = np.zeros(0, np.intp)
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def matcher(self, grammar: str) -> Matcher:
        """A new one, of what `choice_grammar` or `schema_grammar` returned. The first one of a
        vocabulary takes up to a second, that of a grammar a moment. Raises AnswerFormError,
        MissingExtraError."""
        library = _llguidance()
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is None:
                compiled = library.LLMatcher(self._tokens(library), grammar, log_level=0)
                if compiled.is_error():
                    raise AnswerFormError(
                        f"the form cannot be followed: {_told(compiled.get_error())}",
                        remedy="see 'Structured answers' in docs/api.md",
                    )
                first = Matcher(library, compiled.deep_copy(), self._num_tokens, self._never)
                first.mask(np.zeros(self._num_tokens, np.float32))
                self._compiled[grammar] = compiled
                while len(self._compiled) > MAX_KEPT:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(grammar)
            copy = compiled.deep_copy()
        return Matcher(library, copy, self._num_tokens, self._never)

    def _tokens(self, library: Any) -> Any:
        if self._vocabulary is None:
            try:
                texts = self._tokenizer.token_bytes()[: self._num_tokens]
            except MALFORMED as error:
                raise AnswerFormError(f"answers cannot be given a form: {error}") from error
            silent = [i for i, text in enumerate(texts) if not text and i not in self._eos_ids]
            self._never = np.array(silent, np.intp)
            words = library.TokenizerWrapper(_Vocabulary(self._tokenizer, texts, self._eos_ids))
            self._vocabulary = library.LLTokenizer(
                words, n_vocab=self._num_tokens, eos_token=self._eos_ids
            )
        return self._vocabulary


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, texts: list[bytes], eos_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_ids[0]
        self.special_token_ids = [i for i, text in enumerate(texts) if not text]
        # Every token must have bytes; 0xFF stands in no text.
        self.tokens = [text or b"\xff<%d>" % i for i, text in enumerate(texts)]

    def __call__(self, text: bytes | str) -> list[int]:
        as_text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._tokenizer.encode(as_text)


def _cannot_write() -> AnswerFormError:
    return AnswerFormError(
        "the model's vocabulary cannot write an answer of this form",
        remedy="ask without a form; the demo model, for one, has no braces",
    )
