"""Cameras that the server owns: sessions without a viewer, subscribers, absence, a changed file."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import websockets
from websockets.asyncio.client import ClientConnection

from edge_vlm.errors import ConfigError, NotForSubscribers, ServerBusy, UnknownStream
from edge_vlm_runtime import protocol
from edge_vlm_runtime.cameras import keeper
from edge_vlm_runtime.cameras.config import CameraPlan, read_plan
from edge_vlm_runtime.cameras.keeper import CameraFile, CameraKeeper
from edge_vlm_runtime.cli.common.config import read_toml
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.client.connection import Access
from edge_vlm_runtime.client.events import EventStream
from edge_vlm_runtime.client.live_streams import LiveStreams
from edge_vlm_runtime.mcp.tools import StreamTools
from edge_vlm_runtime.protocol.alerts import AlertCreated, AlertTriggered
from edge_vlm_runtime.protocol.settings import ServerLimits, SessionSettings
from edge_vlm_runtime.server.access import doors
from edge_vlm_runtime.server.app import Server
from edge_vlm_runtime.server.client_session import ClientSession
from edge_vlm_runtime.server.sessions import SessionRegistry
from edge_vlm_runtime.server.streams.hub import MAX_OF_PARTY, MAX_SUBSCRIBERS
from edge_vlm_runtime.server.streams.subscription import Subscription
from edge_vlm_runtime.session.frames import EncodedFrame
from edge_vlm_runtime.sources import live, waiting
from tests.runtime.cameras.pictures import write_video
from tests.runtime.cameras.rtsp_camera import RtspCamera
from tests.runtime.cameras.test_rtsp_server import RtspServer, is_installed
from tests.runtime.client.test_connection import fake_table
from tests.runtime.ports import KeptPort
from tests.runtime.server.live import TIMEOUT_S, run
from tests.tiny import tiny_bundle

KEY = "the key"
ACCESS = Access(api_key=KEY)
QUESTION = "what colour is the cube ?"
ALWAYS = {"on_threshold": 1e-9, "off_threshold": 0.0}
"""An alert of a model with random weights, from the first check on."""


@pytest.fixture(autouse=True, scope="module")
def impatience() -> Iterator[None]:
    """Files are looked at and cameras are tried more often than they would be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeper, "POLL_S", 0.1)
        for module in (live, waiting):
            patch.setattr(module, "LONGEST_BACK_OFF_S", 0.2)
        yield


