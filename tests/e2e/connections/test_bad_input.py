"""Whatever a client sends or names: one typed line, and the server goes on serving."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import websockets
from websockets.asyncio.client import connect

from edge_vlm.errors import (
    BundleHashMismatch,
    BundleNotFound,
    MessageTooLarge,
    NoFrameYet,
)
from edge_vlm_runtime import protocol
from edge_vlm_runtime.cli.ask import ask
from edge_vlm_runtime.cli.demo import demo
from edge_vlm_runtime.cli.serve import serve
from edge_vlm_runtime.cli.watch import watch
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.protocol.settings import ServerLimits
from edge_vlm_runtime.server.app import Server
from tests.runtime.cameras.pictures import jpeg, write_video
from tests.runtime.command_line import command_line
from tests.runtime.server.live import TIMEOUT_S, run
from tests.tiny import tiny_bundle

QUESTION = "is there a red ball ?"
LIMIT_BYTES = 50_000


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    limits = ServerLimits(max_message_bytes=LIMIT_BYTES, max_sessions=2)
    # A live picture that the engines come to late is dropped: not here, however busy they are.
    settings = {"max_frame_age_s": TIMEOUT_S}
    with Server.open(tiny_bundle(), threads=1, limits=limits, settings=settings) as running:
        running.start()
        yield running


@pytest.fixture(autouse=True)
def _the_server_goes_on_serving_and_loses_nothing(server: Server) -> Iterator[None]:
    """Around every test here a second viewer is in the middle of its stream."""

    async def other_viewer() -> None:
        async with await Client.connect(server.url, {"delivery": "wait"}) as client:
            for number in range(3):
                await client.send_frame(jpeg(number), number * 500_000)
            await client.wait_processed()
            assert client.frames.processed == 3
            assert (await client.ask(QUESTION)).status == "completed"

    run(other_viewer())
    yield
    run(other_viewer())


class Raw:
    """A socket without the client's good manners."""

    def __init__(self, socket: Any) -> None:
        self.socket = socket

    async def send_json(self, **fields: Any) -> None:
        await self.socket.send(json.dumps(fields))

    async def event(self, kind: str) -> dict[str, Any]:
        while True:
            event: dict[str, Any] = json.loads(await self.socket.recv())
            if event["type"] == kind:
                return event

    async def close_code(self) -> int | None:
        try:
            while True:
                await self.socket.recv()
        except websockets.ConnectionClosed as closed:
            return None if closed.rcvd is None else closed.rcvd.code


def talk(server: Server, conversation: Any) -> None:
    async def session() -> None:
        async with connect(server.url, max_size=None) as socket:
            raw = Raw(socket)
            await raw.event("session.created")
            await conversation(raw)

    run(session())


# ---- over the wire ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload", [b"", b"not a picture", jpeg(1)[:200], b"\xff\xd8\xff" + bytes(300)]
)
def test_a_frame_that_is_not_a_jpeg(server: Server, payload: bytes) -> None:
    async def conversation(raw: Raw) -> None:
        await raw.socket.send(protocol.frame_message(1, 0, payload).encode())
        event = await raw.event("frame.dropped")
        assert (event["frame_sequence"], event["reason"]) == (1, "decode_error")
        assert event["code"] == "E-FRAME-DECODE"
        assert "\n" not in event["message"]
        await raw.socket.send(protocol.frame_message(2, 500_000, jpeg(1)).encode())
        assert (await raw.event("frame.accepted"))["frame_sequence"] == 2

    talk(server, conversation)


def test_a_frame_that_was_cut_on_its_way(server: Server) -> None:
    async def conversation(raw: Raw) -> None:
        await raw.socket.send(protocol.frame_message(1, 0, jpeg(1)).encode()[:-10])
        event = await raw.event("frame.dropped")
        assert (event["frame_sequence"], event["reason"]) == (1, "decode_error")
        assert "announces" in event["message"]

    talk(server, conversation)


@pytest.mark.parametrize("size", [LIMIT_BYTES + 1, 3 * LIMIT_BYTES])
def test_an_oversized_message(server: Server, size: int) -> None:
    """Just above the limit a typed error comes first; far above only the close code can."""

    async def conversation(raw: Raw) -> None:
        await raw.socket.send(protocol.frame_message(1, 0, bytes(size)).encode())
        if size < 2 * LIMIT_BYTES:
            error = (await raw.event("error"))["error"]
            assert error["code"] == "E-MESSAGE-TOO-LARGE"
        assert await raw.close_code() == 1009

    talk(server, conversation)


def test_the_client_calls_an_oversized_message_by_its_name(server: Server) -> None:
    async def session() -> None:
        async with await Client.connect(server.url, {"delivery": "wait"}) as client:
            await client.send_frame(bytes(3 * LIMIT_BYTES), 0)
            await client.wait_processed()

    with pytest.raises(MessageTooLarge):
        run(session())


