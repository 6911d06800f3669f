"""Options from the command line, the environment and a file: which wins, and what is refused."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest

from edge_vlm.cli import Command
from edge_vlm.errors import ConfigError
from edge_vlm_runtime.cli import config as configuration
from edge_vlm_runtime.cli import serve as commands
from edge_vlm_runtime.cli.ask import ask
from edge_vlm_runtime.cli.shared import OWN_SERVER_KEYS
from edge_vlm_runtime.cli.watch import watch
from tests.runtime.command_line import command_line


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(configuration.PREFIX):
            monkeypatch.delenv(name)


def options_of(command: Command, arguments: list[str], **environment: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    settings = configuration.resolve(parser.parse_args(arguments), environment)
    return {key: setting.value for key, setting in settings.items()}


def serve_options(arguments: list[str], **environment: str) -> dict[str, Any]:
    return options_of(commands.serve, arguments, **environment)


def test_the_command_line_goes_before_variables_before_the_file_before_the_default(
    tmp_path: Path,
) -> None:
    file = tmp_path / "edge-vlm.toml"
    file.write_text('port = 1\nthreads = 1\nmax_sessions = 1\nhost = "::1"\n')
    found = serve_options(
        ["--config", str(file), "--port", "3"],
        EDGE_VLM_PORT="2",
        EDGE_VLM_THREADS="2",
    )
    assert (found["port"], found["threads"], found["max_sessions"]) == (3, 2, 1)
    assert (found["host"], found["backend"]) == ("::1", "ort")


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    file = tmp_path / "edge-vlm.toml"
    file.write_text("port = 7\n")
    assert serve_options([], EDGE_VLM_CONFIG=str(file))["port"] == 7


def test_every_kind_of_value(tmp_path: Path) -> None:
    file = tmp_path / "edge-vlm.toml"
    file.write_text(
        'tls = true\nwebhook = ["http://a", "http://b"]\nresume_grace = 2.5\nbundle = "model"\n'
    )
    found = serve_options(["--config", str(file)])
    assert found["tls"] is True
    assert found["webhook"] == ["http://a", "http://b"]
    assert found["resume_grace"] == 2.5
    assert found["bundle"] == tmp_path / "model"  # beside the file
    found = serve_options(
        [], EDGE_VLM_TLS="on", EDGE_VLM_WEBHOOK="http://a http://b", EDGE_VLM_BUNDLE="model"
    )
    assert (found["tls"], found["webhook"]) == (True, ["http://a", "http://b"])
    assert found["bundle"] == Path("model")


def test_repeated_options_replace_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "edge-vlm.toml"
    file.write_text('webhook = ["http://a"]\n')
    arguments = ["--config", str(file), "--webhook", "http://b", "--webhook", "http://c"]
    assert serve_options(arguments)["webhook"] == ["http://b", "http://c"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", ["unknown key 'prot'", "did you mean port", "max_sessions", "edge-vlm.toml"]),
        ('port = "x"', ["port must be a number", "'x'", "port = 8765"]),
        ("port = true", ["port must be a number"]),
        ("port = 1.5", ["port must be a number", "1.5"]),
        ("host = 1", ["host must be a text"]),
        ('tls = "yes"', ["tls must be true or false", "tls = true"]),
        ('webhook = "http://a"', ["webhook must be a list of texts"]),
        ("max_sessions = 0", ["max_sessions must be at least 1"]),
        ('backend = "tpu"', ["backend cannot be 'tpu'", "ort, cuda, trt"]),
        ("[serve]\nport = 1", ["unknown key 'serve'"]),
        ("port = ?", ["not TOML", "line 1"]),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, said: list[str]) -> None:
    file = tmp_path / "edge-vlm.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        serve_options(["--config", str(file)])
    for part in [*said, str(file)]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("EDGE_VLM_PRT", "1", ["EDGE_VLM_PRT", "did you mean EDGE_VLM_PORT"]),
        ("EDGE_VLM_PORT", "x", ["port must be a number", "EDGE_VLM_PORT"]),
        ("EDGE_VLM_TLS", "maybe", ["tls must be true or false", "EDGE_VLM_TLS"]),
        ("EDGE_VLM_BACKEND", "tpu", ["backend cannot be 'tpu'", "EDGE_VLM_BACKEND"]),
        ("EDGE_VLM_CONFIG", "/nowhere.toml", ["cannot be read", "/nowhere.toml"]),
    ],
)
def test_what_is_wrong_in_the_environment_is_named(
    variable: str, value: str, said: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        serve_options([], **{variable: value})
    for part in said:
        assert part in str(caught.value)


def test_watch_and_ask_take_what_concerns_their_own_server(tmp_path: Path) -> None:
    file = tmp_path / "edge-vlm.toml"
    file.write_text('bundle = "/model"\nport = 1\nmax_sessions = 2\nrecord = "/recordings"\n')
    for command, arguments in (
        (watch, ["--source", "clip.mp4"]),
        (ask, ["clip.mp4", "What is it?"]),
    ):
        found = options_of(command, [*arguments, "--config", str(file)], EDGE_VLM_PORT="2")
        assert found["bundle"] == Path("/model")
        assert set(found) == set(OWN_SERVER_KEYS)
        with pytest.raises(ConfigError, match="unknown key"):
            options_of(command, arguments, EDGE_VLM_NOTHING="2")


def test_what_is_printed_gives_the_same_again_and_holds_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGE_VLM_API_KEY", "SECRET1")
    monkeypatch.setenv("EDGE_VLM_MQTT", "mqtt://me:SECRET2@broker/topic")
    monkeypatch.setenv("EDGE_VLM_WEBHOOK", "https://hooks.example.org/SECRET3?token=SECRET4")
    monkeypatch.setenv("EDGE_VLM_RECORD", str(tmp_path / 'a "quoted" ☂ name'))
    arguments = ["--session-memory", "512", "--tls", "--print-config"]
    assert command_line(commands.serve, arguments) == 0
    printed = capsys.readouterr().out
    assert "SECRET" not in printed
    assert "mqtt://broker/..." in printed and "https://hooks.example.org/..." in printed
    assert "session_memory = 512  # command line" in printed
    assert "port = 8765  # default" in printed and "# EDGE_VLM_RECORD" in printed

    for name in ("API_KEY", "MQTT", "WEBHOOK", "RECORD"):
        monkeypatch.delenv(f"EDGE_VLM_{name}")
    file = tmp_path / "printed.toml"
    file.write_text(printed, encoding="utf-8")
    assert command_line(commands.serve, ["--config", str(file), "--print-config"]) == 0
    again = tmp_path / "again.toml"
    again.write_text(capsys.readouterr().out, encoding="utf-8")
    assert configuration.read_toml(again) == configuration.read_toml(file)
    assert str(file) in again.read_text(encoding="utf-8")


def test_the_options_reach_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[argparse.Namespace] = []

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--count", type=int, default=1, help="(default: %(default)s)")
        parser.add_argument("--name", action="append", default=[], dest="names")

    def run(args: argparse.Namespace) -> int:
        seen.append(args)
        return 0

    probe = configuration.configured(Command(add_arguments=add_arguments, run=run))
    monkeypatch.setenv("EDGE_VLM_COUNT", "3")
    assert command_line(probe, []) == 0
    assert (seen[0].count, seen[0].names) == (3, [])
    parser = argparse.ArgumentParser()
    probe.add_arguments(parser)
    assert "(default: 1)" in parser.format_help()
