"""Alerts to real receivers that go away, come back, refuse or never answer."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import logging
import sqlite3
import ssl
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_vlm.errors import ConfigError, DeliveryError
from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm_runtime import protocol
from edge_vlm_runtime.alert_sinks import dispatcher as dispatcher_module
from edge_vlm_runtime.alert_sinks import queue as queue_module
from edge_vlm_runtime.alert_sinks.dispatcher import AlertDispatcher
from edge_vlm_runtime.alert_sinks.evidence import EvidenceSize
from edge_vlm_runtime.alert_sinks.mqtt import MqttSink
from edge_vlm_runtime.alert_sinks.queue import SCHEMA, DeliveryQueue, QueuedAlert
from edge_vlm_runtime.alert_sinks.webhook import WebhookSink
from tests.runtime.alerts.receivers import (
    MOSQUITTO,
    Broker,
    Disk,
    OldBroker,
    SilentServer,
    Subscriber,
    WebServer,
    cleared,
    make_certificate,
    some_events,
    triggered,
    wait_until,
)
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.ports import KeptPort
from tests.runtime.server.live import TIMEOUT_S

LARGE = encode_jpeg(np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8))
QUICK: Any = {"first_back_off_s": 0.02, "attempt_timeout_s": TIMEOUT_S}
"""Tries again at once what failed, and takes no slow receiver for one that does not answer: what it
took would come once more, and that it does not answer would be all that is said of it."""


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end, all the time that a busy machine may need."""
    monkeypatch.setattr(dispatcher_module, "GRACE_S", TIMEOUT_S)
    monkeypatch.setattr(queue_module, "CLOSE_TIMEOUT_S", TIMEOUT_S)


def expected_ids(session: str, first: int, last: int) -> list[str]:
    return [
        f"{session}/alert_1/{episode}/{kind}"
        for episode in range(first, last + 1)
        for kind in ("alert.triggered", "alert.cleared")
    ]


@pytest.fixture
def web() -> Iterator[WebServer]:
    with WebServer() as server:
        yield server


# ---- webhook ---------------------------------------------------------------------------------


def test_a_webhook_gets_every_begin_and_end_with_its_picture(web: WebServer) -> None:
    sinks = [WebhookSink(web.url)]
    with AlertDispatcher(sinks, wall_clock=lambda: 1_000_000_000.5, **QUICK) as outputs:
        for event in (triggered(1, jpeg(1)), cleared(1)):
            outputs.put("session", event)
        outputs.put("session", protocol.Pong())  # not about an alert
    assert web.ids == expected_ids("session", 1, 1)
    begin, end = web.taken
    assert begin["at"] == "2001-09-09T01:46:40.500+00:00"
    assert (begin["question"], begin["probability"]) == ("is there a red ball ?", 0.9)
    assert base64.b64decode(begin["evidence"]["jpeg"]) == jpeg(1)
    assert begin["evidence"]["frame_sequence"] == 1
    assert (end["type"], end["reason"], end["lasted_s"]) == ("alert.cleared", "probability", 0.25)
    assert "evidence" not in end
    assert outputs.delivered == 2
    assert outputs.lost == 0
    outputs.raise_undelivered()


def test_nothing_is_lost_when_the_receiver_restarts(
    web: WebServer, caplog: pytest.LogCaptureFixture
) -> None:
    url = web.url.replace("http://", "http://user:secret@")
    with AlertDispatcher([WebhookSink(url)], **QUICK) as outputs:
        for event in some_events(1, 3):
            outputs.put("s", event)
        wait_until(lambda: outputs.delivered == 6)  # what is taken and not answered comes again
        web.stop()
        for event in some_events(4, 6):
            outputs.put("s", event)
        wait_until(lambda: "does not take alerts" in caplog.text)
        web.start()
        wait_until(lambda: len(web.taken) == 12)
        wait_until(lambda: "is back" in caplog.text)
        web.status = 503  # up again, but not ready yet
        for event in some_events(7, 8):
            outputs.put("s", event)
        posts = web.posts
        wait_until(lambda: web.posts > posts + 1)
        web.status = 200
        wait_until(lambda: len(web.taken) == 16)
    assert web.ids == expected_ids("s", 1, 8)
    assert outputs.lost == 0
    assert "secret" not in caplog.text


