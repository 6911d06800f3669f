"""What stands in docs/python.md and examples/ runs, against a live server with the demo model.

There is no ROS here: its node runs on a stub (`rclpy_stub`) with the real model.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edge_vlm.cli import main
from edge_vlm.errors import ConfigError, ReplayLost
from edge_vlm.pixels.video import read_video
from edge_vlm_runtime import LoadedBundle, SyncClient, connect, protocol
from edge_vlm_runtime.client import events
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.protocol.settings import POLICIES, SessionSettings
from edge_vlm_runtime.protocol.typed import RuleFields, Settings
from edge_vlm_runtime.server.app import Server
from tests.e2e.serving import rclpy_stub
from tests.openai.served import CLIP, clip_frames, serving
from tests.runtime.server.live import TIMEOUT_S, run
from tests.tiny import ROOT

PAGE = (ROOT / "docs/python.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
QUESTION = "What is there now?"
MUSHROOM = "Is there a mushroom now?"
THINGS = "yellow bicycle"
"""The clip's last picture has one."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def here(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_VLM_URL", f"127.0.0.1:{server.port}")


def address(server: Server) -> str:
    return f"127.0.0.1:{server.port}"


# ---- the page --------------------------------------------------------------------------------

SAID = (
    rf"{THINGS}.*\n.*{THINGS}.* \d\.\d+\n",
    r"did you mean 'keep_ratio'\?",
    rf"{re.escape(MUSHROOM)} begins at \d\.\d s\n",
    rf"{THINGS}.*\n2",
    rf"{THINGS}",
)
"""What each snippet prints."""


