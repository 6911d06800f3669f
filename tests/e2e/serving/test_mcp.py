"""`edge-vlm mcp` on a live server, used by the official client over both transports."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from edge_vlm_runtime import connect
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.client.live_streams import LiveStreams
from edge_vlm_runtime.mcp.server import make_server
from edge_vlm_runtime.mcp.tools import StreamTools
from edge_vlm_runtime.server.app import Server
from edge_vlm_runtime.server.live_view import LiveView
from tests.openai.served import clip_frames, serving
from tests.runtime.server.live import TIMEOUT_S, run
from tests.tiny import ROOT

if TYPE_CHECKING:
    import mcp

PROGRAM = Path(sys.executable).parent / "edge-vlm"
MUSHROOM = "Is there a mushroom now?"
TOOLS = {"what_do_you_see", "what_happened", "watch_for", "snapshot"}
CONFIGURATIONS = re.findall(r"```json\n(.*?)```", (ROOT / "docs/mcp.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def address(server: Server) -> str:
    return f"127.0.0.1:{server.port}"


async def show(client: Client) -> None:
    for number, jpeg in enumerate(clip_frames()):
        await client.send_frame(jpeg, number * 500_000)
    await client.wait_processed()


@asynccontextmanager
async def over_http(*arguments: str) -> AsyncIterator[str]:
    """`edge-vlm mcp --http`; gives its address."""
    process = await asyncio.create_subprocess_exec(
        *(str(PROGRAM), "mcp", "--http", "--port", "0", *arguments),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        line = (await asyncio.wait_for(process.stdout.readline(), TIMEOUT_S)).decode()
        found = re.match(r"MCP at (http://\S+/mcp), about ", line)
        assert found is not None, line
        yield found[1]
    finally:
        if process.returncode is None:
            process.terminate()
        assert await asyncio.wait_for(process.wait(), TIMEOUT_S) == 0


def of(part: Any) -> str:
    """The text of a result."""
    return "\n".join(each.text for each in part.content if each.type == "text")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when somebody waits for what a stream of the server is about to show."""
    begun, wait = threading.Event(), LiveView.wait

    async def noted_wait(view: LiveView, seconds: float) -> None:
        begun.set()
        await wait(view, seconds)

    monkeypatch.setattr(LiveView, "wait", noted_wait)
    return begun


async def use(agent: mcp.Client, client: Client, waits: threading.Event) -> None:
    """All four tools while the clip is shown, after nothing was."""
    assert {tool.name for tool in (await agent.list_tools()).tools} == TOOLS
    early = await agent.call_tool("snapshot", {})
    assert early.is_error
    assert "E-NO-FRAME" in of(early)
    await client.send_frame(clip_frames()[0], 0)
    await client.wait_processed()
    asked = await agent.call_tool("watch_for", {"condition": MUSHROOM})
    assert asked.structured_content is not None
    assert asked.structured_content["times_begun"] == 0
    waiting = asyncio.create_task(
        agent.call_tool("watch_for", {"condition": MUSHROOM, "wait_s": 60})
    )
    assert await asyncio.to_thread(waits.wait, TIMEOUT_S)  # before there is a mushroom
    for number, jpeg in enumerate(clip_frames()[1:], 1):
        await client.send_frame(jpeg, number * 500_000)
    await client.wait_processed()
    waited = await asyncio.wait_for(waiting, TIMEOUT_S)
    assert not waited.is_error, of(waited)
    assert waited.structured_content is not None
    assert waited.structured_content["times_begun"] == 1
    assert len(await client.list_alerts()) == 1  # the same condition is one alert

    seen = await agent.call_tool("what_do_you_see", {"question": "What is there now?"})
    own = await client.ask("What is there now?")
    assert of(seen) == own.shown_text != ""
    happened = await agent.call_tool("what_happened", {"since": 600})
    assert happened.structured_content is not None
    begins = [e for e in happened.structured_content["events"] if e["what"] == "began"]
    assert [e["condition"] for e in begins] == [MUSHROOM]
    (picture,) = (await agent.call_tool("snapshot", {})).content
    assert picture.type == "image"
    assert picture.mime_type == "image/jpeg"
    assert base64.b64decode(picture.data) == clip_frames()[-1]

    wrong = await agent.call_tool("what_happened", {"since": -1})
    assert wrong.is_error
    assert "greater than 0" in of(wrong)
    label = {"question": "What does it say?", "detail": "snapshot"}
    unable = await agent.call_tool("what_do_you_see", label)
    assert unable.is_error
    assert "E-NO-SNAPSHOTS" in of(unable)