def test_what_a_receiver_refuses_does_not_hold_up_the_rest(
    web: WebServer, caplog: pytest.LogCaptureFixture
) -> None:
    web.status = 422
    with AlertDispatcher([WebhookSink(web.url)], **QUICK) as outputs:
        outputs.put("s", triggered(1))
        wait_until(lambda: outputs.lost == 1)
        web.status = 200
        outputs.put("s", cleared(1))
    assert web.ids == ["s/alert_1/1/alert.cleared"]
    assert "refused" in caplog.text


def test_a_receiver_that_never_answers_costs_only_its_own_events(web: WebServer) -> None:
    """Its queue is bounded, the other receiver gets everything, ending does not hang."""
    queue = DeliveryQueue(max_events=5)
    with SilentServer() as silent:
        sinks = [WebhookSink(f"http://127.0.0.1:{silent.port}/"), WebhookSink(web.url)]
        outputs = AlertDispatcher(sinks, queue, **QUICK)
        outputs.start()
        for number, event in enumerate(some_events(1, 20), start=1):
            outputs.put("s", event)
            wait_until(lambda n=number: outputs.delivered == n)
        outputs.close(grace_s=0.1)
    assert web.ids == expected_ids("s", 1, 20)
    assert outputs.undelivered == {sinks[0].name: 5}
    assert outputs.lost == 35
    with pytest.raises(DeliveryError, match="5 for webhook"):
        outputs.raise_undelivered()
    outputs.put("s", triggered(21))  # too late, and said so
    assert outputs.lost == 37


def test_events_survive_the_end_of_the_process_in_a_file(web: WebServer, tmp_path: Path) -> None:
    file = tmp_path / "alerts.db"
    web.stop()
    first = AlertDispatcher([WebhookSink(web.url)], DeliveryQueue(file), **QUICK)
    first.start()
    for event in some_events(1, 2):
        first.put("s", event)
    first.close(grace_s=0.1)
    assert sum(first.undelivered.values()) == 4
    with pytest.raises(DeliveryError, match=r"alerts\.db"):
        first.raise_undelivered()
    web.start()
    with AlertDispatcher([WebhookSink(web.url)], DeliveryQueue(file), **QUICK) as second:
        for event in some_events(3, 3):
            second.put("s", event)
    assert web.ids == expected_ids("s", 1, 3)
    assert base64.b64decode(web.taken[0]["evidence"]["jpeg"]) == jpeg(1)
    assert not second.undelivered


@pytest.mark.parametrize(
    "url", ["ftp://host/x", "http://", "alerts", "http://host:99999/", "http://[::1/x"]
)
def test_what_is_not_a_webhook_is_said_so(url: str) -> None:
    with pytest.raises(ConfigError, match="webhook"):
        WebhookSink(url)


def test_credentials_of_a_bad_url_are_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        WebhookSink("ftp://user:secret@host/x")
    assert "secret" not in str(caught.value)