class Owned:
    """A running server with a file of cameras that may be written anew."""

    def __init__(self, file: Path, **limits: Any) -> None:
        self.file = file
        self.heard: list[tuple[str, protocol.ServerEvent]] = []
        self.server = Server.open(
            tiny_bundle(),
            threads=1,
            limits=ServerLimits(**limits),
            api_key=KEY,
            on_event=lambda session, event: self.heard.append((session, event)),
            cameras=CameraFile(
                plan=read_plan(read_toml(file), file),
                path=file,
                read=lambda: read_plan(read_toml(file), file),
            ),
        )
        self.server.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def get(self, path: str, key: str = KEY) -> Any:
        request = urllib.request.Request(
            f"http://{self.address}{path}", headers={"Authorization": f"Bearer {key}"}
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            data = reply.read()
        return json.loads(data) if data[:1] in (b"{", b"[") else data

    def stream(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"/v1/streams/{name}")
        return found

    def until(self, name: str, is_met: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The stream, once it is so. While another camera takes its place, there is none."""
        deadline = time.monotonic() + TIMEOUT_S
        while (found := self._stream_if_any(name)) is None or not is_met(found):
            assert time.monotonic() < deadline, found
            time.sleep(0.02)
        return found

    def _stream_if_any(self, name: str) -> dict[str, Any] | None:
        try:
            return self.stream(name)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != 404:
                raise
            return None

    def write(self, text: str) -> None:
        """At once: what is half written for a while would be another plan."""
        new = self.file.with_suffix(".new")
        new.write_text(text)
        new.replace(self.file)


def table(kind: str, **fields: Any) -> str:
    return f"[[{kind}]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in fields.items())


def camera(name: str, source: RtspCamera | str, **fields: Any) -> str:
    if isinstance(source, RtspCamera):
        source = f"rtsp://user:secret@127.0.0.1:{source.port}/live"
    # Grey pictures: whatever changes is shown to the model.
    settings = {"drop_duplicates": False}
    inline = ", ".join(f"{k} = {json.dumps(v)}" for k, v in settings.items())
    return table("camera", name=name, source=source, **fields) + f"settings = {{ {inline} }}\n"


def alert(name: str, of: str, **fields: Any) -> str:
    asked = {"question": "is there a red ball ?"}
    return table("alert", **{"name": name, "camera": of, **asked, **fields})


@contextmanager
def owned(file: Path, text: str, **limits: Any) -> Iterator[Owned]:
    file.write_text(text)
    running = Owned(file, **limits)
    try:
        yield running
    finally:
        running.server.close()


@pytest.fixture(scope="module")
def source() -> Iterator[RtspCamera]:
    with RtspCamera() as found:
        yield found


@pytest.fixture(scope="module")
def running(source: RtspCamera, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owned]:
    """With a camera that is there and one that never comes."""
    text = camera("door", source, fps=10, keep_ratio=0.4) + alert("ball", "door", **ALWAYS)
    text += camera("away", "rtsp://user:secret@127.0.0.1:1/none")
    with owned(tmp_path_factory.mktemp("cameras") / "edge-vlm.toml", text, max_sessions=1) as found:
        found.until("door", lambda stream: stream["frames_accepted"] > 0)
        yield found


# ---- HTTP ------------------------------------------------------------------------------------


def test_streams_are_listed_with_where_they_stand(running: Owned) -> None:
    running.until("door", lambda stream: bool(stream["alerts"][0]["episodes"]))
    running.until("door", lambda stream: stream["fps"] is not None and stream["kept_ratio"] < 1)
    running.until("away", lambda stream: "not opened yet" not in stream["detail"])
    door, away = running.get("/v1/streams")["data"]
    assert (door["id"], door["object"], door["state"]) == ("door", "edge_vlm.stream", "live")
    assert (door["keep_ratio"], door["cells"], door["recording"]) == (0.4, 9, False)
    assert 0 < door["kept_ratio"] < 1
    assert door["newest_frame"]["time_s"] >= 0
    assert [(each["name"], each["state"]) for each in door["alerts"]] == [("ball", "active")]
    assert away["state"] == "waiting"
    assert "does not answer" in away["detail"]
    assert away["newest_frame"] is None
    assert away["alerts"] == []
    assert "secret" not in json.dumps([door, away])
    assert running.get("/v1/streams/door/snapshot")[:2] == b"\xff\xd8"
    [begun, *_] = running.get("/v1/streams/door/events")["events"]
    assert (begun["alert_name"], begun["camera"]) == ("ball", "door")
    listed = running.get("/v1/edge_vlm/sessions")["data"]
    assert {each["id"]: each.get("stream") for each in listed}[door["session"]] == "door"


@pytest.mark.parametrize("path", ["/v1/streams/dor", "/v1/streams/dor/snapshot"])
def test_an_unknown_stream_is_told_with_those_there_are(running: Owned, path: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        running.get(path)
    assert caught.value.code == 404
    with caught.value:
        error = json.loads(caught.value.read())["error"]
    assert error["code"] == "E-UNKNOWN-STREAM"
    assert "door, away" in error["message"]


def test_without_the_key_nothing_is_seen(running: Owned) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        running.get("/v1/streams", key="another")
    caught.value.close()
    assert caught.value.code == 401

    async def subscribe() -> None:
        with pytest.raises(Exception, match="wants an API key"):
            await Client.subscribe(running.address, "door")

    run(subscribe())


def test_a_camera_is_asked_by_its_name_over_http_and_by_agents(running: Owned) -> None:
    streams = LiveStreams(running.address, ACCESS)
    answer = streams.ask("door", QUESTION)
    assert isinstance(answer, str)
    assert isinstance(StreamTools(streams, "door").what_do_you_see(QUESTION), str)
    with pytest.raises(UnknownStream, match="door, away"):
        streams.ask("dor", QUESTION)
    answered = 'edge_vlm_camera_responses_total{camera="door",status="completed"}'
    page = running.get("/metrics").decode()
    assert answered in page
    assert 'edge_vlm_camera_up{camera="away"} 0' in page
    assert 'edge_vlm_camera_frames_total{camera="door",outcome="accepted"}' in page


def test_alerts_have_names_for_whoever_hears_of_them(running: Owned) -> None:
    running.until("door", lambda stream: bool(stream["alerts"][0]["episodes"]))
    begun = [event for _, event in running.heard if isinstance(event, AlertTriggered)]
    assert {(event.camera, event.alert_name) for event in begun} == {("door", "ball")}


# ---- subscribers -----------------------------------------------------------------------------


def subscribe_raw(running: Owned, query: str) -> Any:
    return websockets.connect(
        f"ws://{running.address}/v1/realtime?{query}",
        additional_headers={"Authorization": f"Bearer {KEY}"},
    )


async def next_of(connection: ClientConnection, *kinds: str) -> dict[str, Any]:
    while True:
        message = await connection.recv()
        if isinstance(message, str) and (event := json.loads(message))["type"] in kinds:
            return dict(event)


def test_a_subscriber_gets_pictures_behind_their_outcomes(running: Owned) -> None:
    async def watch() -> None:
        async with subscribe_raw(running, "stream=door&subscribe_pictures=true") as connection:
            created = json.loads(await connection.recv())
            assert created["type"] == "session.created"
            assert created["resume_token"] == ""
            assert created["stream"] == {"name": "door", "state": "live", "detail": None}
            accepted: list[int] = []
            pictures: list[int] = []
            while len(pictures) < 3:
                message = await connection.recv()
                if isinstance(message, bytes):
                    picture = protocol.decode_frame_message(message)
                    assert picture.picture()[:2] == b"\xff\xd8"
                    assert picture.sequence == accepted[-1]
                    pictures.append(picture.sequence)
                elif (event := json.loads(message))["type"] == "frame.accepted":
                    accepted.append(event["frame_sequence"])
            assert set(pictures) <= set(accepted)

    run(watch())


def test_all_see_all_answers_but_only_their_own_errors(running: Owned) -> None:
    async def watch() -> None:
        async with (
            subscribe_raw(running, "stream=door") as asker,
            subscribe_raw(running, "stream=door") as other,
        ):
            for connection in (asker, other):
                await next_of(connection, "session.created")
            bad = {"type": "alert.delete", "alert_id": "alert_99", "event_id": "one"}
            await asker.send(json.dumps(bad))
            error = await next_of(asker, "error")
            assert error["error"]["event_id"] == "one"
            question = {"type": "response.create", "text": QUESTION, "event_id": "two"}
            await asker.send(json.dumps(question))
            own = await next_of(asker, "response.created")
            seen = await next_of(other, "error", "response.created")
            assert own["event_id"] == "two"
            assert seen["event_id"].startswith("srv_")
            assert own["response_id"] == seen["response_id"]
            for connection in (asker, other):
                done = await next_of(connection, "response.done")
                assert done["response_id"] == own["response_id"]

    run(watch())


@pytest.mark.parametrize(
    "message",
    [
        {"type": "session.update", "session": {"keep_ratio": 1.0}},
        {"type": "input_video_frame.append", "sequence": 1, "capture_time_us": 1, "frame": ""},
        {"type": "alert.delete", "alert_id": "alert_1"},
        b"a picture",
    ],
)
def test_what_is_the_owners_is_refused_and_the_connection_stays(
    running: Owned, message: dict[str, Any] | bytes
) -> None:
    async def watch() -> None:
        async with subscribe_raw(running, "stream=door") as connection:
            data = message if isinstance(message, bytes) else json.dumps(message)
            await connection.send(data)
            error = await next_of(connection, "error")
            assert error["error"]["code"] == NotForSubscribers.code, error
            await connection.send(json.dumps({"type": "ping"}))
            await next_of(connection, "pong")

    run(watch())


def test_what_is_said_before_a_question_is_that_subscribers_own(running: Owned) -> None:
    async def watch() -> None:
        one = await Client.subscribe(running.address, "door", access=ACCESS)
        other = await Client.subscribe(running.address, "door", access=ACCESS)
        async with one, other:
            created = one.events(protocol.ResponseCreated)
            await one.say("the cube is blue .")
            await other.ask(QUESTION)
            assert (await created.__anext__()).text == QUESTION
            await one.ask(QUESTION)
            assert (await created.__anext__()).text == f"the cube is blue .\n{QUESTION}"

    run(watch())


def test_a_subscribers_alert_is_seen_by_all_and_can_be_deleted(running: Owned) -> None:
    async def watch() -> None:
        async with await Client.subscribe(running.address, "door", access=ACCESS) as client:
            other = await Client.subscribe(running.address, "door", access=ACCESS)
            async with other:
                created = other.events(AlertCreated)
                made = await client.create_alert("is there a red ball ?")
                assert (await created.__anext__()).alert.alert_id == made.alert_id
                await other.delete_alert(made.alert_id)
                assert [each.alert_id for each in await client.list_alerts()] == ["alert_1"]
                with pytest.raises(NotForSubscribers, match="belongs to the server's file"):
                    await client.delete_alert("alert_1")

    run(watch())


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("stream=dor", UnknownStream),
        ("stream=door&subscribe_pictures=perhaps", ConfigError),
        ("stream=door&resume=1", ConfigError),
    ],
)
def test_a_subscription_that_cannot_be_is_told_why(
    running: Owned, query: str, error: type[ConfigError]
) -> None:
    async def watch() -> None:
        async with subscribe_raw(running, query) as connection:
            told = await next_of(connection, "error")
            assert told["error"]["code"] == error.code
            with pytest.raises(websockets.ConnectionClosed):
                await connection.recv()

    run(watch())


def test_cameras_and_subscribers_take_no_viewers_place(running: Owned) -> None:
    """There is one place."""

    async def watch() -> None:
        async with (
            await Client.subscribe(running.address, "door", access=ACCESS),
            await Client.connect(running.address, access=ACCESS),
        ):
            with pytest.raises(ServerBusy, match="1 of 1 sessions are taken"):
                await Client.connect(running.address, access=ACCESS)

    run(watch())


def test_a_camera_has_its_subscribers_and_viewers_their_places(running: Owned) -> None:
    async def watch() -> None:
        async with AsyncExitStack() as watching:
            for _ in range(MAX_SUBSCRIBERS):
                client = await Client.subscribe(running.address, "door", access=ACCESS)
                await watching.enter_async_context(client)
            with pytest.raises(ServerBusy, match="16 subscribers watch 'door' already"):
                await Client.subscribe(running.address, "door", access=ACCESS)
            await watching.enter_async_context(await Client.connect(running.address, access=ACCESS))

    run(watch())


def test_an_address_takes_so_many_places_of_a_camera(
    running: Owned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doors, "is_loopback", lambda host: False)

    async def watch() -> None:
        async with AsyncExitStack() as watching:
            for _ in range(MAX_OF_PARTY):
                client = await Client.subscribe(running.address, "door", access=ACCESS)
                await watching.enter_async_context(client)
            with pytest.raises(ServerBusy, match="12 subscribers of this address watch 'door'"):
                await Client.subscribe(running.address, "door", access=ACCESS)
            monkeypatch.undo()
            client = await Client.subscribe(running.address, "door", access=ACCESS)
            await watching.enter_async_context(client)

    run(watch())


class SlowSocket:
    """Takes one message at a time, when it is let."""

    def __init__(self) -> None:
        self.sent: list[str | bytes] = []
        self.room = asyncio.Semaphore(0)
        self.closed: list[int] = []

    async def receive(self) -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send_text(self, data: str) -> None:
        await self.room.acquire()
        self.sent.append(data)

    async def send_bytes(self, data: bytes) -> None:
        await self.room.acquire()
        self.sent.append(data)

    async def close(self, code: int = 1000, reason: str | None = None) -> None:
        self.closed.append(code)


@contextmanager
def subscribed(socket: SlowSocket, table: SessionRegistry, lost: list[int]) -> Iterator[Any]:
    session = ClientSession(table.limits, camera="door")
    settings = SessionSettings()
    yield (
        session,
        Subscription(
            socket,
            session,
            table.created(session, settings),
            max_message_bytes=100,
            with_pictures=True,
            is_of_file=lambda alert_id: False,
            is_draining=lambda: False,
            on_lost_picture=lambda: lost.append(1),
        ),
    )


def accepted(number: int) -> protocol.FrameAccepted:
    return protocol.FrameAccepted(
        frame_sequence=number,
        time_s=number * 0.5,
        age_ms=1.0,
        queue_ms=0.0,
        in_memory=True,
        cells_seen=9,
        cells_kept=4,
        kept_cells=[],
        kv_tokens=1,
        stage_ms={},
    )


def test_a_slow_reader_loses_pictures_and_no_event() -> None:
    async def watch(table: SessionRegistry) -> None:
        socket, lost = SlowSocket(), list[int]()
        with subscribed(socket, table, lost) as (session, subscription):
            running = asyncio.create_task(subscription.run())
            await asyncio.sleep(0)
            for number in range(1, 6):
                frame = EncodedFrame(
                    seq=number, capture_us=number, received_ns=0, data=b"picture %d" % number
                )
                session.view.offered(frame)
                session.send(accepted(number))
            session.end(1001, "over")
            for _ in range(20):
                socket.room.release()
            await running
        events = [json.loads(each) for each in socket.sent if isinstance(each, str)]
        assert [each["sequence"] for each in events] == [1, 2, 3, 4, 5, 6]
        [picture] = [each for each in socket.sent if isinstance(each, bytes)]
        assert picture.endswith(b"picture 5")
        assert len(lost) == 4
        assert socket.closed == [1001]
        assert not session.listeners

    with fake_table() as table:
        run(watch(table))


def test_one_who_does_not_read_at_all_is_closed() -> None:
    async def watch(table: SessionRegistry) -> None:
        socket = SlowSocket()
        with subscribed(socket, table, []) as (session, subscription):
            running = asyncio.create_task(subscription.run())
            await asyncio.sleep(0)
            for number in range(1, 20):
                session.send(accepted(number))
            await running
        assert socket.closed == [1013]
        assert not session.listeners

    with fake_table(max_replay_events=10) as table:
        run(watch(table))


# ---- absence ---------------------------------------------------------------------------------


def test_a_camera_that_is_late_and_goes_away_has_one_session(tmp_path: Path) -> None:
    port = KeptPort()
    address = f"rtsp://user:secret@127.0.0.1:{port.number}/live"

    async def watch(found: Owned, before: str) -> None:
        client = await Client.subscribe(found.address, "door", access=ACCESS)
        async with client:
            assert isinstance(client.created, protocol.SessionCreated)
            assert client.created.session_id == before
            states = client.events(protocol.StreamUpdated)
            with RtspCamera(port=port.number) as there:
                await until_state(states, "live")
                await client.wait(asyncio.ensure_future(_accepted(client)))
                there.unplug()
                assert (await until_state(states, "waiting")).detail
                await until_state(states, "live")

    with owned(tmp_path / "cameras.toml", camera("door", address, fps=10)) as found:
        waiting = found.until(
            "door", lambda stream: stream["session"] and "answer" in stream["detail"]
        )
        assert waiting["state"] == "waiting"
        run(watch(found, waiting["session"]))
        assert found.stream("door")["session"] == waiting["session"]


async def until_state(states: EventStream[protocol.StreamUpdated], wanted: str) -> protocol.Stream:
    """Why it waits may change meanwhile."""
    while (stream := (await states.__anext__()).stream).state != wanted:
        pass
    return stream


async def _accepted(client: Client) -> None:
    await client.events(protocol.FrameAccepted).__anext__()


def test_a_real_camera_with_a_password_comes_back_in_its_session(tmp_path: Path) -> None:
    if not is_installed():
        pytest.skip("GStreamer's RTSP server (gir1.2-gst-rtsp-server-1.0) is not installed")
    there = RtspServer()
    try:
        with owned(tmp_path / "cameras.toml", camera("door", there.url(), fps=5)) as found:
            before = found.until("door", lambda stream: stream["frames_accepted"] > 0)
            there.cut()
            away = found.until("door", lambda stream: stream["state"] == "waiting")
            assert "secret" not in json.dumps(away)
            there.plug_in()
            found.until(
                "door",
                lambda stream: (
                    stream["state"] == "live"
                    and stream["frames_accepted"] > before["frames_accepted"] + 1
                ),
            )
            assert found.stream("door")["session"] == before["session"]
            assert (
                'edge_vlm_camera_returns_total{camera="door"} 1' in found.get("/metrics").decode()
            )
    finally:
        there.cut()


# ---- a changed file --------------------------------------------------------------------------


def test_a_changed_file_changes_what_it_changes(source: RtspCamera, tmp_path: Path) -> None:
    door = camera("door", source, fps=10)
    shed = camera("shed", source, fps=5)
    file = tmp_path / "cameras.toml"
    with owned(file, door + shed + alert("ball", "door") + alert("cube", "door")) as found:
        found.until("shed", lambda stream: stream["frames_accepted"] > 0)
        before = found.until("door", lambda stream: len(stream["alerts"]) == 2)
        old = found.stream("shed")["session"]
        ids = {each["name"]: each["alert_id"] for each in before["alerts"]}

        # Another threshold, an alert less, another share, a camera more and one less.
        changed = camera("door", source, fps=10, keep_ratio=0.25) + camera("gate", source)
        found.write(changed + alert("ball", "door", on_threshold=0.9))
        after = found.until("door", lambda stream: stream["keep_ratio"] == 0.25)
        # Alerts go and come one by one: for a while there is none but the other one.
        after = found.until(
            "door",
            lambda stream: [a["rule"]["on_threshold"] for a in stream["alerts"] or ()] == [0.9],
        )
        assert after["session"] == before["session"]
        [ball] = after["alerts"]
        assert ball["name"] == "ball"
        assert ball["alert_id"] != ids["ball"]
        found.until("gate", lambda stream: stream["frames_accepted"] > 0)
        with pytest.raises(urllib.error.HTTPError) as caught:
            found.stream("shed")
        caught.value.close()
        listed = [each["id"] for each in found.get("/v1/edge_vlm/sessions")["data"]]
        assert old not in listed
        assert 'camera="shed"' not in found.get("/metrics").decode()


def test_a_bad_file_is_said_and_the_old_one_stays(
    source: RtspCamera, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "cameras.toml"
    door = camera("door", source, fps=10)
    with owned(file, door) as found:
        before = found.until("door", lambda stream: stream["frames_accepted"] > 0)
        for wrong in (door + door, "[[camera", alert("ball", "dor")):
            caplog.clear()
            found.write(wrong)
            deadline = time.monotonic() + TIMEOUT_S
            while not (said := [r for r in caplog.records if "stay as they are" in r.message]):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert str(file) in said[0].message
        assert found.stream("door")["session"] == before["session"]
        after = found.until(
            "door", lambda stream: stream["frames_accepted"] > before["frames_accepted"]
        )
        assert after["session"] == before["session"]


def test_another_source_is_another_session_and_its_subscribers_are_told(
    source: RtspCamera, tmp_path: Path
) -> None:
    async def watch(found: Owned) -> None:
        client = await Client.subscribe(found.address, "door", access=ACCESS)
        async with client:
            closed = client.events(protocol.SessionClosed)
            found.write(camera("door", f"rtsp://127.0.0.1:{source.port}/other"))
            assert "another camera now" in (await closed.__anext__()).reason

    with owned(tmp_path / "cameras.toml", camera("door", source)) as found:
        before = found.until("door", lambda stream: stream["session"] is not None)
        run(watch(found))
        found.until("door", lambda stream: stream["session"] not in (None, before["session"]))


# ---- the end ---------------------------------------------------------------------------------


def test_a_film_is_shown_whole_and_recorded_and_can_still_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is over before a session that is late has been opened."""
    opened = SessionRegistry.open_stream

    async def open_late(*args: Any) -> Any:
        await asyncio.sleep(0.5)
        return await opened(*args)

    monkeypatch.setattr(SessionRegistry, "open_stream", open_late)
    write_video(tmp_path / "clip.mp4", num_frames=3, fps=10)
    text = camera("clip", "clip.mp4", fps=10, record="kept")
    with owned(tmp_path / "cameras.toml", text) as found:
        ended = found.until("clip", lambda stream: stream["state"] == "ended")
        assert ended["recording"]
        assert ended["detail"] is None
        found.until("clip", lambda stream: stream["frames_accepted"] == 3)
        assert isinstance(LiveStreams(found.address, ACCESS).ask("clip", QUESTION), str)
    assert len(list((tmp_path / "kept").glob("*.evlm"))) == 1


def test_what_is_wrong_with_a_camera_is_said_before_the_start(tmp_path: Path) -> None:
    file = tmp_path / "cameras.toml"
    cases = {
        "record = true\n": "record = true needs a folder.*'door'",
        'record = "cameras.toml"\n': "cannot be written",
        "settings = { window_tokens = 1 }\n": "camera 'door'",
    }
    long = alert("long", "door", question="is there a red ball ? " * 100)
    cases[alert("ball", "door") + long] = "the question is far too long.*'long' of camera 'door'"
    many = "".join(alert(f"ball{number}", "door") for number in range(17))
    cases[many] = "has 16 alerts already .*'ball16' of camera 'door'"
    for line, message in cases.items():
        file.write_text(table("camera", name="door", source="webcam") + line)
        with pytest.raises(Exception, match=message):
            Owned(file)


def test_subscribers_are_told_that_the_server_stops(source: RtspCamera, tmp_path: Path) -> None:
    async def watch(found: Owned, stop: Callable[[], Awaitable[None]]) -> None:
        async with subscribe_raw(found, "stream=door") as connection:
            await next_of(connection, "session.created")
            stopping = asyncio.ensure_future(stop())
            await next_of(connection, "session.go_away")
            assert "stopping" in (await next_of(connection, "session.closed"))["reason"]
            with pytest.raises(websockets.ConnectionClosed) as caught:
                await connection.recv()
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1001
            await stopping

    with owned(tmp_path / "cameras.toml", camera("door", source)) as found:
        found.until("door", lambda stream: stream["session"] is not None)
        run(watch(found, lambda: asyncio.to_thread(found.server.stop)))


def test_the_file_is_not_read_any_more_while_all_is_being_stopped() -> None:
    """A hangup that comes behind the signal to stop began cameras anew."""
    read: list[bool] = []

    def plan() -> CameraPlan:
        read.append(True)
        return CameraPlan()

    async def stop() -> None:
        unused: Any = None
        file = CameraFile(plan=CameraPlan(), read=plan)
        keeper = CameraKeeper(file, setup=unused, sessions=unused, recorder_of=unused)
        await keeper.reload()
        await keeper.stop_reading()
        before = asyncio.all_tasks()
        keeper.reload_soon()
        await asyncio.gather(*(asyncio.all_tasks() - before))

    run(stop())
    assert read == [True]