def test_over_standard_input_and_output(server: Server, waits: threading.Event) -> None:
    import mcp

    async def scenario() -> None:
        started = started_by(CONFIGURATIONS[0], server)  # as the page has it
        assert started is not None
        assert started.args == ["mcp", "--url", address(server)]
        async with mcp.Client(started) as agent:
            nothing = await agent.call_tool("snapshot", {})
            assert nothing.is_error
            assert "no camera is connected" in of(nothing)
            assert f"edge-vlm watch {address(server)} --source webcam" in of(nothing)
            async with connect(address(server), {"delivery": "wait"}) as client:
                await use(agent, client, waits)

    run(scenario())


def test_calls_that_wait_keep_no_other_one_waiting(server: Server) -> None:
    import mcp

    async def scenario() -> None:
        tools = make_server(StreamTools(LiveStreams(address(server))))
        async with (
            connect(address(server), {"delivery": "wait"}) as client,
            mcp.Client(tools) as agent,
        ):
            await client.send_frame(clip_frames()[0], 0)
            await client.wait_processed()
            asked = [{"condition": c} for c in (MUSHROOM, f" {MUSHROOM}", f"{MUSHROOM}\n") * 5]
            await asyncio.gather(*(agent.call_tool("watch_for", each) for each in asked))
            assert len(await client.list_alerts()) == 1
            waiting = [
                asyncio.create_task(agent.call_tool("watch_for", {**each, "wait_s": 600}))
                for each in asked
            ]
            seen = await asyncio.wait_for(agent.call_tool("snapshot", {}), TIMEOUT_S)
            assert not seen.is_error
            assert not any(task.done() for task in waiting)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            for number in range(client.created.limits.max_alerts - 1):
                await client.create_alert(f"Is there a dog now? {number}")
            full = await agent.call_tool("watch_for", {"condition": "Is there a cat now?"})
            assert full.is_error
            assert MUSHROOM in of(full)

    run(scenario())


def test_over_streamable_http(server: Server, waits: threading.Event) -> None:
    import mcp

    async def scenario() -> None:
        async with (
            connect(address(server), {"delivery": "wait"}) as client,
            over_http("--url", address(server)) as url,
        ):
            async with mcp.Client(url) as agent:
                await use(agent, client, waits)
            async with httpx.AsyncClient(timeout=TIMEOUT_S) as http:
                for headers, status in (
                    ({"Host": "evil.example"}, 403),
                    ({"Origin": "http://evil.example"}, 403),
                ):
                    reply = await http.post(url, json={}, headers=headers)
                    assert reply.status_code == status

    run(scenario())