@pytest.mark.parametrize("number", range(len(SAID)))
def test_a_snippet_runs(
    number: int,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert len(SNIPPETS) == len(SAID)
    (tmp_path / "clip.mp4").symlink_to(CLIP)
    monkeypatch.chdir(tmp_path)
    code = SNIPPETS[number].replace("localhost:8765", address(server))
    exec(compile(code, f"snippet {number} of docs/python.md", "exec"), {"__name__": "__main__"})
    assert re.search(SAID[number], capsys.readouterr().out)


# ---- examples --------------------------------------------------------------------------------


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_webcam_example(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    run(example("webcam").main(str(CLIP), address(server)))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["3.0 s", "6.0 s"]
    assert "green dog" in lines[1]


def test_the_rtsp_example(capsys: pytest.CaptureFixture[str]) -> None:
    example("rtsp_alert").main(str(CLIP), MUSHROOM)
    assert re.match(r"begins at \d\.\d s \(\d+%\)\nends after", capsys.readouterr().out)


def test_the_openai_example(capsys: pytest.CaptureFixture[str]) -> None:
    example("openai_sdk").main(str(CLIP), QUESTION)
    assert THINGS in capsys.readouterr().out


def test_the_example_in_process(capsys: pytest.CaptureFixture[str]) -> None:
    example("in_process").main(str(CLIP), str(DEMO_BUNDLE))
    out = capsys.readouterr().out
    assert f"{MUSHROOM} yes" in out
    assert THINGS in out.splitlines()[-1]


def image(rgb: np.ndarray, time_s: float, encoding: str) -> rclpy_stub.Image:
    """With padded rows, as drivers have them."""
    height, width, _ = rgb.shape
    samples = rgb if encoding == "rgb8" else rgb[:, :, ::-1]
    rows = np.zeros((height, 3 * width + 5), np.uint8)
    rows[:, : 3 * width] = samples.reshape(height, -1)
    message = rclpy_stub.Image(
        height=height, width=width, encoding=encoding, step=3 * width + 5, data=rows.tobytes()
    )
    message.header.stamp.sec = 1_700_000_000 + int(time_s)
    message.header.stamp.nanosec = round(time_s % 1 * 1e9)
    return message


def test_the_ros_example(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in rclpy_stub.stub_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(rclpy_stub.Node, "parameters", {"alert": MUSHROOM})
    node = example("ros2_node").EdgeVlmNode()
    try:
        node.deliver("question", rclpy_stub.String(data=QUESTION))
        assert "E-NO-FRAME" in node.log[0] or "no frame" in node.log[0]
        for number, (time_s, rgb) in enumerate(read_video(CLIP, 2.0)):
            encoding = "bgr8" if number % 2 else "rgb8"
            node.deliver("image", image(rgb, time_s, encoding))
        node.deliver("question", rclpy_stub.String(data=QUESTION))
        (answer,) = node.publishers["answer"].sent
        assert THINGS in answer.data
        assert node.publishers["alert"].sent[0] == rclpy_stub.Bool(data=True)
        with pytest.raises(ValueError, match="got mono8"):
            node.deliver("image", image(rgb, 99.0, "rgb8").__class__(encoding="mono8"))
        with pytest.raises(TypeError):
            node.deliver("image", rclpy_stub.String())
    finally:
        node.destroy_node()


# ---- typed settings --------------------------------------------------------------------------


def test_the_typed_names_are_those_of_the_classes() -> None:
    from dataclasses import fields
    from typing import get_args, get_type_hints

    from edge_vlm_runtime.protocol.alerts import AlertRule

    assert list(Settings.__annotations__) == [field.name for field in fields(SessionSettings)]
    rule = [field.name for field in fields(AlertRule)]
    assert ["question", *RuleFields.__annotations__] == [*rule, "name"]
    assert get_args(get_type_hints(Settings)["policy"]) == POLICIES


TYPED = """
from edge_vlm_runtime import SyncClient, connect
from edge_vlm_runtime.protocol.alerts import AlertCleared, AlertTriggered

async def right() -> AlertTriggered | AlertCleared | None:
    async with connect("here", {"keep_ratio": 0.3, "policy": "random"}) as client:
        await client.update({"attention": "exact", "delivery": "wait"})
        await client.create_alert("Is there a cat now?", on_threshold=0.9)
        async for alert in client.alerts():
            return alert
    return None

async def wrong() -> None:
    async with connect("here", {"keep_rato": 0.3}) as client:  # wrong
        await client.update({"delivery": "sometimes"})  # wrong
        await client.create_alert("Is there a cat now?", on_treshold=0.9)  # wrong
    with SyncClient("here", {"keep_ratio": "0.3"}) as blocking:  # wrong
        blocking.create_alert("Is there a cat now?", evidence=1)  # wrong
"""


def test_a_misspelt_name_fails_mypy(tmp_path: Path) -> None:
    snippet = tmp_path / "snippet.py"
    snippet.write_text(TYPED)
    command = [sys.executable, "-m", "mypy", "--no-error-summary", str(snippet)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    found = [int(line) for line in re.findall(r"snippet\.py:(\d+): error", done.stdout)]
    lines = enumerate(TYPED.splitlines(), 1)
    assert found == [number for number, line in lines if "# wrong" in line], done.stdout


def test_a_misspelt_name_fails_at_run_time(server: Server) -> None:
    async def scenario() -> None:
        bad: Any = {"keep_rato": 0.3}
        with pytest.raises(ConfigError, match="did you mean 'keep_ratio'"):
            await connect(address(server), bad)
        async with connect(address(server)) as client:
            rule: Any = {"on_treshold": 0.9}
            with pytest.raises(ConfigError, match="did you mean 'on_threshold'"):
                await client.create_alert(MUSHROOM, **rule)
            assert await client.list_alerts() == []

    run(scenario())


# ---- iterators -------------------------------------------------------------------------------


def test_events_come_in_order_and_end_with_the_client(server: Server) -> None:
    async def scenario() -> None:
        async with connect(address(server), {"delivery": "wait"}) as client:
            outcomes = client.events(protocol.FrameAccepted)
            everything = client.events()
            sent = [
                await client.send_frame(jpeg, n * 500_000) for n, jpeg in enumerate(clip_frames())
            ]
            await client.wait_processed()
        assert [event.frame_sequence async for event in outcomes] == sent
        numbers = [event.sequence async for event in everything]
        assert numbers == sorted(numbers)
        assert [event async for event in client.events()] == []  # of one that was closed

    run(scenario())


def test_frames_without_a_time_are_of_now(server: Server) -> None:
    async def scenario() -> None:
        async with connect(address(server), {"delivery": "wait"}) as client:
            outcomes = client.events(protocol.FrameAccepted)
            for jpeg in clip_frames()[:3]:
                await client.send_frame(jpeg)
            await client.wait_processed()
        times = [event.time_s async for event in outcomes]
        assert len(times) == 3
        assert times == sorted(set(times))

    run(scenario())


def test_an_iterator_that_nobody_reads_is_told(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MAX_WAITING", 2)

    async def scenario() -> None:
        async with connect(address(server), {"delivery": "wait"}) as client:
            stream = client.events(protocol.FrameAccepted)
            for jpeg in clip_frames()[:4]:
                await client.send_frame(jpeg)
            await client.wait_processed()
            assert [(await anext(stream)).frame_sequence for _ in range(2)] == [1, 2]
            with pytest.raises(ReplayLost, match="2 events waited"):
                await anext(stream)

    run(scenario())


def test_what_ends_the_client_ends_its_iterators() -> None:
    async def scenario(server: Server) -> None:
        async with connect(address(server), reconnect=False) as client:
            stream = client.events(protocol.FrameAccepted)
            waiting = asyncio.ensure_future(anext(stream))
            stopping = asyncio.create_task(asyncio.to_thread(server.stop))
            with pytest.raises(Exception, match="the server is stopping"):
                await waiting
            await stopping

    with serving() as server:
        run(scenario(server))


def test_the_blocking_client_for_several_threads(server: Server) -> None:
    begun: list[str] = []
    with SyncClient(server.page_url, {"delivery": "wait"}) as client:
        alerts = client.alerts()
        reader = threading.Thread(target=lambda: begun.extend(a.question for a in alerts))
        reader.start()
        client.create_alert(MUSHROOM)
        for number, jpeg in enumerate(clip_frames()):
            client.send_frame(jpeg, number * 500_000)
        client.wait_processed()
        assert client.frames.processed == len(clip_frames())
        answer = client.start_answer(QUESTION)
        assert "".join(answer) == answer.answer().text == client.ask(QUESTION).text
    reader.join(TIMEOUT_S)
    assert not reader.is_alive()
    assert begun[0] == MUSHROOM
    with pytest.raises(RuntimeError, match="closed"):
        client.ask(QUESTION)
    client.close()


def test_an_iterator_of_another_thread_ends_with_the_client(server: Server) -> None:
    for _ in range(5):  # whoever closes and whoever iterates meet at another moment each time
        told: list[protocol.ServerEvent] = []
        with SyncClient(address(server), {"delivery": "wait"}) as client:
            stream = client.events()
            reader = threading.Thread(target=told.extend, args=(stream,))
            reader.start()
            client.send_frame(clip_frames()[0])
        reader.join(TIMEOUT_S)
        assert not reader.is_alive()
        assert isinstance(told[-1], protocol.SessionClosed)


# ---- in process ------------------------------------------------------------------------------


def test_in_process_is_as_over_the_wire(server: Server) -> None:
    async def over_the_wire() -> tuple[list[list[int]], str]:
        settings: Settings = {"delivery": "wait", "raw_frames": True}
        async with connect(address(server), settings) as client:
            outcomes = client.events(protocol.FrameAccepted)
            for time_s, rgb in read_video(CLIP, 2.0):
                await client.send_frame(rgb, round(time_s * 1e6))
            await client.wait_processed()
            answer = await client.ask(QUESTION)
        return [event.kept_cells async for event in outcomes], answer.text

    cells = []
    with LoadedBundle.open(DEMO_BUNDLE, threads=1) as bundle, bundle.session() as session:
        for time_s, rgb in read_video(CLIP, 2.0):
            outcome = session.send_frame(rgb, round(time_s * 1e6))
            assert isinstance(outcome, protocol.FrameAccepted)
            cells.append(outcome.kept_cells)
        text = session.ask(QUESTION).text
        assert (cells, text) == run(over_the_wire())

        pieces = session.start_answer(QUESTION)
        with pytest.raises(Exception, match="no graph for pictures"):
            session.ask(QUESTION, "snapshot")
        assert isinstance(
            session.send_frame(b"no picture", round((time_s + 0.5) * 1e6)), protocol.FrameDropped
        )
        first = next(pieces)
        accepted = session.send_frame(rgb, round((time_s + 1) * 1e6))  # while it is decoded
        assert isinstance(accepted, protocol.FrameAccepted)
        assert first + "".join(pieces) == pieces.answer().text == text
        bad: Any = {"keep_rato": 0.3}
        with pytest.raises(ConfigError, match="did you mean 'keep_ratio'"):
            session.update(bad)
        assert session.update({"keep_ratio": 0.25}).keep_ratio == 0.25
        alert = session.create_alert(MUSHROOM, on_threshold=1e-6, off_threshold=0.0)
        assert session.list_alerts()[0].state == "active"
        session.delete_alert(alert.alert_id)
        assert session.list_alerts() == []
    with pytest.raises(Exception, match="the session has ended"):
        session.ask(QUESTION)


def test_in_process_on_event_may_ask_and_may_fail() -> None:
    answers: list[str] = []

    def on_event(event: protocol.ServerEvent) -> None:
        if isinstance(event, protocol.FrameAccepted):
            if event.frame_sequence == 2:
                raise KeyError("a bug of the caller's")
            answers.append(session.ask(QUESTION).text)

    jpegs = clip_frames()
    with (
        LoadedBundle.open(DEMO_BUNDLE, threads=1) as bundle,
        bundle.session(on_event=on_event) as session,
    ):
        assert isinstance(session.send_frame(jpegs[0], 0), protocol.FrameAccepted)
        with pytest.raises(KeyError, match="a bug of the caller's"):
            session.send_frame(jpegs[1], 500_000)
        assert isinstance(session.send_frame(jpegs[2], 1_000_000), protocol.FrameAccepted)
    assert len(answers) == 2


# ---- JSON ------------------------------------------------------------------------------------


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_watch_says_events_as_json(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--source", str(CLIP), "--fast", "--alert", MUSHROOM, "--ask", QUESTION, "--json"]
    assert main(["watch", address(server), *arguments]) == 0
    said = lines(capsys)
    kinds = [line["type"] for line in said]
    assert kinds[0] == "session.created"
    assert kinds[-2:] == ["session.closed", "summary"]
    assert kinds.count("frame.accepted") == said[-1]["frames_processed"] == len(clip_frames())
    assert {"alert.triggered", "response.done", "alert.listed"} <= set(kinds)
    assert "response.output_item.added" not in kinds
    text = json.dumps(said)
    assert "resume_token" not in text
    assert '"jpeg"' not in text
    known = {protocol.tag_of(kind) for kind in protocol.messages.SERVER_EVENTS} | {"summary"}
    assert set(kinds) <= known


def test_ask_says_events_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ask", str(CLIP), QUESTION, "--json"]) == 0  # the server is the variable's
    (done,) = [line for line in lines(capsys) if line["type"] == "response.done"]
    assert THINGS in done["text"]


@pytest.mark.parametrize("url", [None, "127.0.0.1:9"])
def test_an_error_is_the_last_line(url: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [] if url is None else ["--url", url]
    code = main(["ask", "no-such.mp4", QUESTION, "--json", *arguments])
    error = lines(capsys)[-1]
    wanted = ("E-VIDEO-NOT-FOUND", 5) if url is None else ("E-SERVER-UNREACHABLE", 8)
    assert (error["type"], error["error"]["code"], error["exit_code"]) == ("error", *wanted)
    assert code == wanted[1]


def test_a_server_is_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "a:1", "--url", "b:1", "--source", str(CLIP)]) == 2
    assert "named twice" in capsys.readouterr().err
