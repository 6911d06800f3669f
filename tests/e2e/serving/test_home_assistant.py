"""The page about Home Assistant, with a broker: its file is served, its topics are there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_vlm_runtime.demo.paths import DEMO_FOLDER
from tests.runtime.alerts.receivers import MOSQUITTO, Broker, Home, wait_until
from tests.runtime.server.live import TIMEOUT_S

pytestmark = pytest.mark.skipif(
    MOSQUITTO is None, reason="no MQTT broker here (apt-get install mosquitto)"
)
PAGE = Path(__file__).parents[3] / "docs" / "home-assistant.md"
DOOR = "edge-vlm/jetson/door"
VISITOR = f"{DOOR}/alert/visitor"
VISITOR_CONFIG = "homeassistant/binary_sensor/jetson/door__alert__visitor/config"


def block(kind: str) -> str:
    (found,) = re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return str(found)


def in_place(text: str, address: str) -> str:
    """The page's file with a camera and a broker that there are, and a question of the demo."""
    for there, here in {
        "mqtt://edge:password@homeassistant.local": address,
        "rtsp://user:password@192.168.1.20/stream1": str(DEMO_FOLDER / "clip.mp4"),
        "Is there a person at the door now?": "Is there a mushroom now?",
    }.items():
        assert there in text
        text = text.replace(there, here)
    return 'port = 0\nnode = "jetson"\n' + text


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    (tmp_path / "broker").mkdir()
    rights = re.findall(r"```\n(user edge\n.*?)```", PAGE.read_text(), re.DOTALL)
    with Broker(tmp_path / "broker", rights=rights[0]) as running:
        yield running


def test_the_pages_file_brings_a_camera_into_home_assistant(tmp_path: Path, broker: Broker) -> None:
    file, log = tmp_path / "edge-vlm.toml", tmp_path / "log"
    file.write_text(in_place(block("toml"), broker.url))
    home = Home(broker, user=Broker.READER)
    command = [sys.executable, "-m", "edge_vlm", "serve", "--config", str(file)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def soon(condition: object) -> None:
        assert callable(condition)
        wait_until(lambda: process.poll() is not None or condition())
        assert process.poll() is None, log.read_text()

    try:
        soon(lambda: home.text("edge-vlm/jetson/status") == "online")
        assert VISITOR_CONFIG in home.configs
        soon(lambda: home.text(VISITOR) == "ON")
        details = home.json(f"{VISITOR}/details")
        assert (details["camera"], details["alert_name"]) == ("door", "visitor")
        soon(lambda: home.seen.get(f"{DOOR}/picture", b"").startswith(b"\xff\xd8\xff"))
        (payload,) = re.findall(r"payload: '(\{.*\})'", block("yaml"))
        home.say(f"{DOOR}/ask", payload)
        soon(lambda: home.json(f"{DOOR}/reply").get("id") == "visitor")
        assert home.json(f"{DOOR}/reply")["answer"]
        question = json.loads(payload)["question"]
        soon(lambda: home.json(f"{DOOR}/answer").get("question") == question)
        file.write_text(file.read_text().partition("[[alert]]")[0])
        soon(lambda: VISITOR_CONFIG not in home.configs)
        soon(lambda: VISITOR not in home.seen)
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0, log.read_text()
        wait_until(lambda: home.text("edge-vlm/jetson/status") == "offline")
    finally:
        process.kill()
        process.wait()
        home.close()
    assert "cret" not in log.read_text()
