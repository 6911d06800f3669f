"""First and last tokens of a published model, and how it draws its answers.

`tokenizer_config.json` names tokens, `generation_config.json` and `config.json` give ids. As
transformers does it: a prompt begins with the tokenizer's `bos_token`, or for lack of one with its
`eos_token`; an answer ends at any `eos_token_id` of the generation config. O-7B begins and ends
with `<|endoftext|>`, the models of Qwen with `<|im_end|>`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_vlm.errors import ConfigError
from edge_vlm.formats.usage import Usage
from edge_vlm.json_text import MALFORMED, fault_of
from edge_vlm.model.published.files import read_json

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"
MODEL = "config.json"
MAX_ANSWER_TOKENS = 512
"""Of an answer, where the generation config says nothing: captions and tracks take hundreds."""


def with_tokens(usage: Usage, folder: Path) -> tuple[Usage, list[str]]:
    """The same with first and last tokens and the sampling of a folder, and what to know about it.

    What the folder does not say stays. Raises ConfigError for values that are out of range or name
    no token, CheckpointError for files that are not JSON.
    """
    found = _Folder(folder)
    begin = found.begin() or usage.style.begin
    ends = found.ends() or usage.style.ends
    style = dataclasses.replace(usage.style, begin=begin, ends=ends)
    sampling, notes = found.sampling()
    return dataclasses.replace(usage, style=style, defaults={**usage.defaults, **sampling}), notes


class _Folder:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = _optional(folder / TOKENIZER_CONFIG)
        self.generation = _optional(folder / GENERATION)
        model = _optional(folder / MODEL)
        text = model.get("text_config")
        self.model = {**(text if isinstance(text, Mapping) else {}), **model}
        self._contents: dict[int, str] | None = None

    def begin(self) -> str | None:
        for field in ("bos_token", "eos_token"):
            if token := _content(self.tokenizer.get(field)):
                return token
        for config in (self.generation, self.model):
            for field in ("bos_token_id", "eos_token_id"):
                if tokens := self._tokens(config, field):
                    return tokens[0]
        return None

    def ends(self) -> tuple[str, ...]:
        """All of them; first the one that answers were trained to end with."""
        named = _content(self.tokenizer.get("eos_token"))
        stops = self._tokens(self.generation, "eos_token_id")
        stops = stops or ([] if named else self._tokens(self.model, "eos_token_id"))
        return tuple(dict.fromkeys([*([named] if named else []), *stops]))

    def sampling(self) -> tuple[dict[str, Any], list[str]]:
        """Settings of a session; greedy unless the generation config asks for draws."""
        given = self.generation
        limit = given.get("max_new_tokens") or MAX_ANSWER_TOKENS
        if type(limit) is not int or limit < 1:
            raise self._wrong("max_new_tokens", limit, "a count")
        settings: dict[str, Any] = {"max_answer_tokens": limit}
        if not given.get("do_sample"):
            return settings, []
        temperature, top_p = given.get("temperature") or 1.0, given.get("top_p") or 1.0
        if type(temperature) not in (int, float) or not 0 < temperature <= 10:
            raise self._wrong("temperature", temperature, "a number above 0, at most 10")
        if type(top_p) not in (int, float) or not 0 < top_p <= 1:
            raise self._wrong("top_p", top_p, "a share in (0, 1]")
        left_out = [
            f"{field} {given[field]}"
            for field, off in (("top_k", 0), ("min_p", 0), ("repetition_penalty", 1.0))
            if given.get(field) not in (None, off)
        ]
        notes = [f"{', '.join(left_out)} of {GENERATION} not applied"] if left_out else []
        return {**settings, "temperature": float(temperature), "top_p": float(top_p)}, notes

    def _tokens(self, config: Mapping[str, Any], field: str) -> list[str]:
        value = config.get(field)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        return [self._token(field, token_id) for token_id in ids]

    def _token(self, field: str, token_id: object) -> str:
        if self._contents is None:
            self._contents = self._added_tokens()
        token = self._contents.get(token_id) if type(token_id) is int else None
        if token is None and not self._contents:
            raise ConfigError(
                f"{field} is {token_id!r}, and no {TOKENIZER} says which token that is",
                where=self.folder,
                remedy=f"fetch the {TOKENIZER} that was published with the weights",
            )
        if token is None:
            raise self._wrong(field, token_id, "a special token of the tokenizer")
        return token

    def _added_tokens(self) -> dict[int, str]:
        decoder = self.tokenizer.get("added_tokens_decoder")
        added = _optional(self.folder / TOKENIZER).get("added_tokens") or []
        try:
            contents = {int(item["id"]): str(item["content"]) for item in added}
            for key, item in (decoder or {}).items():
                contents[int(key)] = str(_content(item))
        except MALFORMED as error:
            raise ConfigError(
                f"the tokenizer's list of special tokens cannot be read: {fault_of(error)}",
                where=self.folder,
                remedy="copy the tokenizer's files again",
            ) from error
        return contents

    def _wrong(self, field: str, value: object, expected: str) -> ConfigError:
        return ConfigError(
            f"{field} is {value!r}, expected {expected}",
            where=self.folder,
            remedy="use the tokenizer and generation files that were published with the weights",
        )


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _content(token: object) -> str | None:
    """A token as a string, or as the object that older files have."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) and token else None
