"""Alerts over a real websocket, from the command line, and out to a real receiver."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect

from edge_vlm.errors import (
    ConfigError,
    EdgeVlmError,
    QuestionTooLong,
    TooManyAlerts,
    UnknownAlert,
)
from edge_vlm.formats.alert_set import Footage, LabelledAlert, read_event_set, write_event_set
from edge_vlm_calibration.alerts.checking import Series
from edge_vlm_calibration.alerts.marks import Watch
from edge_vlm_calibration.alerts.thresholds import Rule, outcome_of
from edge_vlm_runtime import protocol
from edge_vlm_runtime.alert_sinks import dispatcher as outputs_module
from edge_vlm_runtime.alert_sinks.dispatcher import AlertDispatcher
from edge_vlm_runtime.alert_sinks.webhook import WebhookSink
from edge_vlm_runtime.cli.eval_alerts import evaluate_alerts
from edge_vlm_runtime.cli.watch import watch
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.client.live_table import LiveTable
from edge_vlm_runtime.evaluation.alerts import Episode, Score, parse_rule
from edge_vlm_runtime.protocol import alerts as messages
from edge_vlm_runtime.protocol.typed import RuleFields, Settings
from edge_vlm_runtime.server.app import Server
from tests.openai.served import next_event
from tests.runtime.alerts.receivers import WebServer, cleared, free_port, triggered
from tests.runtime.cameras.pictures import jpeg, write_video
from tests.runtime.command_line import command_line
from tests.runtime.server.live import TIMEOUT_S, open_server, run
from tests.tiny import tiny_bundle

FILE: Settings = {"delivery": "wait", "max_answer_tokens": 6}
QUESTION = "is there a red ball ?"
ALWAYS: RuleFields = {"on_threshold": 1e-6, "off_threshold": 0.0}
"""The tiny model knows nothing, so this begins with the first frame and never ends by itself."""


@pytest.fixture(autouse=True)
def _receivers_may_be_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, at the end of a command, they may be."""
    monkeypatch.setattr(outputs_module, "GRACE_S", TIMEOUT_S)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with open_server(max_alerts=3) as running:
        running.start()
        yield running


async def send(client: Client, first: int, count: int) -> None:
    for number in range(first, first + count):
        await client.send_frame(jpeg(number), number * 500_000)
    await client.wait_processed()


def test_an_alert_from_its_creation_to_its_end(server: Server) -> None:
    events: list[protocol.ServerEvent] = []

    async def session() -> None:
        async with await Client.connect(server.url, FILE, on_event=events.append) as client:
            status = await client.create_alert(QUESTION, **ALWAYS)
            never = await client.create_alert(QUESTION, on_threshold=1.0)
            assert (status.alert_id, status.state, status.probability) == ("alert_1", "idle", None)
            await send(client, 0, 3)
            first, second = await client.list_alerts()
            assert (first.state, first.episodes, first.frame_sequence) == ("active", 1, 3)
            assert (second.state, second.episodes) == ("idle", 0)
            assert first.probability == second.probability
            assert (await client.ask(QUESTION)).status == "completed"
            await client.delete_alert(status.alert_id)
            with pytest.raises(UnknownAlert, match="alert_1"):
                await client.delete_alert(status.alert_id)
            assert [alert.alert_id for alert in await client.list_alerts()] == [never.alert_id]

    run(session())
    told = [e for e in events if isinstance(e, (messages.AlertTriggered, messages.AlertCleared))]
    begin, end = told
    assert isinstance(begin, messages.AlertTriggered)
    assert isinstance(end, messages.AlertCleared)
    assert begin.evidence is not None
    assert begin.evidence.jpeg == jpeg(0)
    assert begin.evidence.exact
    assert (begin.frame_sequence, begin.time_s, begin.episode) == (1, 0.0, 1)
    assert begin.age_s > 0
    assert (end.reason, end.lasted_s, end.episode) == ("deleted", 1.0, 1)
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))


