"""A question with what holds for its answer alone: the session's settings and what the asker says
of this one answer. No I/O, no threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_vlm.errors import ConfigError, QuestionTooLong
from edge_vlm.errors.requests import RequestError
from edge_vlm.text.prompt import PromptFormat
from edge_vlm_runtime import protocol
from edge_vlm_runtime.inference.constraints import choice_grammar, schema_grammar
from edge_vlm_runtime.inference.sampling import Sampling
from edge_vlm_runtime.protocol.base import MAX_TEXT, UNSET
from edge_vlm_runtime.protocol.questions import lines
from edge_vlm_runtime.protocol.responses import (
    DialogueItem,
    OwnResponseOptions,
    ResponseOptions,
)
from edge_vlm_runtime.protocol.settings import SessionSettings
from edge_vlm_runtime.session.asking.prompt_view import Detail

MAX_STOPS = 16
MOST_CHARACTERS = 64
"""Of a token, more than there are in any text."""


@dataclass(frozen=True, kw_only=True)
class Question:
    text: str
    received_ns: int
    detail: Detail = "video"
    event_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class QueuedQuestion:
    """A question with what held when it was asked."""

    question: Question
    ids: np.ndarray
    """Its tokens i64 [n], instructions and the turns that came with it included."""
    sampling: Sampling
    max_tokens: int | None = None
    """Of the answer; None: the session's when it begins."""
    stop: tuple[str, ...] = ()
    grammar: str | None = None
    """Of `inference.constraints`."""
    is_choice: bool = False
    shows_history: bool = True
    """Earlier turns of the session are shown with it."""
    is_remembered: bool = True
    """It is shown with later questions."""


def require_short(
    message: protocol.ResponseCreate, question: Question, most: int, prompt: PromptFormat
) -> None:
    """Raises QuestionTooLong for what is much longer than `most` tokens, before it is all read."""
    options = _options(message)
    texts = [question.text]
    if isinstance(options.instructions, str):
        texts.append(options.instructions)
    if isinstance(options.input, list):
        texts += [part.text for item in options.input for part in item.content]
    too_many = sum(map(len, texts)) > max(MAX_TEXT, MOST_CHARACTERS * most)
    if too_many or prompt.tokenizer.has_more("\n".join(texts), most):
        raise QuestionTooLong(
            f"the question is far too long: {sum(map(len, texts))} characters",
            remedy=f"{most} tokens are allowed",
        )


def require_short_instructions(instructions: str, most: int, prompt: PromptFormat) -> None:
    """Raises ConfigError for more than `most` tokens, half of what a question has room for."""
    if prompt.tokenizer.has_more(instructions, most):
        length = f"more than {2 * most}"
    elif (count := len(prompt.tokenizer.encode(instructions))) > most:
        length = str(count)
    else:
        return
    raise ConfigError(
        f"instructions have {length} tokens",
        where="session settings",
        remedy=f"{most} are allowed",
    )


def with_instructions(instructions: str, question: str) -> str:
    """What stands in the user's turn."""
    return f"{instructions}\n{question}" if instructions.strip() else question


def question_of(message: protocol.ResponseCreate, unasked: str, came_ns: int) -> Question:
    """What is asked: in the last item of `input`, else what was said before and in `text`."""
    options = _options(message)
    texts = [unasked, message.text] if unasked else [message.text]
    if isinstance(options.input, list):
        texts = [options.input[-1].text if options.input else "", message.text]
    kept = [text for text in texts if text]
    return Question(
        text=kept[0] if len(kept) == 1 else lines(kept),
        received_ns=came_ns,
        detail=message.detail,
        event_id=message.event_id,
    )


def has_own_dialogue(message: protocol.ResponseCreate) -> bool:
    """What was said before is not what it asks."""
    return isinstance(_options(message).input, list)


def plan_question(
    message: protocol.ResponseCreate,
    question: Question,
    settings: SessionSettings,
    prompt: PromptFormat,
) -> QueuedQuestion:
    """Raises ConfigError, RequestError and its leaves, MissingExtraError."""
    options = _options(message)
    own = options.edge_vlm if isinstance(options.edge_vlm, OwnResponseOptions) else None
    changes = {
        name: value
        for name, value in (
            ("instructions", options.instructions),
            ("temperature", options.temperature),
            *((name, getattr(own, name)) for name in ("temperature", "top_p", "seed") if own),
        )
        if value is not UNSET and value is not None
    }
    settings = settings.changed(changes)
    max_tokens = None
    if isinstance(options.max_output_tokens, int):
        if options.max_output_tokens < 1:
            raise ConfigError("max_output_tokens must be at least 1", where="response")
        max_tokens = min(options.max_output_tokens, settings.max_answer_tokens)
    grammar, is_choice = _form(own)
    prompted = with_instructions(settings.instructions, question.text)
    turns = options.input[:-1] if isinstance(options.input, list) else []
    ids = [*_turns(turns, prompt), prompt.question_ids(prompted)]
    return QueuedQuestion(
        question=question,
        ids=np.concatenate(ids),
        sampling=Sampling(
            temperature=settings.temperature, top_p=settings.top_p, seed=settings.seed
        ),
        max_tokens=max_tokens,
        stop=_stops(own),
        grammar=grammar,
        is_choice=is_choice,
        shows_history=not isinstance(options.input, list),
        is_remembered=options.conversation != "none",
    )


def _options(message: protocol.ResponseCreate) -> ResponseOptions:
    found = message.response
    return found if isinstance(found, ResponseOptions) else ResponseOptions()


def _form(own: OwnResponseOptions | None) -> tuple[str | None, bool]:
    choice = own.choice if own else UNSET
    schema = own.json_schema if own else UNSET
    if isinstance(choice, list) and isinstance(schema, dict):
        raise RequestError(
            "an answer has one form: choice or json_schema", param="response.edge_vlm"
        )
    if isinstance(choice, list):
        return choice_grammar(choice), True
    if isinstance(schema, dict):
        return schema_grammar(schema), False
    return None, False


def _stops(own: OwnResponseOptions | None) -> tuple[str, ...]:
    stops = own.stop if own else UNSET
    if not isinstance(stops, list):
        return ()
    if len(stops) > MAX_STOPS or not all(stops):
        raise RequestError(
            f"stop is up to {MAX_STOPS} texts, none of them empty", param="response.edge_vlm.stop"
        )
    return tuple(stops)


def _turns(items: Sequence[DialogueItem], prompt: PromptFormat) -> list[np.ndarray]:
    """Finished turns, a pair of what was asked and answered each. Raises RequestError."""
    pairs: list[tuple[list[str], list[str]]] = []
    for number, item in enumerate(items):
        if item.role == "system":
            raise RequestError(
                "a system message is no turn of a dialogue",
                param=f"response.input[{number}]",
                remedy="put it into instructions",
            )
        if item.role == "user":
            if not pairs or pairs[-1][1]:
                pairs.append(([], []))
            pairs[-1][0].append(item.text)
        else:
            if not pairs:
                pairs.append(([], []))
            pairs[-1][1].append(item.text)
    return [np.asarray(prompt.turn_ids(lines(asked), lines(said))) for asked, said in pairs]


class StopText:
    """Cuts a text that comes in pieces before the first of some texts."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """What is certain of the text so far, and whether it has ended."""
        text = self._held + piece
        ends = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self._held = ""
            return text[: min(ends)], True
        most = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(most, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                self._held = text[-length:]
                return text[:-length], False
        self._held = ""
        return text, False

    def flush(self) -> str:
        """What was held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held