def test_user_and_password_are_sent_and_not_logged(
    web: WebServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = web.url.replace("http://", "http://edge:s%20e%3Acret@")
    with AlertDispatcher([WebhookSink(url)], **QUICK) as outputs:
        outputs.put("s", triggered(1))
    expected = "Basic " + base64.b64encode(b"edge:s e:cret").decode()
    assert web.authorizations == [expected]
    assert "httpx" in caplog.text  # it logs what it requests
    for secret in ("cret", expected.split()[1]):
        assert secret not in caplog.text


def test_a_redirect_is_not_followed(web: WebServer, caplog: pytest.LogCaptureFixture) -> None:
    with WebServer() as elsewhere, AlertDispatcher([WebhookSink(web.url)], **QUICK) as outputs:
        web.status, web.location = 307, elsewhere.url
        outputs.put("s", triggered(1))
        wait_until(lambda: web.posts > 1)
        web.status, web.location = 200, None
        outputs.close()
    assert elsewhere.posts == 0
    assert "HTTP status 307" in caplog.text
    assert web.ids == ["s/alert_1/1/alert.triggered"]


@pytest.mark.parametrize("trusted", [True, False])
def test_a_webhook_over_tls_is_believed_if_the_system_trusts_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trusted: bool,
) -> None:
    certificate = make_certificate(tmp_path)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, tmp_path / "key.pem")
    with WebServer(context) as web:
        outputs = AlertDispatcher([WebhookSink(web.url)], **QUICK)
        outputs.start()
        outputs.put("s", triggered(1))
        if not trusted:
            wait_until(lambda: "certificate" in caplog.text)
        outputs.close(grace_s=TIMEOUT_S if trusted else 0.0)
    assert web.posts == (1 if trusted else 0)


def test_a_picture_too_large_for_a_receiver_costs_the_picture_only(
    web: WebServer, caplog: pytest.LogCaptureFixture
) -> None:
    web.max_bytes = 1000
    with AlertDispatcher([WebhookSink(web.url)], **QUICK) as outputs:
        for event in (triggered(1, LARGE), cleared(1), triggered(2, LARGE)):
            outputs.put("s", event)
    assert web.ids == [*expected_ids("s", 1, 1), "s/alert_1/2/alert.triggered"]
    assert [body.get("evidence", {}).get("jpeg") for body in web.taken] == [None] * 3
    assert web.taken[0]["evidence"]["frame_sequence"] == 1
    assert outputs.lost == 0
    assert web.posts == 3 + 3  # found out once: not whole, not 64 kB, not 4 kB
    assert caplog.text.count("does not take pictures of") == 1


def test_a_receiver_gets_as_much_of_a_picture_as_it_takes(
    web: WebServer, caplog: pytest.LogCaptureFixture
) -> None:
    web.max_bytes = 8000
    with AlertDispatcher([WebhookSink(web.url)], **QUICK) as outputs:
        outputs.put("s", triggered(1, LARGE))
    assert 500 < len(base64.b64decode(web.taken[0]["evidence"]["jpeg"])) <= 4000
    assert "they are sent smaller" in caplog.text


@pytest.mark.parametrize("evidence", EvidenceSize)
def test_how_much_of_the_picture_goes_out_can_be_chosen(
    web: WebServer, caplog: pytest.LogCaptureFixture, evidence: EvidenceSize
) -> None:
    queue = DeliveryQueue()
    sink = WebhookSink(web.url, evidence)
    with_pictures = evidence is not EvidenceSize.NONE
    with AlertDispatcher([sink], queue, with_pictures=with_pictures, **QUICK) as outputs:
        outputs.put("s", triggered(1, LARGE))
    picture = web.taken[0]["evidence"].get("jpeg")
    size = 0 if picture is None else len(base64.b64decode(picture))
    low, high = {"none": (0, 0), "small": (1000, 16_000), "full": (len(LARGE), len(LARGE))}[
        evidence
    ]
    assert low <= size <= high
    assert caplog.text == ""


# ---- the queue -------------------------------------------------------------------------------


def test_a_queue_is_bounded_by_bytes_for_each_receiver() -> None:
    queue = DeliveryQueue(max_bytes=1000)
    assert [queue.put("a", "x" * 100, bytes(300)) for _ in range(4)] == [0, 0, 1, 1]
    assert queue.put("b", "{}", None) == 0
    assert (queue.count("a"), queue.count("b")) == (2, 1)
    assert queue.put("a", "x", bytes(5000)) == 2  # the newest is kept even so
    assert queue.count("a") == 1


def contents(queue: DeliveryQueue, receiver: str) -> list[tuple[str, bytes | None]]:
    """Takes everything out."""
    seen = []
    while (delivery := queue.oldest(receiver)) is not None:
        seen.append((delivery.body, delivery.jpeg))
        queue.remove(receiver, delivery.number)
    return seen