def test_two_viewers_watch_for_different_things(server: Server) -> None:
    async def session() -> None:
        settings: Settings = {"delivery": "wait"}
        async with (
            await Client.connect(server.url, settings) as one,
            await Client.connect(server.url, settings) as other,
        ):
            await one.create_alert(QUESTION, **ALWAYS)
            await send(one, 0, 2)
            await send(other, 0, 2)
            assert len(await one.list_alerts()) == 1
            assert await other.list_alerts() == []
            with pytest.raises(UnknownAlert):
                await other.delete_alert("alert_1")
            assert (await one.list_alerts())[0].state == "active"

    run(session())


@pytest.mark.parametrize(
    ("rule", "kind", "words"),
    [
        ({"question": ""}, ConfigError, "question"),
        ({"question": "is it red ? " * 200}, QuestionTooLong, "tokens"),
        ({"on_threshold": 0.2, "off_threshold": 0.9}, ConfigError, "off_threshold"),
        ({"on_threshold": 7}, ConfigError, "on_threshold"),
        ({"hold_s": -2}, ConfigError, "hold_s"),
    ],
)
def test_rules_that_cannot_be_watched(
    server: Server, rule: dict[str, Any], kind: type[EdgeVlmError], words: str
) -> None:
    async def session() -> None:
        async with await Client.connect(server.url, FILE) as client:
            await send(client, 0, 1)
            with pytest.raises(kind, match=words):
                await client.create_alert(**{"question": QUESTION, **rule})
            assert await client.list_alerts() == []
            assert (await client.ask(QUESTION)).status == "completed"

    run(session())


def test_too_many_alerts_and_room_after_deleting_one(server: Server) -> None:
    async def session() -> None:
        async with await Client.connect(server.url, FILE) as client:
            names = [(await client.create_alert(QUESTION)).alert_id for _ in range(3)]
            with pytest.raises(TooManyAlerts, match="3 alerts"):
                await client.create_alert(QUESTION)
            await client.delete_alert(names[0])
            await client.create_alert(QUESTION)

    run(session())


@pytest.mark.parametrize(
    "message",
    [
        {"type": "alert.create"},
        {"type": "alert.create", "question": 5},
        {"type": "alert.create", "question": "?", "on_threshold": "high"},
        {"type": "alert.create", "question": "?", "treshold": 0.5},
        {"type": "alert.delete"},
        {"type": "alert.delete", "alert_id": ["alert_1"]},
        {"type": "alert.list", "all": True},
    ],
)
def test_malformed_messages_about_alerts(server: Server, message: dict[str, Any]) -> None:
    async def session() -> None:
        async with connect(server.url) as raw:
            await raw.recv()
            await raw.send(json.dumps({**message, "event_id": "bad"}))
            event = await next_event(raw)
            assert event["type"] == "error"
            assert (event["error"]["code"], event["error"]["event_id"]) == ("E-PROTOCOL", "bad")
            await raw.send(json.dumps({"type": "alert.list", "event_id": "good"}))
            assert (await next_event(raw))["alerts"] == []

    run(session())


# ---- out of the server -----------------------------------------------------------------------


def test_a_server_sends_the_alerts_of_every_session_to_its_receivers() -> None:
    with WebServer() as web, AlertDispatcher([WebhookSink(web.url)]) as outputs:
        with Server.open(tiny_bundle(), threads=1, on_event=outputs.put) as server:
            server.start()

            async def session() -> str:
                async with await Client.connect(server.url, FILE) as client:
                    await client.create_alert(QUESTION, **ALWAYS)
                    await send(client, 0, 2)
                    await client.list_alerts()
                    return client.created.session_id

            names = [run(session()) for _ in range(2)]
        outputs.close()
    assert web.ids == [
        f"{name}/alert_1/1/{kind}"
        for name in names
        for kind in ("alert.triggered", "alert.cleared")
    ]
    assert web.taken[1]["reason"] == "session_closed"


# ---- the command line ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", num_frames=4)


def watch_arguments(video: Path, *more: str) -> list[str]:
    fixed = ["--source", str(video), "--fast", "--bundle", str(tiny_bundle()), "--threads", "1"]
    return [*fixed, "--alert", QUESTION, "--alert-on", "1e-6", "--alert-off", "0", *more]


