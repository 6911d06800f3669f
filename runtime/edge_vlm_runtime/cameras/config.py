"""Cameras that a server owns, and what is watched for in them: the tables of its file.

[[camera]]
name = "door"
source = "rtsp://user:password@192.168.1.20/stream1"   # as --source of `watch`
keep_ratio = 0.3
fps = 2
record = "recordings"                                  # a folder; true: that of `record`
settings = { policy = "stream", instructions = "Answer in one word." }

[[alert]]
name = "visitor"
camera = "door"
question = "Is there a person at the door now?"
on_threshold = 0.8                                     # the fields of alert.create
sinks = ["phone"]                                      # default: all

Light to import.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_vlm.errors import ConfigError, VideoError
from edge_vlm_runtime.protocol.alerts import AlertRule
from edge_vlm_runtime.sources.masking import mask_credentials

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
NAME_RULE = "up to 64 letters, digits, _, - and ., the first a letter or digit"
SESSION_ID = re.compile(r"[0-9a-f]{16}")
CAMERA_KEYS = ("name", "source", "keep_ratio", "fps", "record", "settings")
RULE_KEYS = tuple(each.name for each in dataclasses.fields(AlertRule))
ALERT_KEYS = ("name", "camera", *RULE_KEYS, "sinks")
OWN_SETTINGS = ("delivery", "raw_frames", "subtitles")
"""Settings that the server chooses for its cameras."""
OTHER_NAMES = {"keep_ratio": "keep_ratio", "fps_cap": "fps"}
"""Settings that have a key of their own."""


@dataclass(frozen=True, kw_only=True)
class CameraConfig:
    """One `[[camera]]`."""

    name: str
    source: str = field(repr=False)
    """As `open_source` takes it; a relative path is made absolute. May hold a password."""
    fps: float | None = None
    """None: the server's rate."""
    record: Path | bool | None = None
    """A folder; True: the server's own, which there must be; False: never; None: as the server
    does with all sessions."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of SessionSettings, `keep_ratio` among them."""

    @property
    def shown_source(self) -> str:
        return mask_credentials(self.source)


@dataclass(frozen=True, kw_only=True)
class AlertConfig:
    """One `[[alert]]`; its name is the only one of that camera's."""

    name: str
    camera: str
    rule: AlertRule
    sinks: tuple[str, ...] | None = None
    """Names of receivers, or their addresses; None: all."""


@dataclass(frozen=True, kw_only=True)
class CameraPlan:
    """What one file asks for."""

    cameras: tuple[CameraConfig, ...] = ()
    alerts: tuple[AlertConfig, ...] = ()

    def alerts_of(self, camera: str) -> tuple[AlertConfig, ...]:
        return tuple(alert for alert in self.alerts if alert.camera == camera)

    def lines(self) -> list[str]:
        """Each camera and its alerts, for people; no password is shown."""
        told = []
        for camera in self.cameras:
            names = ", ".join(alert.name for alert in self.alerts_of(camera.name))
            alerts = f"  (alerts: {names})" if names else ""
            told.append(f"camera {camera.name}: {camera.shown_source}{alerts}")
        return told

    def sinks_of(self, camera: str, alert: str) -> tuple[str, ...] | None:
        """Where an alert goes; None: to all."""
        named = (each for each in self.alerts_of(camera) if each.name == alert)
        return next((each.sinks for each in named), None)


def read_plan(table: Mapping[str, Any], file: Path) -> CameraPlan:
    """The plan in a file's table. Raises ConfigError naming the file, the table, the key and what
    is near it."""
    sinks = {str(each.get("name")) for each in _tables(table, "sink", file)}
    cameras: list[CameraConfig] = []
    for place, each in _places(table, "camera", file):
        camera = _camera(each, place, file.absolute().parent)
        if any(other.name == camera.name for other in cameras):
            raise ConfigError(f"there are two cameras called {camera.name!r}", where=place)
        _require_own_street(camera, cameras, place)
        cameras.append(camera)
    names = [camera.name for camera in cameras]
    alerts: list[AlertConfig] = []
    for place, each in _places(table, "alert", file):
        alert = _alert(each, place, names, sinks)
        if any((other.camera, other.name) == (alert.camera, alert.name) for other in alerts):
            raise ConfigError(
                f"camera {alert.camera!r} has two alerts called {alert.name!r}", where=place
            )
        alerts.append(alert)
    return CameraPlan(cameras=tuple(cameras), alerts=tuple(alerts))


def _tables(table: Mapping[str, Any], kind: str, file: Path) -> list[dict[str, Any]]:
    found = table.get(kind, [])
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ConfigError(f"{kind} must be tables", where=file, remedy=f"write [[{kind}]]")
    return found


