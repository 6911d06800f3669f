"""Home Assistant by MQTT: what it is told through a real broker, and what it may ask."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

from edge_vlm.errors import ConfigError, NoFrameYet
from edge_vlm_runtime import protocol
from edge_vlm_runtime.home_assistant import bridge as bridge_module
from edge_vlm_runtime.home_assistant.bridge import HomeAssistant
from edge_vlm_runtime.home_assistant.entities import (
    ANSWER_TEMPLATE,
    Entity,
    Place,
    StreamEntities,
    safe_name,
)
from edge_vlm_runtime.home_assistant.states import WatchedAlert
from edge_vlm_runtime.protocol import alerts as messages
from tests.runtime.alerts.receivers import (
    MOSQUITTO,
    Broker,
    Home,
    cleared,
    triggered,
    wait_until,
)
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.ports import KeptPort
from tests.runtime.server.live import TIMEOUT_S

needs_broker = pytest.mark.skipif(
    MOSQUITTO is None, reason="no MQTT broker here (apt-get install mosquitto)"
)
QUESTION = "is there a red ball ?"
DOOR = {"door": [WatchedAlert(QUESTION, QUESTION)]}
BALL_NAME = safe_name(QUESTION)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end, all the time that a busy machine may need."""
    monkeypatch.setattr(bridge_module, "GRACE_S", TIMEOUT_S)


class Asked:
    """Answers that a server would give; keeps what it was asked."""

    def __init__(self) -> None:
        self.questions: list[tuple[str, str]] = []
        self.error: Exception | None = None
        self.answers = True
        self.waiting: list[Future[protocol.ResponseDone]] = []

    def __call__(self, stream: str, question: str) -> Future[protocol.ResponseDone]:
        self.questions.append((stream, question))
        future: Future[protocol.ResponseDone] = Future()
        if self.error is not None:
            future.set_exception(self.error)
        elif self.answers:
            future.set_result(done("a red ball"))
        else:
            self.waiting.append(future)
        return future


def done(text: str, status: str = "completed") -> protocol.ResponseDone:
    return protocol.ResponseDone(
        response_id="r1",
        status=status,
        finish_reason="stop",
        text=text,
        usage=protocol.Usage(vision_tokens=1, text_tokens=1, output_tokens=1),
        ttft_s=0.1,
        tokens_per_s=10.0,
        newest_frame=protocol.NewestFrame(frame_sequence=7, time_s=3.5, age_s=0.1),
        kv_tokens=2,
        time_offset_s=0.0,
        error_code="E-ENGINE" if status == "failed" else None,
    )


def created(text: str) -> protocol.ResponseCreated:
    newest = protocol.NewestFrame(frame_sequence=7, time_s=3.5, age_s=0.1)
    return protocol.ResponseCreated(response_id="r1", text=text, newest_frame=newest)


