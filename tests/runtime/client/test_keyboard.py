"""Lines that are typed while a table is shown, and lines that come through a pipe."""

from __future__ import annotations

import argparse
import asyncio
import os
import pty
import termios
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from edge_vlm.errors import ConfigError
from edge_vlm_runtime.cli.common.alerts import create_alerts, parse_alert, rule_options
from edge_vlm_runtime.client.keyboard import Keyboard, LineEditor
from tests.runtime.server.live import TIMEOUT_S, run


def test_what_keys_make_of_a_line() -> None:
    editor = LineEditor()
    assert list(editor.keys(b"Wat\x7f\x7fhat is\r")) == ["What is"]
    assert list(editor.keys("grün\n".encode()[:3])) == []
    assert editor.text == "gr"
    assert list(editor.keys("grün\n".encode()[3:])) == ["grün"]
    assert list(editor.keys(b"one two\x17three\x1b[A\x1b[3~\x1bx!\n")) == ["one three!"]
    assert list(editor.keys(b"all of it\x15rest\n\nnext\n")) == ["rest", "", "next"]


def test_lines_of_a_pipe_come_whole_and_the_last_one_needs_no_end() -> None:
    async def read() -> list[str]:
        reading, writing = os.pipe()
        lines: list[str] = []
        came = asyncio.Event()

        def take(line: str) -> None:
            lines.append(line)
            if len(lines) == 3:
                came.set()

        with Keyboard(take, descriptor=reading).reading():
            os.write(writing, b"first\n  second  \n\nthi")
            os.write(writing, b"rd")
            os.close(writing)
            await came.wait()
        os.close(reading)
        return lines

    assert run(read()) == ["first", "second", "third"]


def test_a_terminal_shows_no_keys_meanwhile_and_is_as_before_afterwards() -> None:
    async def read(writing: int, reading: int) -> None:
        typed: list[str] = []
        came: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        before = termios.tcgetattr(reading)
        with Keyboard(came.set_result, typed.append, descriptor=reading).reading():
            os.write(writing, b"is it\n")
            assert await came == "is it"
        assert termios.tcgetattr(reading) == before
        assert typed[-1] == ""

    writing, reading = pty.openpty()
    others = threads_that_read()
    try:
        run(read(writing, reading))
    finally:
        os.close(writing)  # which ends a read
        for thread in threads_that_read() - others:  # or it might read what has the number next
            thread.join(TIMEOUT_S)
        os.close(reading)


def threads_that_read() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "edge-vlm-keyboard"}


def test_thresholds_stand_before_the_question_of_an_alert() -> None:
    assert parse_alert("Is it?") == ("Is it?", {})
    assert parse_alert("0.8@Is it?") == ("Is it?", {"on_threshold": 0.8})
    assert parse_alert("0.8/0.3@ Is it?") == (
        "Is it?",
        {"on_threshold": 0.8, "off_threshold": 0.3},
    )
    assert parse_alert("Is a@b there?") == ("Is a@b there?", {})
    assert parse_alert("a@b.com here?") == ("a@b.com here?", {})
    for before in ("0,8", "0.8/x", "0,8 / 0,5"):
        with pytest.raises(ConfigError, match=f"'{before}' is no threshold"):
            parse_alert(f"{before}@Is it?")


class Camera:
    """Of a server's own: what is watched for stays when the client goes. Takes one alert."""

    def __init__(self) -> None:
        self.watched: set[str] = set()

    async def create_alert(self, question: str, **rule: object) -> SimpleNamespace:
        if self.watched:
            raise ConfigError("one alert too many")
        self.watched.add(question)
        return SimpleNamespace(alert_id=question)

    async def delete_alert(self, alert_id: str) -> None:
        self.watched.remove(alert_id)


@pytest.mark.parametrize("second", ["Is there a dog?", "0,8@Is there a dog?"])
def test_alerts_are_made_all_or_none(second: str) -> None:
    camera: Any = Camera()
    rule = dict.fromkeys(option.key for option in rule_options())
    args = argparse.Namespace(alerts=["Is there a cat?", second], **rule)
    with pytest.raises(ConfigError, match=r"too many|no threshold"):
        asyncio.run(create_alerts(args, camera))
    assert not camera.watched
