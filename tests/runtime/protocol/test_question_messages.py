"""A question in two messages, as clients of the OpenAI Realtime API put it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from edge_vlm.errors import (
    NoFrameYet,
    NoQuestion,
    ProtocolError,
    QuestionTooLong,
)
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.base import MAX_TEXT
from edge_vlm_runtime.recording.report import Report
from tests.runtime.session.viewer import Viewer


def said(*texts: str, **changes: Any) -> dict[str, Any]:
    content = [{"type": "input_text", "text": text} for text in texts]
    item = {"type": "message", "role": "user", "content": content, **changes}
    return {"type": "conversation.item.create", "event_id": "a", "item": item}


def take(viewer: Viewer, message: dict[str, Any]) -> None:
    decoded = protocol.decode_client_message(json.dumps(message))
    viewer.take(decoded)


def questions(viewer: Viewer) -> list[str]:
    return [event.text for event in viewer.of(protocol.ResponseCreated)]


def test_what_was_said_is_asked_once() -> None:
    viewer = Viewer()
    viewer.show(1)
    take(viewer, said("is there a red ball ?", id="mine"))
    (created,) = viewer.of(protocol.ConversationItemCreated)
    assert (created.item.text, created.item.id, created.event_id) == (
        *("is there a red ball ?", "mine"),
        "a",
    )
    viewer.run()
    assert not questions(viewer)  # it waits
    take(viewer, {"type": "response.create"})
    viewer.run()
    assert questions(viewer) == ["is there a red ball ?"]
    with pytest.raises(NoQuestion):
        take(viewer, {"type": "response.create"})


def test_all_that_was_said_comes_before_the_text_of_the_question() -> None:
    viewer = Viewer()
    viewer.show(1)
    take(viewer, said("is it", "a cube ?"))
    take(viewer, said("now ?"))
    take(viewer, {"type": "response.create", "text": "is it red ?"})
    take(viewer, {"type": "response.create", "text": "is it blue ?"})
    viewer.run()
    assert questions(viewer) == ["is it\na cube ?\nnow ?\nis it red ?", "is it blue ?"]


def test_a_refused_question_uses_it_up() -> None:
    viewer = Viewer()
    take(viewer, said("is it red ?"))
    with pytest.raises(NoFrameYet):
        take(viewer, {"type": "response.create"})
    viewer.show(1)
    with pytest.raises(NoQuestion):
        take(viewer, {"type": "response.create"})


@pytest.mark.parametrize("text", ["", " ", "\n"])
def test_nothing_is_no_question(text: str) -> None:
    viewer = Viewer()
    viewer.show(1)
    take(viewer, said(text))
    with pytest.raises(NoQuestion):
        take(viewer, {"type": "response.create", "text": text})
    assert not viewer.session.is_answering


def test_what_waits_is_bounded() -> None:
    viewer = Viewer()
    viewer.show(1)
    for _ in range(2):
        take(viewer, said(("is " * MAX_TEXT)[: MAX_TEXT // 2 - 1]))
    with pytest.raises(QuestionTooLong, match="characters"):
        take(viewer, said("xx"))
    assert len(viewer.of(protocol.ConversationItemCreated)) == 2
    with pytest.raises(QuestionTooLong, match="tokens"):
        take(viewer, {"type": "response.create"})
    take(viewer, said("is it red ?"))


def test_a_replay_shows_the_whole_question() -> None:
    shown: list[str] = []
    view = SimpleNamespace(asked=lambda question, at_s: shown.append(question.text))
    report = Report(cast(Any, view))
    for message in (said("is it", "a cube ?"), {"type": "response.create"}, said("now ?")):
        report.on_message(protocol.decode_client_message(json.dumps(message)), 0.0)
    assert shown == ["is it\na cube ?"]


@pytest.mark.parametrize(
    "message",
    [
        said("hi", role="assistant"),
        said("hi", role="system"),
        said("hi", type="function_call"),
        said("hi", unknown=1),
        said(content=[{"type": "input_image", "text": "x"}]),
        said(content=[{"type": "input_text"}]),
        said(content="hi"),
        {"type": "conversation.item.create"},
    ],
)
def test_anything_else_is_refused(message: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        protocol.decode_client_message(json.dumps(message))
