"""Texts that are much too long are refused before they are read to their end, and a film's
subtitles are read beside the engine thread."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from edge_vlm.errors import ConfigError, EdgeVlmError, QuestionTooLong
from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.protocol.alerts import AlertCreate
from edge_vlm_runtime.protocol.base import MAX_TEXT
from edge_vlm_runtime.protocol.responses import DialogueItem, DialoguePart, ResponseOptions
from tests.runtime.server.live import open_server, run
from tests.runtime.session.viewer import Viewer

LONG = "\U0001f4a5" * MAX_TEXT


def part(text: str) -> DialogueItem:
    return DialogueItem(content=[DialoguePart(text=text)])


MESSAGES: dict[str, tuple[protocol.ClientMessage, type[EdgeVlmError]]] = {
    "question": (protocol.ResponseCreate(text=LONG), QuestionTooLong),
    "instructions": (
        protocol.SessionUpdate(session=protocol.SettingsPatch(instructions=LONG)),
        ConfigError,
    ),
    "instructions of one answer": (
        protocol.ResponseCreate(text="is it ?", response=ResponseOptions(instructions=LONG)),
        QuestionTooLong,
    ),
    "dialogue": (
        protocol.ResponseCreate(response=ResponseOptions(input=[part(LONG)] * 100)),
        QuestionTooLong,
    ),
    "dialogue of blanks": (
        protocol.ResponseCreate(
            response=ResponseOptions(input=[part(" " * MAX_TEXT)] * 100 + [part("is it ?")])
        ),
        QuestionTooLong,
    ),
    "alert": (AlertCreate(question=LONG), QuestionTooLong),
}


@pytest.mark.parametrize(("message", "error"), MESSAGES.values(), ids=MESSAGES.keys())
def test_little_of_a_text_that_is_much_too_long_is_read(
    message: protocol.ClientMessage, error: type[EdgeVlmError], monkeypatch: pytest.MonkeyPatch
) -> None:
    viewer = Viewer()
    viewer.show(1)
    tokenizer = viewer.engines.prompt.tokenizer
    read, encode = [0], tokenizer.encode

    def counted(text: str) -> list[int]:
        read[0] += len(text)
        return list(encode(text))

    monkeypatch.setattr(tokenizer, "encode", counted)
    with pytest.raises(error, match=r"too long|more than"):
        viewer.take(message)
    assert read[0] <= 4000
    viewer.ask()
    viewer.run()
    assert viewer.of(protocol.ResponseDone)


def test_settings_that_stay_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    viewer = Viewer(subtitles="subtitle\n1.0 - 2.0 red", instructions="is it ?")
    viewer.show(1)
    tokenizer = viewer.engines.prompt.tokenizer

    def never(text: str) -> list[int]:
        raise AssertionError(text)

    monkeypatch.setattr(tokenizer, "encode", never)
    for ratio in (0.3, 0.4):
        viewer.update(keep_ratio=ratio)
    assert viewer.settings.subtitles


def test_long_subtitles_are_not_read_on_the_engine_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    subtitles = "subtitle\n" + "1.0 - 2.0 " + "x" * 3000
    readers: list[str] = []
    with open_server() as server:
        prompt: Any = server._engines.prompt
        encode = prompt.tokenizer.encode

        def noted(text: str) -> list[int]:
            if len(text) > 2000:
                readers.append(threading.current_thread().name)
            return list(encode(text))

        monkeypatch.setattr(prompt.tokenizer, "encode", noted)
        server.start()

        async def viewer() -> None:
            async with await Client.connect(server.url, {"delivery": "wait"}) as client:
                settings = await client.update({"subtitles": subtitles})
                assert settings.settings.subtitles == subtitles

        run(viewer())
    assert len(readers) == 1
    assert "engines" not in readers[0]