@pytest.mark.parametrize(
    ("text", "code", "event_id"),
    [
        ('{"type": "dance", "event_id": "e1"}', "E-UNKNOWN-TYPE", "e1"),
        ('{"type": "response.create", "event_id": "e2"}', "E-NO-QUESTION", "e2"),
        ('{"type": "response.create", "txt": "hi"}', "E-PROTOCOL", None),
        ("not json", "E-PROTOCOL", None),
    ],
)
def test_an_unknown_or_broken_message(
    server: Server, text: str, code: str, event_id: str | None
) -> None:
    async def conversation(raw: Raw) -> None:
        await raw.socket.send(text)
        error = (await raw.event("error"))["error"]
        assert (error["code"], error["event_id"]) == (code, event_id)
        assert "\n" not in error["message"]
        await raw.send_json(type="ping", event_id="still here")
        assert (await raw.event("pong"))["event_id"] == "still here"

    talk(server, conversation)


def test_binary_messages_of_another_protocol(server: Server) -> None:
    async def from_the_start(raw: Raw) -> None:
        await raw.socket.send(b"GET / HTTP/1.1")
        assert (await raw.event("error"))["error"]["code"] == "E-PROTOCOL"
        assert await raw.close_code() == 1003

    async def later_on(raw: Raw) -> None:
        await raw.send_json(type="ping")
        await raw.socket.send(b"\x01\x63" + bytes(22))
        assert (await raw.event("error"))["error"]["code"] == "E-UNKNOWN-TYPE"
        await raw.send_json(type="session.close")
        assert await raw.close_code() == 1000

    talk(server, from_the_start)
    talk(server, later_on)


def test_a_question_before_the_first_frame(server: Server) -> None:
    async def session() -> None:
        async with await Client.connect(server.url, {"delivery": "wait"}) as client:
            with pytest.raises(NoFrameYet, match="no frame"):
                await client.ask(QUESTION)
            await client.send_frame(jpeg(1), 0)
            assert (await client.ask(QUESTION)).status == "completed"

    run(session())


# ---- on the command line ---------------------------------------------------------------------


def cut_off(path: Path) -> Path:
    """Matroska has its index behind it, so a cut file begins to play."""
    whole = write_video(path.with_name("whole.mkv"), num_frames=60, fps=10)
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    return path


def not_a_video(path: Path) -> Path:
    path.write_text("hello\n" * 100)
    return path


CASES: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "missing": ("nothing.mp4", lambda path: path, "E-VIDEO-NOT-FOUND"),
    "cut-off": ("cut.mkv", cut_off, "E-VIDEO-UNREADABLE"),
    "not-a-video": ("text.mp4", not_a_video, "E-VIDEO-UNREADABLE"),
    "text": ("text.txt", not_a_video, "E-VIDEO-UNREADABLE"),
    "empty-file": (
        "empty.mp4",
        lambda path: (path.write_bytes(b"") and path) or path,
        "E-VIDEO-UNREADABLE",
    ),
    "no-frames": ("none.avi", lambda path: write_video(path, num_frames=0), "E-VIDEO-EMPTY"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("command", ["watch", "ask"])
def test_bad_files(
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    case: str,
    command: str,
) -> None:
    name, make, code = CASES[case]
    path = make(tmp_path / name)
    if command == "watch":
        arguments = ["--source", str(path), "--fast", "--ask", QUESTION, server.url]
        exit_code = command_line(watch, arguments)
    else:
        exit_code = command_line(ask, [str(path), QUESTION, "--url", server.url])
    out, err = capsys.readouterr()
    assert exit_code == 5
    (line,) = [line for line in err.splitlines() if line.startswith("edge-vlm: ")]
    assert line.startswith(f"edge-vlm: {code}: ")
    assert str(path) in line
    assert "Traceback" not in err
    if case == "cut-off" and command == "watch":  # what there was is not lost
        assert "frame   1" in out
        assert f"? {QUESTION}" in out


def damaged(folder: Path) -> Path:
    target = folder / "damaged"
    shutil.copytree(tiny_bundle(), target)
    weights = next((target / "graphs").glob("*.weights"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    return target


@pytest.mark.parametrize("name", ["serve", "watch", "ask", "demo"])
def test_unknown_and_damaged_bundles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    video = str(write_video(tmp_path / "clip.mkv"))
    clip = {"fps": 2, "questions": []}
    (tmp_path / "clip.json").write_text(json.dumps(clip))
    arguments = {
        "serve": ["--port", "0"],
        "watch": ["--source", video],
        "ask": [video, QUESTION],
        "demo": ["--clip", str(tmp_path), "--port", "0"],
    }[name]
    command = {"serve": serve, "watch": watch, "ask": ask, "demo": demo}[name]
    for bundle, error in (
        (tmp_path / "nowhere", BundleNotFound),
        (damaged(tmp_path), BundleHashMismatch),
    ):
        exit_code = command_line(command, [*arguments, "--bundle", str(bundle)])
        err = capsys.readouterr().err
        assert exit_code == 4
        assert err.startswith(f"edge-vlm: {error.code}: ")
        assert len(err.splitlines()) == 1