def test_a_queue_hands_out_in_order() -> None:
    queue = DeliveryQueue()
    for number in range(3):
        queue.put("a", str(number), b"picture" if number == 1 else None)
    assert contents(queue, "a") == [("0", None), ("1", b"picture"), ("2", None)]


def test_files_that_cannot_hold_a_queue(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database, " * 100)
    taken = DeliveryQueue(tmp_path / "taken.db")
    for path in (text, tmp_path / "no" / "folder.db", tmp_path / "taken.db"):
        with pytest.raises(ConfigError, match="cannot keep"):
            DeliveryQueue(path)
    taken.close()
    DeliveryQueue(tmp_path / "taken.db").close()


def test_a_file_with_pages_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "alerts.db"
    queue = DeliveryQueue(file)
    for _ in range(50):
        queue.put("a", "x" * 2000, None)
    queue.close()
    damaged = bytearray(file.read_bytes())
    for start in range(4096, len(damaged), 4096):
        damaged[start : start + 64] = bytes([0xA5] * 64)
    file.write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"cannot keep.*alerts\.db"):
        DeliveryQueue(file).load({"a": "a"})


# What may happen to a disk while a server runs: full, locked by a backup, a page that went bad.
ONE = '{"id": "one"}'
TROUBLES = [
    sqlite3.OperationalError("database or disk is full"),
    sqlite3.OperationalError("database is locked"),
    sqlite3.DatabaseError("database disk image is malformed"),
]


def rows_of(file: Path) -> list[str]:
    with sqlite3.connect(file) as database:
        rows = [body for (body,) in database.execute("SELECT body FROM deliveries ORDER BY number")]
    database.close()
    return rows


@pytest.mark.parametrize("error", TROUBLES, ids=str)
def test_a_disk_in_trouble_holds_up_no_alert_and_sends_none_twice(
    web: WebServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, error: sqlite3.Error
) -> None:
    file, disk = tmp_path / "alerts.db", Disk()
    queue = DeliveryQueue(file, connect=disk.connect, first_back_off_s=0.01)
    with AlertDispatcher([WebhookSink(web.url)], queue, **QUICK) as outputs:
        for event in some_events(1, 2):
            outputs.put("s", event)
        wait_until(lambda: len(web.taken) == 4)
        web.status = 503
        for event in some_events(3, 3):
            outputs.put("s", event)
        wait_until(lambda: queue.is_saved)
        disk.error, web.status = error, 200  # these are on the disk and cannot be deleted
        for event in some_events(4, 4):
            outputs.put("s", event)
        wait_until(lambda: len(web.taken) == 8)
        wait_until(lambda: disk.failures > 3)
        disk.error = None
        wait_until(lambda: queue.is_saved)
        for event in some_events(5, 5):
            outputs.put("s", event)
    assert web.ids == expected_ids("s", 1, 5)
    assert (outputs.delivered, outputs.lost, outputs.undelivered) == (10, 0, {})
    assert caplog.text.count(f"wait in memory alone: {error}") == 1  # not for every attempt
    assert caplog.text.count("takes alert events again") == 1
    assert rows_of(file) == []


def test_what_the_disk_did_not_take_is_kept_in_memory_and_written_later(
    web: WebServer, tmp_path: Path
) -> None:
    file, disk = tmp_path / "alerts.db", Disk()
    queue = DeliveryQueue(file, max_events=3, connect=disk.connect, first_back_off_s=0.01)
    web.stop()
    outputs = AlertDispatcher([WebhookSink(web.url)], queue, **QUICK)
    outputs.start()
    disk.error = TROUBLES[0]
    for event in some_events(1, 2):
        outputs.put("s", event)
    assert outputs.lost == 1  # bounded, and said
    wait_until(lambda: disk.failures > 1)
    assert not queue.is_saved
    disk.error = None
    wait_until(lambda: queue.is_saved)
    outputs.close(grace_s=0.0)
    assert [json.loads(body)["id"] for body in rows_of(file)] == expected_ids("s", 1, 2)[1:]


