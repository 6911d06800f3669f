"""Snapshot questions and points over a real websocket, on the command line and on the page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from websockets.asyncio.client import connect

from edge_vlm.errors import SnapshotsUnsupported
from edge_vlm_runtime.cli.ask import ask
from edge_vlm_runtime.cli.replay import replay
from edge_vlm_runtime.cli.watch import watch
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.inference.kv_arena import KVArena
from edge_vlm_runtime.inference.language import LanguageModel
from edge_vlm_runtime.protocol.settings import Attention, ServerLimits
from edge_vlm_runtime.protocol.typed import Settings
from edge_vlm_runtime.server.app import Server
from edge_vlm_runtime.session.budget import default_settings
from tests.e2e.page.page_visit import Visit
from tests.e2e.page.test_page import CHROMIUM, text
from tests.openai.served import next_event
from tests.published_folder import CUT, image_bundle, published_model
from tests.runtime.cameras.pictures import jpeg, write_video
from tests.runtime.client.seen import Seen
from tests.runtime.command_line import command_line
from tests.runtime.engines.torch_snapshots import answer, image_part, video_part
from tests.runtime.server.live import open_server, run
from tests.tiny import tiny_bundle

STEPS = 10
QUESTION = "what colour is the cube ?"
FILE: Settings = {"delivery": "wait", "max_answer_tokens": STEPS}
SAYS = (
    'the <tracks coords="0.0 1 100 200;1.0 1 300 400 2 050 999">red ball</tracks> '
    '<points coords="1 3 500 250">cube</points> <points coords="9.0 4 500 250">cars</points>.'
)


class ScriptedLanguage:
    """The real engines, but the words of an answer are given."""

    def __init__(self, language: LanguageModel, ids: list[int]) -> None:
        self._language, self._ids = language, ids
        self._said = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._language, name)

    def prefill(self, arena: KVArena, embeds: np.ndarray, block_ids: Any = None) -> np.ndarray:
        logits = self._language.prefill(arena, embeds, block_ids)
        self._said = 0
        return self._next(logits)

    def decode_step(self, arena: KVArena, token_id: int) -> np.ndarray:
        return self._next(self._language.decode_step(arena, token_id))

    def _next(self, logits: np.ndarray) -> np.ndarray:
        wanted = np.zeros_like(logits)
        wanted[self._ids[min(self._said, len(self._ids) - 1)]] = 1.0
        self._said += 1
        return wanted


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with open_server(image_bundle(), max_question_tokens=64) as running:
        running.start()
        yield running


def scripted_server() -> Server:
    engines = LoadedBundle.open(image_bundle(), threads=1)
    ids = engines.prompt.answer_ids(SAYS).tolist()
    assert engines.prompt.tokenizer.decode(ids) == SAYS
    engines.language = cast(LanguageModel, ScriptedLanguage(engines.language, ids))
    limits = ServerLimits(max_question_tokens=64)
    settings = default_settings(engines.bundle, limits).changed({"max_answer_tokens": 200})
    return Server(engines, limits=limits, settings=settings)


async def send(client: Client, count: int) -> None:
    for number in range(count):
        await client.send_frame(jpeg(number), number * 500_000)
    await client.wait_processed()


@pytest.mark.parametrize("attention", ["frame", "exact"])
def test_answers_are_torchs_own(server: Server, attention: str) -> None:
    model = published_model()
    with torch.no_grad():
        video = video_part(model, [(0.5 * i, jpeg(i)) for i in range(3)])
        image = image_part(model, jpeg(2), CUT)
    block = attention == "exact"
    expected = {
        "video": answer(model, video, QUESTION, STEPS, one_block=block),
        "snapshot": answer(model, [image], QUESTION, STEPS, one_block=block),
        "both": answer(model, [*video, image], QUESTION, STEPS, one_block=block),
    }
    assert len(set(expected.values())) == 3
    assert all(expected.values())

    async def session() -> None:
        seen = Seen()
        settings: Settings = {**FILE, "attention": Attention(attention)}
        async with await Client.connect(server.url, settings, on_event=seen) as client:
            assert client.created.model.limits.snapshot_tokens > 0
            await send(client, 3)
            for detail in ("video", "snapshot", "video", "both", "video"):
                got = await client.ask(QUESTION, cast(Any, detail))
                assert got.text == expected[detail], detail
                assert (got.snapshot is None) == (detail == "video")
            assert not seen.errors

    run(session())


def test_a_model_of_video_only_says_so() -> None:
    async def session(url: str) -> None:
        async with await Client.connect(url, FILE) as client:
            await send(client, 1)
            with pytest.raises(SnapshotsUnsupported, match="Molmo2"):
                await client.ask(QUESTION, "snapshot")
            assert (await client.ask(QUESTION)).status == "completed"
            assert client.created.model.limits.snapshot_tokens == 0

    with open_server(tiny_bundle()) as plain:
        plain.start()
        run(session(plain.url))


def test_an_unknown_detail_is_a_protocol_error(server: Server) -> None:
    async def session() -> None:
        async with connect(server.url) as socket:
            await socket.recv()
            message = {"type": "response.create", "text": "what ?", "detail": "everything"}
            await socket.send(json.dumps({**message, "event_id": "mine"}))
            reply = await next_event(socket)
            assert reply["error"]["code"] == "E-PROTOCOL"
            assert reply["error"]["event_id"] == "mine"
            assert "detail" in reply["error"]["message"]

    run(session())


def test_points_come_with_their_frame_and_time() -> None:
    async def session(url: str) -> None:
        settings: Settings = {**FILE, "max_answer_tokens": 200, "attention": "frame"}
        async with await Client.connect(url, settings) as client:
            await send(client, 3)
            done = await client.ask(QUESTION)
            assert done.text == SAYS
            found = [(p.kind, p.label, p.object_id, p.x, p.y) for p in done.points]
            assert found == [
                ("track", "red ball", 1, 0.1, 0.2),
                ("track", "red ball", 1, 0.3, 0.4),
                ("track", "red ball", 2, 0.05, 0.999),
                ("point", "cube", 3, 0.5, 0.25),
                ("point", "cars", 4, 0.5, 0.25),
            ]
            # Frames are numbered from 1; no frame was seen near 9 s.
            places = [(p.frame_sequence, p.time_s) for p in done.points]
            assert places == [(1, 0.0), (3, 1.0), (3, 1.0), (3, 1.0), (None, 9.0)]
            alone = await client.ask(QUESTION, "snapshot")
            assert {(p.frame_sequence, p.time_s) for p in alone.points} == {(3, 1.0)}
            # Behind the video a whole number is a picture and the rest are times.
            both = await client.ask(QUESTION, "both")
            places = [(p.frame_sequence, p.time_s) for p in both.points]
            assert places == [(1, 0.0), (3, 1.0), (3, 1.0), (3, 1.0), (None, 9.0)]

    with scripted_server() as scripted:
        scripted.start()
        run(session(scripted.url))


def test_the_commands_show_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = str(write_video(tmp_path / "clip.mp4", num_frames=3))
    with scripted_server() as scripted:
        scripted.start()
        arguments = [scripted.url, "--source", video, "--fast", "--max-answer-tokens", "200"]
        assert command_line(watch, [*arguments, "--snapshot-ask", f"0.5@{QUESTION}"]) == 0
        lines = capsys.readouterr().out.splitlines()
        (asked,) = [line for line in lines if line.startswith("?")]
        assert asked == f"? {QUESTION}  [asked at 0.5 s, snapshot]"
        (answered,) = [line for line in lines if line.startswith(">")]
        assert "frame 2, 48x48, in " in answered
        points = [line for line in lines if line.startswith(("  track", "  point"))]
        assert points[0] == "  track 1 'red ball'  x 0.100  y 0.200  t=0.5 s (frame 2)"
        assert len(points) == 5

        arguments = [video, QUESTION, "--url", scripted.url, "--max-answer-tokens", "200"]
        assert command_line(ask, [*arguments, "--detail", "both"]) == 0
        captured = capsys.readouterr()
        out = captured.out.splitlines()
        assert out[0] == SAYS
        assert out[-1] == "  point 4 'cars'  x 0.500  y 0.250  t=9.0 s (no frame)"
        assert "frame 3, 48x48" in captured.err

    own = ["--bundle", str(tiny_bundle()), "--threads", "1"]
    assert command_line(ask, [video, QUESTION, "--detail", "snapshot", *own]) == 10
    assert "E-NO-SNAPSHOTS" in capsys.readouterr().err


def test_a_recorded_snapshot_question_is_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video, tape = str(write_video(tmp_path / "clip.mp4", num_frames=3)), str(tmp_path / "a.evlm")
    own = ["--bundle", str(image_bundle())]
    arguments = ["--source", video, "--fast", "--max-answer-tokens", "6", "--threads", "1", *own]
    asked = ["--snapshot-ask", f"0.5@{QUESTION}", "--record", tape]
    assert command_line(watch, [*arguments, *asked]) == 0
    live = capsys.readouterr().out.splitlines()
    assert command_line(replay, [tape, *own]) == 0
    again = capsys.readouterr().out.splitlines()
    assert "came again" in again[-1]
    for start in ("?", ">"):
        kept = [[line for line in lines if line.startswith(start)] for lines in (live, again)]
        assert kept[0] == kept[1]
        assert len(kept[0]) == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_asks_for_detail_and_draws_points(debugger: str) -> None:
    async def visit(debugger: str, url: str) -> None:
        async with connect(debugger, max_size=None) as socket:
            page = Visit(socket)
            await page.go(url)
            await page.value("document.getElementById('camera').click()")
            await page.until(f"parseInt({text('g-frame')}) >= 2")
            await page.value("document.getElementById('detail').click()")
            await page.value("document.getElementById('question').value = 'what is there ?'")
            await page.value("document.getElementById('ask').requestSubmit()")
            times = await page.until("document.querySelector('#dialogue .times')?.textContent")
            assert "full detail of frame" in times
            caption = await page.until("document.querySelector('figcaption')?.textContent")
            assert caption.startswith("red ball, cube, cars, frame ")
            assert await page.value("document.querySelectorAll('#dialogue figure').length") == 1
            # Object 1 has the second colour of the list.
            drawn = (
                "(() => { const c = document.querySelector('#dialogue canvas'); "
                "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; "
                "for (let i = 0; i < d.length; i += 4) if (d[i] === 0xf4 && d[i + 1] === 0x72 "
                "&& d[i + 2] === 0xb6) return true; return false; })()"
            )
            assert await page.value(drawn)
            assert page.console == []

    with scripted_server() as scripted:
        scripted.start()
        run(visit(debugger, scripted.page_url))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_offers_no_detail_of_a_model_without(debugger: str) -> None:
    async def visit(debugger: str, url: str) -> None:
        async with connect(debugger, max_size=None) as socket:
            page = Visit(socket)
            await page.go(url)
            await page.value("document.getElementById('camera').click()")
            await page.until(f"{text('status')} === 'connected'")
            assert await page.until("document.getElementById('detail').disabled")

    with open_server(tiny_bundle()) as plain:
        plain.start()
        run(visit(debugger, plain.page_url))
