"""Times in answers count from the begin of the stream, whatever the model counted from."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import av
import pytest

from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.pixels.video import read_video
from edge_vlm.text.times import move_times
from edge_vlm_runtime.cli.ask import ask
from edge_vlm_runtime.cli.watch import watch
from edge_vlm_runtime.client.client import Answer, Client
from edge_vlm_runtime.client.terminal import answer_line
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE, DEMO_FOLDER
from edge_vlm_runtime.protocol.settings import ModelLimits
from edge_vlm_runtime.server.app import Server
from edge_vlm_runtime.session.context import ShownFrame
from edge_vlm_runtime.session.stream_times import in_stream_time
from tests.runtime.command_line import command_line
from tests.tiny import demo_of_short_times


def shown(offset_s: float, *stamps_s: float) -> Sequence[ShownFrame]:
    """The first frame of the stream, and later ones whose stamps are `offset_s` behind."""
    later = [ShownFrame(i, stamp, stamp + offset_s) for i, stamp in enumerate(stamps_s, start=2)]
    return [ShownFrame(1, 0.0, 0.0), *later]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("at 5.0 s", "at 61.5 s"),
        ("at8.5 s", "at65.0 s"),
        ("at 5 s.", "at 61.5 s."),
        ("At 5.25 seconds, again at 6.0 sec", "At 61.75 seconds, again at 62.5 sec"),
        ("from 5.0 to 6.5 s", "from 61.5 to 63.0 s"),
        ("5.0 s - 6.5 s", "61.5 s - 63.0 s"),
        ("between 5.0 and 6.0 seconds", "between 61.5 and 62.5 seconds"),
        ("at 0.0 s", "at 0.0 s"),  # the first picture of all is always shown
        ("at 0.0 s and at 5.0 s", "at 0.0 s and at 61.5 s"),
        ("for 3.0 s", "for 3.0 s"),
        ("It lasts about 3 seconds.", "It lasts about 3 seconds."),
        ("2 seconds later", "2 seconds later"),
        ("3 dogs, a 5-s bag, 1.5 m, 12:05 s", "3 dogs, a 5-s bag, 1.5 m, 12:05 s"),
        ("2", "2"),
        ("", ""),
        (
            '<tracks coords="5.0 1 500 400;6.5 1 505 400">car</tracks> at 5.0 s',
            '<tracks coords="61.5 1 500 400;63.0 1 505 400">car</tracks> at 61.5 s',
        ),
        ('<points coords="1 1 500 400">a picture</points>', None),
    ],
)
def test_the_offset_is_added(text: str, said: str | None) -> None:
    frames = shown(56.5, *(0.5 * i for i in range(1, 17)))
    assert in_stream_time(text, frames) == (text if said is None else said)


def test_nothing_is_added_where_nothing_was_moved() -> None:
    assert in_stream_time("at 5.0 s", shown(0.0, 0.5, 5.0)) is None
    assert in_stream_time("it says 5.0 s", []) is None  # a still picture


def test_a_time_keeps_its_form() -> None:
    assert move_times("at 3 s or 4.25 s", lambda time_s: time_s + 10) == "at 13.0 s or 14.25 s"


def test_the_demo_bundle_says_up_to_what_time_its_answers_hold() -> None:
    assert ModelLimits.from_bundle(EngineBundle.open(DEMO_BUNDLE)).max_time_s == 16


def test_when_is_answered_late_in_a_stream(tmp_path: Path) -> None:
    """The demo's clip after its first picture has stood for a minute: the mushroom comes at 61.5 s;
    on the wire, and as people read it."""
    pictures = list(read_video(DEMO_FOLDER / "clip.mp4", 2.0))

    async def session(url: str) -> Answer:
        async with await Client.connect(url, {"delivery": "wait"}) as client:
            for second in range(60):
                await client.send_frame(pictures[0][1], second * 1_000_000)
            for time_s, rgb in pictures[:7]:
                await client.send_frame(rgb, round((60 + time_s) * 1e6))
            await client.wait_processed()
            return await client.ask("When did the mushroom appear?")

    with Server.open(demo_of_short_times(tmp_path), threads=1) as server:
        server.start()
        answer = asyncio.run(asyncio.wait_for(session(server.url), 120.0))
    assert answer.time_offset_s > 50
    assert answer.text != "at 61.5 s"
    assert answer.text_in_stream_time == answer.shown_text == "at 61.5 s"
    assert answer_line(answer).startswith("at 61.5 s  [TTFT")
    assert "count from" not in answer_line(answer)


@pytest.fixture
def late_clip(tmp_path: Path) -> Path:
    """The demo's clip up to 3 s, after its first picture has stood for 12 s."""
    pictures = [rgb for _, rgb in read_video(DEMO_FOLDER / "clip.mp4", 2.0)]
    path = tmp_path / "late.mkv"
    with av.open(str(path), "w") as container:
        track = container.add_stream("ffv1", rate=2)
        track.height, track.width = pictures[0].shape[:2]
        for rgb in [pictures[0]] * 24 + pictures[:7]:
            container.mux(track.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(track.encode())
    return path


def test_ask_and_watch_print_the_time_of_the_film(
    late_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = "When did the mushroom appear?"
    engines = ["--bundle", str(demo_of_short_times(tmp_path)), "--threads", "1"]
    assert command_line(ask, [str(late_clip), asked, *engines]) == 0
    assert capsys.readouterr().out == "at 13.5 s\n"
    source = ["--source", str(late_clip), "--fast"]
    assert command_line(watch, [*source, "--ask", asked, *engines]) == 0
    out = capsys.readouterr().out
    assert "> at 13.5 s  [TTFT" in out
    assert "count from" not in out