def test_a_disk_that_stays_full_is_not_called_a_place_where_alerts_are_kept(
    web: WebServer, tmp_path: Path
) -> None:
    disk = Disk()
    web.stop()
    queue = DeliveryQueue(tmp_path / "alerts.db", connect=disk.connect)
    outputs = AlertDispatcher([WebhookSink(web.url)], queue, **QUICK)
    outputs.start()
    disk.error = TROUBLES[0]
    outputs.put("s", triggered(1))
    outputs.close(grace_s=0.0)
    with pytest.raises(DeliveryError, match=r"1 for webhook.*did not take all of them"):
        outputs.raise_undelivered()


def test_a_disk_that_stands_still_holds_up_neither_alerts_nor_the_end(
    web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_module, "CLOSE_TIMEOUT_S", 0.1)
    disk = Disk()
    disk.turns.clear()
    queue = DeliveryQueue(tmp_path / "alerts.db", connect=disk.connect)
    web.status = 503
    with AlertDispatcher([WebhookSink(web.url)], queue, **QUICK) as outputs:
        for event in some_events(1, 2):
            outputs.put("s", event)
        # All that is delivered before the writer looks would never have to be written.
        assert disk.is_waited_for.wait(TIMEOUT_S)
        web.status = 204
        wait_until(lambda: len(web.taken) == 4)
    assert web.ids == expected_ids("s", 1, 2)
    assert not queue.is_saved
    disk.turns.set()


def test_what_arrived_while_the_disk_was_full_comes_once_more_at_most(tmp_path: Path) -> None:
    """The process ends before the row could be deleted: at least once, and once more after it."""
    file, disk = tmp_path / "alerts.db", Disk()
    queue = DeliveryQueue(file, connect=disk.connect)
    queue.put("a", ONE, None)
    wait_until(lambda: queue.is_saved)
    disk.error = TROUBLES[0]
    assert contents(queue, "a") == [(ONE, None)]
    queue.close()
    for expected in ([(ONE, None)], []):
        queue = DeliveryQueue(file)
        queue.load({"a": "a"})
        assert contents(queue, "a") == expected
        queue.close()


def test_a_real_disk_that_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SQLite's own refusal: a file that may not grow."""
    file = tmp_path / "alerts.db"
    made: list[sqlite3.Connection] = []

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        made.append(sqlite3.connect(*arguments, **options))
        return made[-1]

    queue = DeliveryQueue(file, connect=connect, first_back_off_s=0.01)
    made[0].execute("PRAGMA max_page_count = 8")
    queue.put("a", "large", bytes(100_000))
    wait_until(lambda: "database or disk is full" in caplog.text)
    made[0].execute("PRAGMA max_page_count = 100000")
    wait_until(lambda: queue.is_saved)
    assert queue.count("a") == 1
    queue.close()
    assert rows_of(file) == ["large"]


# ---- receivers that differ in credentials alone ------------------------------------------------


class Taker:
    """A receiver that takes everything, or fails as it is told to."""

    trouble = "it does not answer"

    def __init__(self, url: str) -> None:
        sink = WebhookSink(url)
        self.name, self.key = sink.name, sink.key
        self.error: Exception | None = None
        self.attempts = 0
        self.taken: list[str] = []

    async def send(self, delivery: QueuedAlert) -> None:
        self.attempts += 1
        if self.error is not None:
            raise self.error
        self.taken.append(json.loads(delivery.body)["id"])

    async def close(self) -> None: ...


ANN, BOB = "http://ann:one@127.0.0.1:9/hook", "http://bob:two@127.0.0.1:9/hook"


