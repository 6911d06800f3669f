"""Options from the command line, the environment and a file: which wins, and what is refused."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest

from edge_vlm.cli import Command
from edge_vlm.console.options import About, texts_of
from edge_vlm.errors import ConfigError
from edge_vlm.pruning.policies import POLICY_NAMES
from edge_vlm_runtime.cli.ask import ask
from edge_vlm_runtime.cli.common.alerts import rule_options
from edge_vlm_runtime.cli.common.arguments import PREFIX, build, flat, given, options_of
from edge_vlm_runtime.cli.common.config import configured, read_toml, resolve
from edge_vlm_runtime.cli.common.options import bundle_options, serve_options, server_options
from edge_vlm_runtime.cli.doctor import doctor
from edge_vlm_runtime.cli.serve import serve
from edge_vlm_runtime.cli.watch import watch
from edge_vlm_runtime.protocol.alerts import AlertRule
from edge_vlm_runtime.protocol.settings import ServerLimits, SessionSettings
from tests.runtime.command_line import command_line
from tests.runtime.server.live import TIMEOUT_S
from tests.tiny import ROOT, tiny_bundle


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(PREFIX):
            monkeypatch.delenv(name)


def parsed(command: Command, arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def serve_options_of(arguments: list[str], **environment: str) -> dict[str, Any]:
    settings, _ = resolve(flat(serve_options()), parsed(serve, arguments), environment)
    return {key: setting.value for key, setting in settings.items()}


def test_the_command_line_goes_before_variables_before_the_file_before_the_default(
    tmp_path: Path,
) -> None:
    file = tmp_path / "edge-vlm.toml"
    file.write_text('port = 1\nthreads = 1\nmax_sessions = 1\nhost = "::1"\n')
    found = serve_options_of(
        ["--config", str(file), "--port", "3"],
        EDGE_VLM_PORT="2",
        EDGE_VLM_THREADS="2",
    )
    assert (found["port"], found["threads"], found["max_sessions"]) == (3, 2, 1)
    assert (found["host"], found["backend"]) == ("::1", "ort")


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    file = tmp_path / "edge-vlm.toml"
    file.write_text("port = 7\n")
    assert serve_options_of([], EDGE_VLM_CONFIG=str(file))["port"] == 7


def test_every_kind_of_value(tmp_path: Path) -> None:
    file = tmp_path / "edge-vlm.toml"
    file.write_text(
        'tls = true\nwebhook = ["http://a", "http://b"]\nresume_grace = 2.5\nbundle = "model"\n'
    )
    found = serve_options_of(["--config", str(file)])
    assert found["tls"] is True
    assert found["webhook"] == ["http://a", "http://b"]
    assert found["resume_grace"] == 2.5
    assert found["bundle"] == tmp_path / "model"  # beside the file
    found = serve_options_of(
        [], EDGE_VLM_TLS="on", EDGE_VLM_WEBHOOK="http://a http://b", EDGE_VLM_BUNDLE="model"
    )
    assert (found["tls"], found["webhook"]) == (True, ["http://a", "http://b"])
    assert found["bundle"] == Path("model")


def test_repeated_options_replace_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "edge-vlm.toml"
    file.write_text('webhook = ["http://a"]\n')
    arguments = ["--config", str(file), "--webhook", "http://b", "--webhook", "http://c"]
    assert serve_options_of(arguments)["webhook"] == ["http://b", "http://c"]


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
        serve_options_of(["--config", str(file)])
    for part in [*said, str(file)]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("EDGE_VLM_PORT", "x", ["port must be a number", "EDGE_VLM_PORT"]),
        ("EDGE_VLM_HOST", "", ["host must be an address", "EDGE_VLM_HOST"]),
        ("EDGE_VLM_TLS", "maybe", ["tls must be true or false", "EDGE_VLM_TLS"]),
        ("EDGE_VLM_BACKEND", "tpu", ["backend cannot be 'tpu'", "EDGE_VLM_BACKEND"]),
        ("EDGE_VLM_CONFIG", "/nowhere.toml", ["cannot be read", "/nowhere.toml"]),
    ],
)
def test_what_is_wrong_in_the_environment_is_named(
    variable: str, value: str, said: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        serve_options_of([], **{variable: value})
    for part in said:
        assert part in str(caught.value)


def test_watch_and_ask_take_what_concerns_their_own_server(tmp_path: Path) -> None:
    file = tmp_path / "edge-vlm.toml"
    file.write_text('bundle = "/model"\nport = 1\nmax_sessions = 2\nrecord = "/recordings"\n')
    for command, arguments in (
        (watch, ["--source", "clip.mp4"]),
        (ask, ["clip.mp4", "What is it?"]),
        (doctor, []),
    ):
        args = parsed(command, [*arguments, "--config", str(file)])
        own, known = flat(bundle_options()), lambda: flat(serve_options())
        found, warnings = resolve(own, args, {"EDGE_VLM_PORT": "2"}, known)
        assert found["bundle"].value == Path("/model")
        assert set(found) == {"bundle", "threads", "backend", "engines", "calibration"}
        assert warnings == []


def run_server(arguments: list[str], **environment: str) -> tuple[str, str]:
    """What a real `edge-vlm serve` says until it serves and is stopped, or fails."""
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_vlm", "serve", "--bundle", str(tiny_bundle()), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "runtime")]),
            **environment,
        },
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=TIMEOUT_S)
    return first + out, err


def test_what_kubernetes_injects_stops_no_server(tmp_path: Path) -> None:
    """A Service named edge-vlm sets these in every container of its namespace."""
    file = tmp_path / "edge-vlm.toml"
    file.write_text("port = 0\n")
    out, err = run_server(
        ["--config", str(file)],
        EDGE_VLM_SERVICE_HOST="10.0.0.1",
        EDGE_VLM_SERVICE_PORT="8765",
        EDGE_VLM_SERVICE_PORT_HTTP="8765",
        EDGE_VLM_PORT="tcp://10.0.0.1:8765",
        EDGE_VLM_PORT_8765_TCP="tcp://10.0.0.1:8765",
        EDGE_VLM_PORT_8765_TCP_PROTO="tcp",
        EDGE_VLM_PORT_8765_TCP_PORT="8765",
        EDGE_VLM_PORT_8765_TCP_ADDR="10.0.0.1",
        EDGE_VLM_HOST="localhost",  # and one of ours
    )
    assert "serving" in out
    assert "http://localhost:" in out
    assert "stopped" in out
    assert err.count("\n") == 1
    assert "EDGE_VLM_PORT=tcp://10.0.0.1:8765" in err
    assert "EDGE_VLM_SERVICE_HOST" in err
    assert "Kubernetes" in err
    assert "enableServiceLinks: false" in err


def test_a_variable_that_is_no_option_is_named_once_and_ignored() -> None:
    out, err = run_server(["--port", "0"], EDGE_VLM_PRT="1", EDGE_VLM_XYZ="SECRET")
    assert "serving" in out
    assert sorted(err.splitlines()) == [
        "edge-vlm: the variable EDGE_VLM_PRT is no option and ignored; did you mean EDGE_VLM_PORT?",
        "edge-vlm: the variable EDGE_VLM_XYZ is no option and ignored",
    ]


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (["--max-sessions", "0"], {}, "max_sessions must be at least 1, got 0 (command line)"),
        (["--keep-ratio", "2"], {}, "keep_ratio must be in (0, 1], got 2.0 (command line)"),
        ([], {"EDGE_VLM_TEMPERATURE": "11"}, "temperature must be in 0..10, got 11.0 (EDGE_VLM_T"),
        ([], {"EDGE_VLM_THREADS": "0"}, "threads must be 1 to 256, got 0 (EDGE_VLM_THREADS)"),
        (["--threads", "9999"], {}, "threads must be 1 to 256, got 9999 (command line)"),
        ([], {"EDGE_VLM_ATTENTION": "x"}, "only one of frame, exact, last_n (EDGE_VLM_ATTENTION)"),
        ([], {"EDGE_VLM_FPS": "nan"}, "fps must be a number, got 'nan' (EDGE_VLM_FPS)"),
        (["--allowed-host", "http://x"], {}, "not the name of a host: 'http://x'"),
        (["--allow-origin", "camera"], {}, "not an origin: 'camera'"),
        ([], {"EDGE_VLM_ALLOW_ORIGIN": "http://a b"}, "not an origin: 'b'"),
        (["--window-tokens", "1"], {}, "window_tokens"),
    ],
)
def test_what_is_out_of_range_is_one_coded_line(
    arguments: list[str],
    variables: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert command_line(serve, ["--bundle", str(tiny_bundle()), "--port", "0", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("edge-vlm: E-CONFIG: ")
    assert err.count("\n") == 1
    assert said in err


def test_every_limit_and_setting_is_an_option_with_a_text(tmp_path: Path) -> None:
    for kind in (ServerLimits, SessionSettings):
        assert set(texts_of(kind)) == {field.name for field in dataclasses.fields(kind)}
    assert all(name in texts_of(SessionSettings)["policy"] for name in POLICY_NAMES)
    changed_limits = {
        name: value + (1 << 20) for name, value in dataclasses.asdict(ServerLimits()).items()
    }
    changed_settings = {
        **dict.fromkeys(("policy_seed", "min_cells", "last_n", "window_tokens"), 7),
        **dict.fromkeys(("max_cells", "payback_frames", "bank_frames"), 7),
        **dict.fromkeys(("max_answer_tokens", "history_turns", "seed"), 7),
        **dict.fromkeys(("keep_ratio", "top_p", "vision_tokens_per_s", "fps_cap"), 0.75),
        **{"change_threshold": 0.75, "reuse": 0.75, "reuse_refresh": 7},
        **dict.fromkeys(("duplicate_threshold", "heartbeat_s", "max_frame_age_s"), 0.75),
        **{"temperature": 0.75, "policy": "random", "attention": "exact"},
        **{"drop_duplicates": False, "instructions": 'Say "yes".'},
    }
    options = flat(serve_options())
    wanted: dict[type, dict[str, Any]] = {
        ServerLimits: changed_limits,
        SessionSettings: changed_settings,
    }
    values = {}
    for option in (option for option in options if option.owner in wanted):
        value = wanted[option.owner][option.field]
        values[option.key] = value if option.about.unit == 1 else value // option.about.unit
    file = tmp_path / "edge-vlm.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    arguments = [
        f"--no-{key.replace('_', '-')}" if value is False else f"--{key.replace('_', '-')}={value}"
        for key, value in values.items()
    ]
    variables = {f"EDGE_VLM_{key.upper()}": str(value) for key, value in values.items()}
    for line, environment in (
        (arguments, {}),
        (["--config", str(file)], {}),
        ([], variables),
    ):
        args = argparse.Namespace(**serve_options_of(line, **environment))
        found = server_options(args)
        assert dataclasses.asdict(found["limits"]) == changed_limits
        assert found["settings"] == changed_settings
    untouched = server_options(argparse.Namespace(**serve_options_of([])))
    assert (untouched["limits"], untouched["settings"]) == (ServerLimits(), {})


def test_defaults_stand_in_the_help_and_only_where_they_hold() -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    text = " ".join(parser.format_help().split())
    for part in ("(default: 8765)", "(default: 4096)", "(default: 0.15)", "(default: 30)"):
        assert part in text
    assert "Share of cells kept, (0, 1] --" in text  # the bundle's own
    parser = argparse.ArgumentParser()
    watch.add_arguments(parser)
    assert "before the alert begins (default: 0)" in " ".join(parser.format_help().split())


def test_alerts_are_declared_by_their_rule() -> None:
    arguments = ["--source", "x", "--alert-on", "0.9", "--alert-clear-hold", "2"]
    args = parsed(watch, arguments)
    rule = given(rule_options(), args)
    made = AlertRule(question="?", **rule)
    assert made == AlertRule(question="?", on_threshold=0.9, clear_hold_s=2.0)


def test_what_is_printed_gives_the_same_again_and_holds_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGE_VLM_API_KEY", "SECRET1")
    monkeypatch.setenv("EDGE_VLM_MQTT", "mqtt://me:SECRET2@broker/topic")
    monkeypatch.setenv("EDGE_VLM_WEBHOOK", "https://hooks.example.org/SECRET3?token=SECRET4")
    monkeypatch.setenv("EDGE_VLM_RECORD", str(tmp_path / 'a "quoted" ☂ name'))
    arguments = ["--session-memory", "512", "--tls", "--print-config"]
    assert command_line(serve, arguments) == 0
    printed = capsys.readouterr().out
    assert "SECRET" not in printed
    assert "mqtt://broker/..." in printed
    assert "https://hooks.example.org/..." in printed
    assert "session_memory = 512  # command line" in printed
    assert "port = 8765  # default" in printed
    assert "# EDGE_VLM_RECORD" in printed

    for name in ("API_KEY", "MQTT", "WEBHOOK", "RECORD"):
        monkeypatch.delenv(f"EDGE_VLM_{name}")
    file = tmp_path / "printed.toml"
    file.write_text(printed, encoding="utf-8")
    assert command_line(serve, ["--config", str(file), "--print-config"]) == 0
    again = tmp_path / "again.toml"
    again.write_text(capsys.readouterr().out, encoding="utf-8")
    assert read_toml(again) == read_toml(file)
    assert str(file) in again.read_text(encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Probe:
    count: Annotated[int, About("How many.")] = 1
    name: Annotated[list[str], About("May be repeated.")] = field(default_factory=list)
    calm: Annotated[bool, About("On by default.")] = True


def test_the_options_reach_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Probe] = []

    def run(args: argparse.Namespace) -> int:
        seen.append(build(Probe, args))
        return 0

    probe = configured(
        Command(add_arguments=lambda parser: None, run=run),
        lambda: {"": options_of(Probe)},
    )
    monkeypatch.setenv("EDGE_VLM_COUNT", "3")
    assert command_line(probe, []) == 0
    assert command_line(probe, ["--no-calm", "--name", "a", "--name", "b"]) == 0
    assert seen == [Probe(count=3), Probe(count=3, calm=False, name=["a", "b"])]