def test_watch_tells_of_alerts_saves_their_pictures_and_sends_them(
    video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with WebServer() as web:
        arguments = ["--webhook", web.url, "--evidence", str(tmp_path / "pictures")]
        assert command_line(watch, watch_arguments(video, *arguments)) == 0
    lines = capsys.readouterr().out.splitlines()
    (begin,) = [line for line in lines if "begins" in line]
    assert begin.startswith(f"! {QUESTION}  begins at 0.0 s  [0.")
    assert any("ends at 1.5 s, after 1.5 s (session_closed)" in line for line in lines)
    assert any(line.startswith(f"alert '{QUESTION}': began once") for line in lines)
    assert [body["type"] for body in web.taken] == ["alert.triggered", "alert.cleared"]
    (picture,) = (tmp_path / "pictures").iterdir()
    assert picture.read_bytes()[:3] == b"\xff\xd8\xff"


@pytest.mark.parametrize("evidence", ["none", "small", "full"])
def test_watch_sends_as_much_of_the_picture_as_was_chosen(
    video: Path, tmp_path: Path, evidence: str
) -> None:
    """And saves the whole of it, if asked to."""
    folder, queue = tmp_path / "pictures", tmp_path / "queue.db"
    with WebServer() as web:
        arguments = ["--webhook", web.url, "--evidence", evidence, "--evidence", str(folder)]
        arguments += ["--alert-queue", str(queue)]
        assert command_line(watch, watch_arguments(video, *arguments)) == 0
    assert ("jpeg" in web.taken[0]["evidence"]) == (evidence != "none")
    (picture,) = folder.iterdir()
    assert picture.read_bytes()[:3] == b"\xff\xd8\xff"
    written = b"".join(path.read_bytes() for path in tmp_path.glob("queue.db*"))
    if evidence == "none":
        assert picture.read_bytes()[100:200] not in written


def test_watch_keeps_what_a_receiver_did_not_take_and_says_so(
    video: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outputs_module, "GRACE_S", 0.2)
    web = WebServer()
    arguments = ["--webhook", web.url, "--alert-queue", str(tmp_path / "queue.db")]
    assert command_line(watch, watch_arguments(video, *arguments)) == 13
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("edge-vlm: E-DELIVERY: alert events did not arrive: 2 for webhook")
    assert "queue.db" in error
    monkeypatch.setattr(outputs_module, "GRACE_S", TIMEOUT_S)
    with web:
        assert command_line(watch, watch_arguments(video, *arguments)) == 0
    assert len(web.taken) == 4
    assert [body["type"] for body in web.taken] == ["alert.triggered", "alert.cleared"] * 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--webhook", "somewhere"], 2, "webhook"),
        (["--mqtt", f"mqtt://127.0.0.1:{free_port()}"], 2, "MQTT topic"),
        (["--webhook", "http://127.0.0.1:1/", "--alert-queue", "/no/such/folder.db"], 2, "keep"),
        (["--alert", " "], 2, "question"),
        (["--alert-hold", "-1"], 2, "hold_s"),
        (["--alert", "is it red ? " * 200], 10, "tokens"),
    ],
)
def test_watch_refuses_what_makes_no_sense_in_one_line(
    video: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    assert command_line(watch, watch_arguments(video, *arguments)) == code
    err = capsys.readouterr().err
    assert words in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("library", "modules", "option"),
    [("httpx", ["webhook"], "--webhook"), ("aiomqtt", ["mqtt", "mqtt_connection"], "--mqtt")],
)
def test_a_missing_extra_is_named(
    video: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    library: str,
    modules: list[str],
    option: str,
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    for module in modules:
        monkeypatch.delitem(sys.modules, f"edge_vlm_runtime.alert_sinks.{module}", raising=False)
    assert command_line(watch, watch_arguments(video, option, "http://127.0.0.1/")) == 9
    assert "edge-vlm[alerts]" in capsys.readouterr().err


def test_the_live_view_shows_the_last_alerts() -> None:
    from rich.console import Console

    view = LiveTable(3, "clip.mp4 on tiny")
    for episode in range(1, 12):
        view.event(triggered(episode))
        view.event(cleared(episode))
    console = Console(record=True, width=100)
    console.print(view._render())
    text = console.export_text()
    assert text.count("begins at") == text.count("ends at") == 4
    assert "begins at 5.5 s" in text
    assert "after 0.2 s" in text


# ---- figures ---------------------------------------------------------------------------------


def test_footage_with_events_becomes_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watches = [
        LabelledAlert(question=QUESTION, events=[(0.5, 1.5)]),
        LabelledAlert(question="is it blue ?"),
    ]
    footage = [
        Footage(
            name=f"part{number}",
            jpegs=[jpeg(number * 10 + i) for i in range(4)],
            times_s=[0.5 * i for i in range(4)],
            watches=watches,
        )
        for number in range(2)
    ]
    assert write_event_set(tmp_path / "set", footage) == 2
    assert list(read_event_set(tmp_path / "set")) == footage
    arguments = [str(tmp_path / "set"), "--at", "0.00001:0", "--at", "1:0", "--threads", "1"]
    arguments += ["--bundle", str(tiny_bundle()), "--json", str(tmp_path / "out.json")]
    assert command_line(evaluate_alerts, arguments) == 0
    always, never = capsys.readouterr().out.splitlines()[1:]
    assert "0/2 0.0%" in always  # it began before the event, and for nothing
    assert "0/2 0.0%" in never
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["command"] == "edge-vlm eval-alerts set --at 0.00001:0 --at 1:0"
    figures = record["rules"]["0.00001:0"]
    assert (figures["events"], figures["false_alarms"], figures["repeats"]) == (2, 4, 0)
    assert figures["watched_hours"] == round(2 * 2 * 2.0 / 3600, 3)
    assert record["rules"]["1:0"]["false_alarms"] == 0
    assert command_line(evaluate_alerts, [*arguments[:1], "--at", "calibrated"]) == 2
    assert "there are none" in capsys.readouterr().err


def test_episodes_are_matched_with_events() -> None:
    score = Score()
    found = [(0.0, 0.5), (1.5, 2.0), (2.5, 5.0), (6.0, 6.5), (9.5, 10.0)]
    score.add(
        LabelledAlert(question="?", events=[(1.0, 4.0), (8.0, 9.0), (9.5, 9.9)]),
        [Episode(begin_s, end_s, 0.01) for begin_s, end_s in found],
        36.0,
    )
    assert (score.events.right, score.events.asked) == (2, 3)
    assert score.delays_s == [0.5, 0.0]
    assert score.overhangs_s == pytest.approx([-2.0, 0.1])
    assert (score.false_alarms, score.repeats) == (2, 1)
    assert score.false_per_hour == pytest.approx(200.0)


def test_slack_counts_as_the_calibration_does() -> None:
    """An alert that begins a little before or after its event has noticed it; what begins again
    near the next event has noticed that."""
    watch = LabelledAlert(question="?", events=[(2.0, 4.0), (5.0, 6.0)])
    begins_s = [1.5, 4.5, 7.5]
    episodes = [Episode(begin_s, begin_s + 0.1, 0.01) for begin_s in begins_s]
    exact, slack = Score(), Score(slack_s=1.0)
    for score in (exact, slack):
        score.add(watch, episodes, 36.0)
    assert (exact.events.right, exact.false_alarms) == (0, 3)
    series = Series(Watch("a", "?", "clip", 0, tuple(watch.events)), *_ups(begins_s), 1.0, 36.0)
    expected = outcome_of(Rule(0.5, 0.5), [series], 1.0)
    assert (slack.events.right, slack.false_alarms) == (2, 1)
    assert (expected.noticed, expected.false_alarms) == (2, 1)


def _ups(begins_s: list[float]) -> tuple[list[float], list[float]]:
    times_s = [0.5 * i for i in range(18)]
    return times_s, [float(time_s in begins_s) for time_s in times_s]


@pytest.mark.parametrize("text", ["0.5", "a:b", "0.5:0.6", "1:0:1:1:1:1", "2:1"])
def test_rules_on_the_command_line_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_rule(text)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"name": "a", "times_s": [0.0]}',
        '{"name": "a", "times_s": [0.0, 0.5], "watches": []}',
        '{"name": "a", "times_s": [0.0], "watches": [{"question": "?", "events": [[2, 1]]}]}',
    ],
)
def test_event_sets_that_are_broken_name_the_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "a-0.jpg").write_bytes(jpeg(1))
    (tmp_path / "footage.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match=r"footage\.jsonl:1"):
        list(read_event_set(tmp_path))
    with pytest.raises(ConfigError, match="no event set"):
        list(read_event_set(tmp_path / "nowhere"))