def test_receivers_that_differ_in_credentials_alone_get_everything_once(tmp_path: Path) -> None:
    file = tmp_path / "alerts.db"
    ann, bob = Taker(ANN), Taker(BOB)
    assert ann.name == bob.name
    assert ann.key != bob.key
    assert Taker(ANN).key == ann.key  # after a restart, too
    bob.error = DeliveryError("away")
    outputs = AlertDispatcher([ann, bob], DeliveryQueue(file), **QUICK)
    outputs.start()
    for event in some_events(1, 2):
        outputs.put("s", event)
    wait_until(lambda: outputs.delivered == 4)
    outputs.close(grace_s=0.0)
    assert ann.taken == expected_ids("s", 1, 2)
    assert (outputs.delivered, outputs.undelivered) == (4, {bob.name: 4})
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"two" not in written
    assert b"bob" not in written
    ann, bob = Taker(ANN), Taker(BOB)
    with AlertDispatcher([ann, bob], DeliveryQueue(file), **QUICK):
        pass
    assert (ann.taken, bob.taken) == ([], expected_ids("s", 1, 2))


def test_what_an_earlier_version_kept_is_delivered(tmp_path: Path) -> None:
    """It knew both by one name, and kept every event once for each of them."""
    file = tmp_path / "alerts.db"
    bodies = [json.dumps({"id": f"s/{number}"}) for number in range(3)]
    with sqlite3.connect(file) as database:
        database.executescript(SCHEMA)
        database.executemany(
            "INSERT INTO deliveries (receiver, body) VALUES (?, ?)",
            [
                *[("webhook http://***@127.0.0.1:9/hook", body) for body in bodies for _ in "ab"],
                ("webhook http://plain/", bodies[0]),
            ],
        )
    database.close()
    takers = [Taker(ANN), Taker(BOB), Taker("http://plain/")]
    with AlertDispatcher(takers, DeliveryQueue(file), **QUICK):
        pass
    assert [taker.taken for taker in takers] == [["s/0", "s/1", "s/2"]] * 2 + [["s/0"]]
    assert rows_of(file) == []


def test_a_bug_in_a_receiver_does_not_end_its_alerts(caplog: pytest.LogCaptureFixture) -> None:
    taker = Taker(ANN)
    taker.error = KeyError("evidence")
    with AlertDispatcher([taker], **QUICK) as outputs:
        outputs.put("s", triggered(1))
        wait_until(lambda: taker.attempts > 2)
        taker.error = None
        wait_until(lambda: taker.taken == ["s/alert_1/1/alert.triggered"])
    assert "Traceback" in caplog.text
    assert "KeyError: 'evidence'" in caplog.text
    assert "is back" in caplog.text
    assert caplog.text.count("does not take alerts") == 1


def test_outputs_that_cannot_start_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(main: Coroutine[Any, Any, None]) -> None:
        main.close()
        raise OSError("too many open files")

    monkeypatch.setattr(asyncio, "run", refuse)
    with pytest.raises(OSError, match="too many"):
        AlertDispatcher([Taker(ANN)]).start()


# ---- MQTT ------------------------------------------------------------------------------------

needs_broker = pytest.mark.skipif(
    MOSQUITTO is None, reason="no MQTT broker here (apt-get install mosquitto)"
)


def mqtt_url(port: int, password: str = "s%20e%3Acret") -> str:
    return f"mqtt://edge:{password}@127.0.0.1:{port}/home/alerts"


@needs_broker
def test_nothing_is_lost_when_the_broker_restarts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    topic = "home/alerts"
    with Broker(tmp_path) as broker:
        subscriber = Subscriber(broker, topic)
        with AlertDispatcher([MqttSink(mqtt_url(broker.port))], attempt_timeout_s=1.0) as outputs:
            for event in some_events(1, 2):
                outputs.put("s", event)
            wait_until(lambda: len(subscriber.bodies(topic)) == 4)
            broker.stop()
            for event in some_events(3, 4):
                outputs.put("s", event)
            wait_until(lambda: "does not take alerts" in caplog.text)
            broker.start()
            outputs.close(grace_s=TIMEOUT_S)
        # At least once: an event may come twice, none may be missing or out of order.
        wait_until(lambda: len({body["id"] for body in subscriber.bodies(topic)}) == 8)
        subscriber.close()
    ids = list(dict.fromkeys(body["id"] for body in subscriber.bodies(topic)))
    assert ids == expected_ids("s", 1, 4)
    assert not outputs.undelivered
    assert outputs.lost == 0
    pictures = [payload for name, payload in subscriber.messages if name == f"{topic}/evidence"]
    assert list(dict.fromkeys(pictures)) == [jpeg(episode) for episode in range(1, 5)]
    assert "cret" not in caplog.text