def test_it_ends_with_an_interrupt_too() -> None:
    async def scenario() -> None:
        process = await asyncio.create_subprocess_exec(
            *(str(PROGRAM), "mcp", "--url", "127.0.0.1:9"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b'{"jsonrpc": "2.0", "id": 1, "method": "ping"}\n')
        await process.stdin.drain()
        assert json.loads(await process.stdout.readline())["id"] == 1
        process.send_signal(signal.SIGINT)
        assert await process.wait() == -signal.SIGINT

    run(scenario())


def started_by(text: str, server: Server) -> mcp.StdioServerParameters | None:
    """What an agent with this configuration starts; None for one with an address."""
    import mcp

    configuration = json.loads(text.replace("localhost:8765", address(server)))
    ((name, entry),) = configuration.get("mcpServers", configuration.get("servers")).items()
    assert name == "camera"
    if "url" in entry:
        assert entry == {"type": "http", "url": "http://127.0.0.1:8766/mcp"}
        return None
    assert entry.get("type", "stdio") == "stdio"
    assert entry["command"] == "edge-vlm"
    return mcp.StdioServerParameters(command=str(PROGRAM), args=entry["args"], env=entry.get("env"))


def test_there_are_three_configurations() -> None:
    assert len(CONFIGURATIONS) == 3


@pytest.mark.parametrize("text", CONFIGURATIONS[1:])
def test_the_configurations_of_the_page_run(text: str, server: Server) -> None:
    """The first is run by `test_over_standard_input_and_output`."""
    import mcp

    started = started_by(text, server)
    if started is None:  # the page's command is run by `test_over_streamable_http`, on another port
        assert "edge-vlm mcp --http --url localhost:8765" in (ROOT / "docs/mcp.md").read_text()
        return

    async def scenario() -> None:
        async with mcp.Client(started) as agent:
            assert {tool.name for tool in (await agent.list_tools()).tools} == TOOLS
            assert address(server) in of(await agent.call_tool("snapshot", {}))

    run(scenario())


def test_a_key_is_wanted_from_agents_too(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("secret")

    async def scenario(server: Server) -> None:
        arguments = ("--url", address(server), "--api-key-file", str(key))
        async with (
            over_http(*arguments) as url,
            httpx.AsyncClient(timeout=TIMEOUT_S) as http,
        ):
            assert (await http.post(url, json={})).status_code == 401
            headers = {"Authorization": "Bearer wrong"}
            assert (await http.post(url, json={}, headers=headers)).status_code == 401
            headers = {"Authorization": "Bearer secret"}
            assert (await http.post(url, json={}, headers=headers)).status_code not in (401, 403)

    with serving(api_key="secret") as server:
        run(scenario(server))


def test_which_stream_is_meant(server: Server) -> None:
    tools = StreamTools(LiveStreams(address(server)))

    async def scenario() -> None:
        async with (
            connect(address(server), {"delivery": "wait"}) as one,
            connect(address(server), {"delivery": "wait"}) as other,
        ):
            await show(one)
            assert (await asyncio.to_thread(tools.snapshot)).jpeg == clip_frames()[-1]
            await other.send_frame(clip_frames()[0], 0)
            await other.wait_processed()
            with pytest.raises(Exception, match=r"2 streams.*--session ID") as caught:
                await asyncio.to_thread(tools.snapshot)
            ids = [client.created.session_id for client in (one, other)]
            assert all(name in str(caught.value) for name in ids)
            named = StreamTools(LiveStreams(address(server)), ids[1])
            assert (await asyncio.to_thread(named.snapshot)).jpeg == clip_frames()[0]
        with pytest.raises(Exception, match=f"no stream '{ids[1]}'"):
            await asyncio.to_thread(named.snapshot)

    run(scenario())


Call = Callable[[httpx.Client, str], httpx.Response]
BAD: dict[str, tuple[Call, int, str]] = {
    "no session": (lambda http, _: http.get("sessions/nobody"), 404, "E-SESSION-GONE"),
    "no path": (lambda http, name: http.get(f"sessions/{name}/nothing"), 404, "E-NOT-FOUND"),
    "no room": (lambda http, _: http.get("cameras"), 404, "E-NOT-FOUND"),
    "method": (lambda http, name: http.delete(f"sessions/{name}"), 405, "E-METHOD"),
    "no JSON": (
        lambda http, name: http.post(f"sessions/{name}/alerts", content="{"),
        400,
        "E-REQUEST",
    ),
    "a list": (lambda http, name: http.post(f"sessions/{name}/alerts", json=[]), 400, "E-REQUEST"),
    "no question": (
        lambda http, name: http.post(f"sessions/{name}/alerts", json={}),
        400,
        "E-PROTOCOL",
    ),
    "a threshold": (
        lambda http, name: http.post(
            f"sessions/{name}/alerts", json={"question": MUSHROOM, "on_threshold": 7}
        ),
        400,
        "E-CONFIG",
    ),
    "large": (
        lambda http, name: http.post(f"sessions/{name}/alerts", content=b" " * (1 << 17)),
        413,
        "E-MESSAGE-TOO-LARGE",
    ),
    "a wait": (
        lambda http, name: http.get(f"sessions/{name}/events", params={"wait_s": "nan"}),
        400,
        "E-REQUEST",
    ),
    "a page from elsewhere": (
        lambda http, name: http.get("sessions", headers={"Origin": "http://evil.example"}),
        403,
        "E-HOST",
    ),
}


def test_bad_requests_about_live_sessions(server: Server) -> None:
    async def scenario() -> None:
        async with connect(address(server)) as client:
            await asyncio.to_thread(ask_badly, client.created.session_id)

    def ask_badly(name: str) -> None:
        with httpx.Client(base_url=f"{server.page_url}v1/edge_vlm/", timeout=TIMEOUT_S) as http:
            for what, (call, status, code) in BAD.items():
                reply = call(http, name)
                assert reply.status_code == status, (what, reply.text)
                assert reply.json()["error"]["code"] == code, what

    run(scenario())
