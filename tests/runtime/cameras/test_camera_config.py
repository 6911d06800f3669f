"""`[[camera]]` and `[[alert]]`: what is wrong is named with file, table, key and what is near."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_vlm.errors import ConfigError
from edge_vlm_runtime.cameras.config import read_plan
from edge_vlm_runtime.cli.common.config import read_toml

DOOR = '[[camera]]\nname = "door"\nsource = "rtsp://user:secret@cam.local/1"\n'
VISITOR = '[[alert]]\nname = "visitor"\ncamera = "door"\nquestion = "Is there a person now?"\n'


def plan_of(tmp_path: Path, text: str) -> Any:
    file = tmp_path / "edge-vlm.toml"
    file.write_text(text)
    return read_plan(read_toml(file), file)


def test_a_whole_plan(tmp_path: Path) -> None:
    text = (
        DOOR
        + "keep_ratio = 0.3\nfps = 1\nrecord = 'kept'\nsettings = { instructions = 'Be short.' }\n"
        + "[[camera]]\nname = 'clip'\nsource = 'films/clip.mp4'\n"
        + VISITOR
        + "on_threshold = 0.8\noff_threshold = 0.2\nhold_s = 2\nsinks = ['phone']\n"
        + VISITOR.replace("door", "clip")
        + "[[sink]]\nname = 'phone'\nurl = 'http://127.0.0.1/'\n"
    )
    plan = plan_of(tmp_path, text)
    door, clip = plan.cameras
    assert dict(door.settings) == {"keep_ratio": 0.3, "instructions": "Be short."}
    assert (door.fps, door.record) == (1.0, tmp_path / "kept")
    assert door.shown_source == "rtsp://***@cam.local/1"
    assert "secret" not in repr(door)
    assert clip.source == str(tmp_path / "films/clip.mp4")
    assert plan.lines()[0] == "camera door: rtsp://***@cam.local/1  (alerts: visitor)"
    [visitor] = plan.alerts_of("door")
    assert (visitor.rule.on_threshold, visitor.rule.hold_s) == (0.8, 2)
    assert plan.sinks_of("door", "visitor") == ("phone",)
    assert plan.sinks_of("clip", "visitor") is None


def test_what_is_wrong_shows_no_password(tmp_path: Path) -> None:
    for text in (
        "[[camera]]\nname = 'door'\nsource = ['rtsp://user:secret@cam.local/1']",
        "[[camera]]\nname = 'rtsp://user:secret@cam.local/1'\nsource = 'webcam'",
    ):
        with pytest.raises(ConfigError) as caught:
            plan_of(tmp_path, text)
        assert "secret" not in str(caught.value)
        assert "cam.local" in str(caught.value)


WRONG = {
    "an option of the server below a camera": (
        DOOR + "home_assistant = 'mqtt://box'",
        r"unknown key 'home_assistant'.*server is given stands above the first",
    ),
    "unknown key of a camera": (
        DOOR + "keep_rato = 0.3",
        r"'keep_rato'.*toml.*'door'.*keep_ratio",
    ),
    "unknown key of an alert": (
        DOOR + VISITOR + "holds = 1",
        r"unknown key.*'visitor'.*mean hold_s",
    ),
    "unknown setting": (DOOR + "settings = { kep_ratio = 1 }", "unknown key.*'door', settings"),
    "a setting of the server's": (DOOR + "settings = { delivery = 'wait' }", "unknown key 'deliv"),
    "a clip's policy": (DOOR + "settings = { policy = 'clip' }", "for finished files"),
    "two cameras of one name": (DOOR + DOOR, r"there are two cameras called 'door'.*toml"),
    "two alerts of one name": (DOOR + VISITOR + VISITOR, "two alerts called 'visitor'"),
    "unknown camera": (DOOR + VISITOR.replace("door", "dor"), "no camera 'dor'.*did you mean door"),
    "no camera at all": (VISITOR, "no camera 'door'.*there are: none"),
    "unknown sink": (DOOR + VISITOR + "sinks = ['phone']", "no sink 'phone'.*there are: none"),
    "no name": ("[[camera]]\nsource = 'webcam'", "name is missing"),
    "no source": ("[[camera]]\nname = 'door'", "source is missing"),
    "no question": (DOOR + "[[alert]]\nname = 'a'\ncamera = 'door'", "question is missing"),
    "a name for a URL": (DOOR.replace('"door"', '"front door/1"'), "name must be up to 64 letters"),
    "a session's name": (DOOR.replace('"door"', '"0123456789abcdef"'), "name of a session"),
    "a ratio": (DOOR + "keep_ratio = 2", r"keep_ratio must be in \(0, 1\].*got 2"),
    "a rate": (DOOR + "fps = 0", "fps must be in"),
    "a text for a number": (DOOR + "fps = '2'", "fps must be a number"),
    "a number for a folder": (DOOR + "record = 1", "record must be true, false or a folder"),
    "a threshold": (DOOR + VISITOR + "on_threshold = 2", r"on_threshold must be in \[0, 1\]"),
    "thresholds": (DOOR + VISITOR + "on_threshold = 0.2", "off_threshold must not be above"),
    "a text for a switch": (DOOR + VISITOR + "evidence = 'yes'", "evidence must be true or false"),
    "standard input": (DOOR.replace("rtsp://user:secret@cam.local/1", "-"), "standard input"),
    "no such protocol": (
        DOOR.replace("rtsp://user:secret@cam.local/1", "foo://u:secret@x"),
        r"source 'foo://.*'door'.*a video file, webcam",
    ),
    "no host": (DOOR.replace("user:secret@cam.local", ""), "no host.*'door'.*rtsp://HOST"),
    "no number of a webcam": (
        DOOR.replace("rtsp://user:secret@cam.local/1", "webcam:abc"),
        "webcam: wants a number.*webcam:0",
    ),
    "no pipeline": (DOOR.replace("rtsp://user:secret@cam.local/1", "gst:"), "wants a pipeline"),
    "a time without end": (DOOR + VISITOR + "hold_s = inf", "hold_s must be a finite number"),
    "a ratio that is no number": (DOOR + "keep_ratio = nan", "keep_ratio must be a finite"),
    "no table": ("camera = 'door'", r"camera must be tables.*write \[\[camera\]\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case: str, tmp_path: Path) -> None:
    text, message = WRONG[case]
    with pytest.raises(ConfigError, match=message) as caught:
        plan_of(tmp_path, text)
    assert "secret" not in str(caught.value)