@needs_broker
@pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket")  # paho's, of a failed handshake
@pytest.mark.parametrize("trusted", [True, False])
def test_a_broker_over_tls_is_believed_if_the_system_trusts_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trusted: bool,
) -> None:
    certificate = make_certificate(tmp_path)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with Broker(tmp_path, certificate) as broker:
        url = mqtt_url(broker.port).replace("mqtt://", "mqtts://")
        outputs = AlertDispatcher([MqttSink(url)], **QUICK)
        outputs.start()
        outputs.put("s", triggered(1))
        if not trusted:
            wait_until(lambda: "certificate" in caplog.text)
        outputs.close(grace_s=TIMEOUT_S if trusted else 0.0)
    assert outputs.delivered == (1 if trusted else 0)
    gc.collect()


@needs_broker
def test_a_broker_that_refuses_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Broker(tmp_path) as broker:
        sink = MqttSink(mqtt_url(broker.port, password="wrong"))
        outputs = AlertDispatcher([sink], **QUICK)
        outputs.start()
        outputs.put("s", triggered(1))
        wait_until(lambda: "does not take alerts" in caplog.text)
        outputs.close(grace_s=0.0)
    assert "Not authorized" in caplog.text
    assert outputs.undelivered == {sink.name: 1}


@needs_broker
def test_a_broker_that_takes_small_packets_gets_every_alert(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    topic = "home/alerts"
    with Broker(tmp_path, max_packet_bytes=5000) as broker:
        subscriber = Subscriber(broker, topic)
        with AlertDispatcher([MqttSink(mqtt_url(broker.port))], **QUICK) as outputs:
            for event in (triggered(1, LARGE), cleared(1), triggered(2, LARGE)):
                outputs.put("s", event)
        assert outputs.delivered == 3
        wait_until(lambda: len(subscriber.messages) == 5)
        subscriber.close()
    names = [name for name, _ in subscriber.messages]
    assert names == [topic, f"{topic}/evidence", topic, topic, f"{topic}/evidence"]
    assert [body["id"] for body in subscriber.bodies(topic)] == [
        *expected_ids("s", 1, 1),
        "s/alert_1/2/alert.triggered",
    ]
    pictures = [payload for name, payload in subscriber.messages if name != topic]
    assert all(500 < len(picture) < 5000 for picture in pictures)
    assert outputs.lost == 0
    assert caplog.text.count("they are sent smaller") == 1
    assert "does not take alerts" not in caplog.text  # it was known beforehand


@pytest.mark.parametrize(("most", "size"), [(6000, 4000), (700, 0)])
@pytest.mark.parametrize("says_so", [True, False])
def test_a_broker_that_cuts_the_connection_for_a_picture_gets_every_alert(
    caplog: pytest.LogCaptureFixture, says_so: bool, most: int, size: int
) -> None:
    with (
        OldBroker(most, says_so=says_so) as broker,
        AlertDispatcher([MqttSink(mqtt_url(broker.port))], **QUICK) as outputs,
    ):
        for event in (triggered(1, LARGE), cleared(1), triggered(2, LARGE)):
            outputs.put("s", event)
        wait_until(lambda: outputs.delivered == 3)
    bodies = [json.loads(payload) for name, payload in broker.taken if name == "home/alerts"]
    assert [body["id"] for body in bodies] == [  # none twice, though the connection broke
        *expected_ids("s", 1, 1),
        "s/alert_1/2/alert.triggered",
    ]
    pictures = [payload for name, payload in broker.taken if name != "home/alerts"]
    assert len(pictures) == (2 if size else 0)
    assert all(len(picture) <= size for picture in pictures)
    refused = len(broker.refused_bytes)
    assert "never retrieved" not in caplog.text
    assert refused == (4 if size else 6)  # twice each: whole, 64 kB, 4 kB; later ones never
    assert caplog.text.count("does not take pictures of") == 1


@pytest.mark.parametrize("kind", ["webhook", "mqtt"])
@pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket")  # paho's, of a failed handshake
def test_a_certificate_that_is_not_trusted_is_said_with_the_way_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    if kind == "mqtt" and MOSQUITTO is None:
        pytest.skip("no MQTT broker here")
    certificate = make_certificate(tmp_path)
    with ExitStack() as stack:
        sink: MqttSink | WebhookSink
        if kind == "mqtt":
            broker = stack.enter_context(Broker(tmp_path, certificate))
            sink = MqttSink(mqtt_url(broker.port).replace("mqtt://", "mqtts://"))
        else:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, tmp_path / "key.pem")
            sink = WebhookSink(stack.enter_context(WebServer(context)).url)
        outputs = AlertDispatcher([sink], **QUICK)
        outputs.start()
        outputs.put("s", triggered(1))
        wait_until(lambda: "does not take alerts" in caplog.text)
        outputs.close(grace_s=0.0)
    assert "certificate is not trusted: self" in caplog.text
    assert "SSL_CERT_FILE" in caplog.text
    with pytest.raises(DeliveryError, match=r"not trusted: self.*SSL_CERT_FILE"):
        outputs.raise_undelivered()
    gc.collect()