def alert_created(
    question: str = QUESTION, alert_id: str = "alert_1", name: str = ""
) -> messages.AlertCreated:
    return messages.AlertCreated(
        alert=messages.AlertStatus(
            alert_id=alert_id,
            rule=messages.AlertRule(question=question),
            state="idle",
            episodes=0,
            probability=None,
            answer_mass=None,
            frame_sequence=None,
            time_s=None,
            **({"name": name} if name else {}),
        )
    )


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with Broker(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture
def home(broker: Broker) -> Iterator[Home]:
    found = Home(broker)
    yield found
    found.catch_up()
    for topic in list(found.seen):  # what is retained is no business of the next test
        found.say(topic, b"", retain=True)
    found.close()


def bridge(broker: Broker, ask: Asked | None = None, **options: Any) -> HomeAssistant:
    url = f"mqtt://edge:s%20e%3Acret@127.0.0.1:{broker.port}"
    options = {"node": "box", "model": "demo", "first_back_off_s": 0.02, **options}
    return HomeAssistant(url, ask=ask or Asked(), **options)


BALL_CONFIG = f"homeassistant/binary_sensor/box/door__alert__{BALL_NAME}/config"
ENTITIES = sorted(
    [
        BALL_CONFIG,
        "homeassistant/binary_sensor/box/door__camera/config",
        "homeassistant/image/box/door__picture/config",
        "homeassistant/notify/box/door__ask/config",
        "homeassistant/sensor/box/door__answer/config",
        "homeassistant/text/box/door__ask/config",
    ]
)
STATUS = "edge-vlm/box/status"
DOOR_TOPIC = "edge-vlm/box/door"
BALL = f"{DOOR_TOPIC}/alert/{BALL_NAME}"


@needs_broker
def test_a_stream_is_a_device_and_its_alert_a_sensor(broker: Broker, home: Home) -> None:
    with bridge(broker) as bridged:
        bridged.declare(DOOR)
        wait_until(lambda: home.text(STATUS) == "online")
        assert home.configs == ENTITIES
        config = home.json(BALL_CONFIG)
        assert (config["name"], config["device"]["name"]) == (QUESTION, "door")
        assert config["state_topic"] == BALL
        wait_until(lambda: home.text(BALL) == "None")  # nobody watches yet: not known
        wait_until(lambda: home.text(f"{DOOR_TOPIC}/camera") == "offline")
        bridged.note("door", is_live=True)
        wait_until(lambda: home.text(f"{DOOR_TOPIC}/camera") == "online")
        bridged.put("door", alert_created())
        wait_until(lambda: home.text(BALL) == "OFF")
        bridged.put("door", triggered(1, jpeg(1)))
        wait_until(lambda: home.text(BALL) == "ON")
        details = home.json(f"{BALL}/details")
        assert (details["camera"], details["alert_name"]) == ("door", QUESTION)
        assert details["probability"] == 0.9
        wait_until(lambda: home.seen.get(f"{DOOR_TOPIC}/picture") == jpeg(1))
        bridged.put("door", cleared(1))
        wait_until(lambda: home.text(BALL) == "OFF")
        assert home.json(f"{BALL}/details")["lasted_s"] == 0.25
        # Who comes later has all of it: it is retained.
        late = Home(broker)
        wait_until(lambda: late.configs == ENTITIES and late.text(BALL) == "OFF")
        late.close()
    wait_until(lambda: home.text(STATUS) == "offline")
    assert home.configs == ENTITIES  # it comes back


@needs_broker
def test_what_is_no_more_is_taken_away(broker: Broker, home: Home) -> None:
    """While it runs, and what an earlier run left behind."""
    with bridge(broker) as bridged:
        bridged.declare({**DOOR, "yard": [WatchedAlert("cat", "Is there a cat?")]})
        wait_until(lambda: home.text(STATUS) == "online")
        assert len(home.configs) == 12
        bridged.put("door", alert_created("is it dark ?", "alert_2"))  # by a viewer
        wait_until(lambda: len(home.configs) == 13)
        bridged.put("door", messages.AlertDeleted(alert_id="alert_2"))
        wait_until(lambda: len(home.configs) == 12)
        bridged.declare(DOOR)
        wait_until(lambda: home.configs == ENTITIES)
        wait_until(lambda: not home.below("edge-vlm/box/yard/"))
        bridged.put("door", alert_created("is it dark ?", "alert_2", name="dark"))
        wait_until(lambda: len(home.configs) == 7)
        wait_until(lambda: home.text(f"{DOOR_TOPIC}/alert/dark") == "OFF")
        bridged.begin("door")  # a new session: what a viewer had made is gone
        wait_until(lambda: home.configs == ENTITIES and home.text(BALL) == "None")
        bridged.put("door", alert_created())
        wait_until(lambda: home.text(BALL) == "OFF")
        bridged.put("door", messages.AlertDeleted(alert_id="alert_1"))  # and is not made anew
        wait_until(lambda: home.text(BALL) == "None")
    other = "homeassistant/sensor/other_node/door__answer/config"
    home.say(other, "{}", retain=True)
    home.catch_up()  # what is seen below is of the next bridge
    with bridge(broker) as bridged:
        bridged.declare({"door": ()})
        wait_until(lambda: home.text(STATUS) == "online")
        wait_until(lambda: len(home.configs) == 6)
    assert other in home.configs  # of another server
    assert BALL_CONFIG not in home.configs
    wait_until(lambda: not home.below("/alert/"))


@needs_broker
def test_a_server_that_dies_is_said_to_be_offline_by_the_broker(broker: Broker, home: Home) -> None:
    with bridge(broker) as bridged:
        bridged.declare(DOOR)
        wait_until(lambda: home.text(STATUS) == "online")
        client = bridged._client
        assert client is not None
        sock = client._client.socket()
        assert isinstance(sock, socket.socket)
        home.heard.clear()
        sock.shutdown(2)  # no goodbye
        wait_until(lambda: (STATUS, b"offline") in home.heard)
        wait_until(lambda: home.text(STATUS) == "online")  # it comes back by itself


@needs_broker
def test_all_is_announced_again_when_home_assistant_starts(broker: Broker, home: Home) -> None:
    with bridge(broker) as bridged:
        bridged.declare(DOOR)
        wait_until(lambda: home.text(STATUS) == "online")
        home.heard.clear()
        home.say("homeassistant/status", "offline")
        home.say("homeassistant/status", "online")
        wait_until(lambda: {topic for topic, _ in home.heard} >= {*ENTITIES, BALL})


@needs_broker
def test_questions_come_by_mqtt_and_answers_go_back(broker: Broker, home: Home) -> None:
    asked = Asked()
    reply = f"{DOOR_TOPIC}/reply"
    with bridge(broker, asked) as bridged:
        bridged.declare(DOOR)
        wait_until(lambda: home.text(STATUS) == "online")
        home.say(f"{DOOR_TOPIC}/ask", "What is there?")
        wait_until(lambda: home.json(reply).get("answer") == "a red ball")
        assert asked.questions == [("door", "What is there?")]
        home.say(f"{DOOR_TOPIC}/ask", json.dumps({"question": "And now?", "id": "7"}))
        wait_until(lambda: home.json(reply).get("id") == "7")
        assert home.json(reply)["question"] == "And now?"

        # What anybody is answered is the sensor's state.
        bridged.put("door", created("Who is it?"))
        bridged.put("door", done("nobody"))
        answer = f"{DOOR_TOPIC}/answer"
        wait_until(lambda: home.json(answer).get("answer") == "nobody")
        assert home.json(answer)["question"] == "Who is it?"
        bridged.put("door", created("Who is it?"))
        bridged.put("door", done("", "failed"))
        wait_until(lambda: home.json(answer).get("error") == "E-ENGINE")


@needs_broker
@pytest.mark.parametrize(
    ("topic", "payload", "said"),
    [
        ("door", "", "the question is empty"),
        ("door", '{"id": "1"}', "the question is empty"),
        ("door", '{"question": 5}', "question must be a text"),
        ("door", '{"question": "a", "temperature": "1"}', "unknown field 'temperature'"),
        ("door", "{not json", "neither text nor JSON"),
        ("door", b"\xff\xfe", "neither text nor JSON"),
        ("door", b"x" * 17_000, "16000 at most"),
        ("garage", "What is there?", "there are edge-vlm/box/door"),
        ("door", "no frame", "E-NO-FRAME: no picture yet"),
        ("door", "bug", "E-INTERNAL"),
    ],
)
def test_what_is_wrong_with_a_question_is_the_reply(
    broker: Broker, home: Home, topic: str, payload: str | bytes, said: str
) -> None:
    asked = Asked()
    asked.error = KeyError("x") if payload == "bug" else NoFrameYet("no picture yet")
    with bridge(broker, asked) as bridged:
        bridged.declare(DOOR)
        wait_until(lambda: home.text(STATUS) == "online")
        home.say(f"edge-vlm/box/{topic}/ask", payload)
        reply = f"edge-vlm/box/{topic}/reply"
        wait_until(lambda: said in home.json(reply).get("error", ""))
        assert home.json(reply)["answer"] is None
        home.say(f"edge-vlm/box/{topic}/ask", b"old", retain=True)  # goes on all the same


@needs_broker
def test_too_many_questions_at_once_are_refused(broker: Broker, home: Home) -> None:
    asked = Asked()
    asked.answers = False
    with bridge(broker, asked) as bridged:
        bridged.declare(DOOR)
        wait_until(lambda: home.text(STATUS) == "online")
        for number in range(9):
            home.say(f"{DOOR_TOPIC}/ask", f"question {number}")
        wait_until(lambda: "E-TOO-MANY" in home.json(f"{DOOR_TOPIC}/reply").get("error", ""))
        assert len(asked.questions) == 8
        for future in asked.waiting:
            future.set_result(done("yes"))
        wait_until(lambda: home.json(f"{DOOR_TOPIC}/reply").get("answer") == "yes")


@needs_broker
def test_a_flood_of_questions_is_bounded(
    broker: Broker, home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    asked = Asked()
    asked.answers = False
    with bridge(broker, asked) as bridged:
        bridged.declare(DOOR)
        wait_until(lambda: home.text(STATUS) == "online")
        most = 0
        for _ in range(150):
            home.send(f"{DOOR_TOPIC}/ask", "What is there?")
            most = max(most, len(bridged._questions))
        wait_until(lambda: home.seen.get(f"{DOOR_TOPIC}/reply"))
        assert most <= 64
        assert len(asked.questions) == 8
        assert "E-TOO-MANY" in home.json(f"{DOOR_TOPIC}/reply")["error"]
        asked.answers = True
        for future in asked.waiting:
            future.set_result(done("yes"))
        # What is left of the flood may still be on its way: the bridge has all of it when it hears
        # what was said behind it.
        home.heard.clear()
        home.say("homeassistant/status", "online")
        wait_until(lambda: BALL_CONFIG in [topic for topic, _ in list(home.heard)])
        wait_until(lambda: not bridged._questions)
        home.say(f"{DOOR_TOPIC}/ask", json.dumps({"question": "And now?", "id": "after"}))
        wait_until(lambda: home.json(f"{DOOR_TOPIC}/reply").get("id") == "after")


@needs_broker
def test_two_servers_of_one_name_are_told(
    broker: Broker, home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    with bridge(broker) as one, bridge(broker, node="other") as third:
        for each in (one, third):
            each.declare(DOOR)
        wait_until(lambda: home.text("edge-vlm/other/status") == "online")
        wait_until(lambda: home.text(STATUS) == "online")
        assert len(home.configs) == 12
        assert "two servers" not in caplog.text
        with bridge(broker) as two:
            two.declare(DOOR)
            wait_until(lambda: caplog.text.count("two servers are called box") == 2)
    assert "cret" not in caplog.text


@needs_broker
def test_a_broker_that_is_not_there_yet_gets_the_newest_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    late = Broker(tmp_path)
    with bridge(late) as bridged:
        bridged.declare(DOOR)
        bridged.put("door", alert_created())
        for episode in range(1, 20):
            bridged.put("door", triggered(episode))
        wait_until(lambda: "what is new waits for it" in caplog.text)
        with late:
            home = Home(late)
            wait_until(lambda: home.text(BALL) == "ON")
            assert home.json(f"{BALL}/details")["episode"] == 19
            home.close()
            assert caplog.text.count("waits for it") == 1
            wait_until(lambda: "is back" in caplog.text)
            bridged.close()


def test_a_broker_that_is_never_there_holds_nothing_up() -> None:
    nobodys = KeptPort()
    address = f"mqtt://127.0.0.1:{nobodys.number}"
    with HomeAssistant(address, "box", Asked(), first_back_off_s=0.02) as bridged:
        bridged.declare(DOOR)
        bridged.put("door", protocol.Pong())


def test_names_are_made_safe_and_stay_apart() -> None:
    names = [
        "door",
        "Door",
        "front door",
        "front_door",
        "front__door",
        "Tür",
        "T r",
        "+/#",
        "_",
        "a.",
    ]
    made = [safe_name(name) for name in names]
    assert made[0] == "door"
    assert made[3] == "front_door"
    assert len(set(made)) == len(names)
    assert all(set(name) <= set(map(chr, range(128))) - set("+/# .") for name in made)
    assert not any("__" in name for name in made)
    assert safe_name("x" * 200) != safe_name("x" * 201)


@pytest.mark.parametrize(("node", "prefix"), [("a b", "homeassistant"), ("", "h"), ("a", "+/x")])
def test_what_cannot_be_a_topic_is_named(node: str, prefix: str) -> None:
    with pytest.raises(ConfigError, match=r"called|topic"):
        Place(node, prefix=prefix)


def test_without_pictures_there_is_no_entity_for_them() -> None:
    entities = StreamEntities(Place("box"), "door", "demo", with_pictures=False).fixed()
    assert not any("/image/" in entity.topic for entity in entities)


# ---- Home Assistant's own rules --------------------------------------------------------------

HERE = Path(__file__).parent
RECORDED = HERE.parents[1] / "data" / "home_assistant.json"


def all_entities() -> list[Entity]:
    entities = StreamEntities(Place("box"), 'Tür "1"', "demo", with_pictures=True)
    return [*entities.fixed(), entities.alert("Besuch?")]


def test_every_key_is_one_that_home_assistant_knows() -> None:
    """It drops others without a word. Recorded from its own schema."""
    known = json.loads(RECORDED.read_text())["keys"]
    entities = all_entities()
    assert {entity.topic.split("/")[1] for entity in entities} == known.keys()
    for entity in entities:
        prefix, component, node, object_id, config = entity.topic.split("/")
        assert (prefix, node, config) == ("homeassistant", "box", "config")
        assert re.fullmatch(r"[A-Za-z0-9_-]+", object_id)
        assert set(entity.config) <= set(known[component])
        assert json.loads(entity.payload) == entity.config
    ids = [(entity.topic.split("/")[1], entity.config["unique_id"]) for entity in entities]
    assert len(set(ids)) == len(ids)


def test_home_assistants_own_schema_takes_every_message() -> None:
    """And its own list of keys is the one that was recorded."""
    python = os.environ.get("EDGE_VLM_HOME_ASSISTANT")
    if python is None:
        pytest.skip("EDGE_VLM_HOME_ASSISTANT names no Python that has Home Assistant")
    script = str(HERE / "home_assistant_schema.py")
    messages_ = [(entity.topic.split("/")[1], entity.config) for entity in all_entities()]
    page = (HERE.parents[2] / "docs" / "home-assistant.md").read_text()
    automation = yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])

    def check(given: object) -> list[str]:
        ran = subprocess.run(
            [python, script], input=json.dumps(given), capture_output=True, text=True, check=True
        )
        found = json.loads(ran.stdout.splitlines()[-1])
        assert isinstance(found, list)
        return found

    assert check([*messages_, ("automation", automation)]) == []
    assert check([("automation", {**automation, "actions": [{"acton": "x"}]})])
    broken = [("sensor", {**messages_[1][1], "state_topics": "x", "qos": 9}), ("text", {})]
    assert len(check(broken)) == 2


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"answer": "a red ball"}, "a red ball"),
        ({"answer": None, "error": "E-NO-FRAME: none yet"}, "E-NO-FRAME: none yet"),
        ({"answer": "x" * 255}, "x" * 255),
        ({"answer": "x" * 300}, "x" * 254 + "…"),
    ],
)
def test_a_long_answer_is_cut_for_the_state(value: dict[str, Any], shown: str) -> None:
    assert jinja2.Template(ANSWER_TEMPLATE).render(value_json=value) == shown