def _places(table: Mapping[str, Any], kind: str, file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each table, and how it is called in messages."""
    return [
        (f"{file}, [[{kind}]] {mask_credentials(repr(each.get('name', number)))}", each)
        for number, each in enumerate(_tables(table, kind, file), 1)
    ]


def _camera(table: Mapping[str, Any], place: str, beside: Path) -> CameraConfig:
    _require_known(table, CAMERA_KEYS, place)
    name = _name(table, place)
    if SESSION_ID.fullmatch(name):
        raise ConfigError("16 hexadecimal digits are the name of a session", where=place)
    source = _text(table, "source", place)
    settings = _settings(table, place)
    fps = _number(table, "fps", place)
    if fps is not None and not 0 < fps < 1000:
        raise ConfigError(f"fps must be in 0..1000, 0 excluded, got {fps:g}", where=place)
    record = table.get("record")
    if isinstance(record, str) and record:
        record = beside / Path(record).expanduser()
    if not (record is None or isinstance(record, (bool, Path))):
        raise ConfigError(
            f"record must be true, false or a folder, got {mask_credentials(repr(record))}",
            where=place,
        )
    return CameraConfig(
        name=name,
        source=_resolved(source, fps, place, beside),
        fps=fps,
        record=record,
        settings=settings,
    )


def _require_own_street(camera: CameraConfig, others: Collection[CameraConfig], place: str) -> None:
    """Raises ConfigError where another camera would show the very same pictures."""
    from edge_vlm_runtime.sources.street import is_street, seed_of

    if not is_street(camera.source):
        return
    seed = seed_of(camera.source)
    for other in others:
        if is_street(other.source) and seed_of(other.source) == seed:
            raise ConfigError(
                f"camera {other.name!r} shows the demo street {seed} already",
                where=place,
                remedy=f'another seed, such as source = "demo:{(seed + 1) % 1000}"',
            )


def _resolved(source: str, fps: float | None, place: str, beside: Path) -> str:
    """A relative path is meant from the file's folder."""
    from edge_vlm_runtime.sources.open import STANDARD_INPUT, is_path, require_source

    if source == STANDARD_INPUT:
        raise ConfigError("a server's camera is not its standard input", where=place)
    try:
        require_source(source, fps)
    except VideoError as error:
        what = f"source {error.where!r}: {error.what}"
        raise ConfigError(what, where=place, remedy=error.remedy) from error
    return str(beside / Path(source).expanduser()) if is_path(source) else source


def _settings(table: Mapping[str, Any], place: str) -> dict[str, Any]:
    from edge_vlm_runtime.protocol.settings import CLIP, SessionSettings

    given = table.get("settings", {})
    if not isinstance(given, dict):
        raise ConfigError("settings must be a table", where=place, remedy="settings = { ... }")
    known = {each.name for each in dataclasses.fields(SessionSettings)}
    inside = f"{place}, settings"
    _require_known(given, sorted(known - {*OWN_SETTINGS, *OTHER_NAMES}), inside)
    settings = dict(given)
    if "keep_ratio" in table:
        settings["keep_ratio"] = _number(table, "keep_ratio", place)
    try:
        SessionSettings(**settings)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error), where=place) from error
    if settings.get("policy") == CLIP:
        raise ConfigError("the policy clip is for finished files, not for cameras", where=inside)
    return settings


def _alert(
    table: Mapping[str, Any], place: str, cameras: Collection[str], sinks: Collection[str]
) -> AlertConfig:
    _require_known(table, ALERT_KEYS, place)
    name = _name(table, place)
    camera = _text(table, "camera", place)
    if camera not in cameras:
        near = _near(camera, cameras)
        known = ", ".join(cameras) or "none"
        raise ConfigError(
            f"there is no camera {camera!r}", where=place, remedy=f"{near}there are: {known}"
        )
    _text(table, "question", place)
    fields = {key: table[key] for key in RULE_KEYS if key in table}
    for key in fields:
        if key in ("evidence", "report_checks"):
            if not isinstance(fields[key], bool):
                raise ConfigError(f"{key} must be true or false", where=place)
        elif key != "question":
            _number(table, key, place)
    try:
        rule = AlertRule(**fields)
    except ConfigError as error:
        raise ConfigError(error.what, where=place) from error
    return AlertConfig(
        name=name, camera=camera, rule=rule, sinks=_sinks(table.get("sinks"), place, sinks)
    )


def _sinks(given: Any, place: str, known: Collection[str]) -> tuple[str, ...] | None:
    if given is None:
        return None
    if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
        raise ConfigError(f"sinks must be a list of names, got {given!r}", where=place)
    for each in given:
        if each not in known and "://" not in each:
            there = ", ".join(sorted(known)) or "none"
            raise ConfigError(
                f"there is no sink {each!r}",
                where=place,
                remedy=f"{_near(each, known)}there are: {there}",
            )
    return tuple(given)


# ---- values ----------------------------------------------------------------------------------


def _require_known(table: Mapping[str, Any], known: Collection[str], place: str) -> None:
    for key in table:
        if key not in known:
            raise ConfigError(
                f"unknown key {key!r}",
                where=place,
                remedy=f"{_near(key, known)}valid keys: {', '.join(known)}; what the server is "
                "given stands above the first [[...]]",
            )


def _near(given: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(given, sorted(known), n=1)
    return f"did you mean {near[0]}? " if near else ""


def _text(table: Mapping[str, Any], key: str, place: str) -> str:
    value = table.get(key)
    if value is None:
        raise ConfigError(f"{key} is missing", where=place, remedy=f'such as {key} = "..."')
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{key} must be a text, got {mask_credentials(repr(value))}", where=place)
    return value


def _name(table: Mapping[str, Any], place: str) -> str:
    name = _text(table, "name", place)
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"name must be {NAME_RULE}, got {mask_credentials(repr(name))}", where=place
        )
    return name


def _number(table: Mapping[str, Any], key: str, place: str) -> float | None:
    value = table.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(
            f"{key} must be a number, got {mask_credentials(repr(value))}", where=place
        )
    try:
        number = float(value)
    except OverflowError:
        raise ConfigError(f"{key} is a number of very many digits", where=place) from None
    if not math.isfinite(number):
        raise ConfigError(f"{key} must be a finite number, got {value!r}", where=place)
    return number