@needs_broker
@pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket")  # paho's, of a failed handshake
def test_tls_where_there_is_none_and_none_where_there_is_tls(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "plain").mkdir()
    certificate = make_certificate(tmp_path)
    with Broker(tmp_path, certificate) as secure, Broker(tmp_path / "plain") as plain:
        sinks = [
            MqttSink(mqtt_url(secure.port)),
            MqttSink(mqtt_url(plain.port).replace("mqtt://", "mqtts://")),
        ]
        outputs = AlertDispatcher(sinks, **QUICK)
        outputs.start()
        outputs.put("s", triggered(1))
        wait_until(lambda: caplog.text.count("does not take alerts") == 2)
        outputs.close(grace_s=0.0)
    assert "for a port with TLS write mqtts://" in caplog.text
    assert "does it speak TLS on this port?" in caplog.text
    gc.collect()


def test_a_broker_that_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    nobodys = KeptPort()
    outputs = AlertDispatcher([MqttSink(mqtt_url(nobodys.number))], **QUICK)
    outputs.start()
    outputs.put("s", triggered(1))
    wait_until(lambda: "cannot be reached" in caplog.text)
    outputs.close(grace_s=0.0)
    assert sum(outputs.undelivered.values()) == 1
    assert "cret" not in caplog.text


def test_a_broker_that_never_answers_holds_nothing_up() -> None:
    with SilentServer() as silent:
        queue = DeliveryQueue(max_events=3)
        outputs = AlertDispatcher(
            [MqttSink(mqtt_url(silent.port))],
            queue,
            first_back_off_s=0.01,
            attempt_timeout_s=0.05,
        )
        outputs.start()
        for event in some_events(1, 10):
            outputs.put("s", event)
        wait_until(lambda: outputs.lost == 17)
        outputs.close(grace_s=0.1)
    assert sum(outputs.undelivered.values()) == 3


@pytest.mark.parametrize(
    "url", ["mqtt://host", "mqtt://host/a/#", "mqtt://host/+/b", "http://host:1/a", "mqtt:///a"]
)
def test_what_is_not_an_mqtt_topic_is_said_so(url: str) -> None:
    with pytest.raises(ConfigError, match="MQTT topic"):
        MqttSink(url)


def test_receivers_are_named_without_credentials() -> None:
    assert MqttSink(mqtt_url(1883)).name == "mqtt mqtt://***@127.0.0.1:1883/home/alerts"
    assert WebhookSink("https://u:p@host/x").name == "webhook https://***@host/x"
