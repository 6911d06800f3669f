"""Reads Dockerfiles, and runs that of the CPU without Docker:

    python -m tests.deployment.dockerfile

makes a scratch folder, does there what each instruction says (paths below that folder, a fresh
virtual environment in place of the base image, no user), then starts the entry point, waits for
the health check and ends it as Docker would. It says what it does and fails where an image would.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docker"
PLACES = ("/src", "/wheels", "/opt/edge-vlm", "/data")
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Instruction:
    name: str
    text: str

    @property
    def words(self) -> list[str]:
        """Of the exec form."""
        found = json.loads(self.text)
        assert isinstance(found, list)
        return found


def instructions(file: Path) -> list[Instruction]:
    """Comments left out, continued lines joined."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    parts = (line.split(None, 1) for line in text.splitlines() if line.strip())
    return [Instruction(name, " ".join(rest.split())) for name, rest in parts]


def the(found: list[Instruction], name: str) -> Instruction:
    (last,) = [each for each in found if each.name == name][-1:]
    return last


def variables(found: list[Instruction]) -> dict[str, str]:
    texts = [each.text for each in found if each.name == "ENV"]
    return dict(pair.split("=", 1) for text in texts for pair in shlex.split(text))


def health_check(found: list[Instruction]) -> str:
    """The program that it runs in Python."""
    words = json.loads(the(found, "HEALTHCHECK").text.split("CMD", 1)[1])
    assert words[:2] == ["python", "-c"]
    return str(words[2])


def copied() -> list[str]:
    """What .dockerignore lets into an image."""
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    assert lines[1] == "*"
    return [line[1:] for line in lines if line.startswith("!")]


def main() -> None:
    found = instructions(FOLDER / "cpu.Dockerfile")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for place in PLACES:
            (scratch / place[1:]).mkdir(parents=True)
        subprocess.run([sys.executable, "-m", "venv", str(scratch / "base")], check=True)
        path = f"{scratch / 'base' / 'bin'}:{os.environ['PATH']}"
        where = scratch
        for each in found:
            if each.name == "WORKDIR":
                where = scratch / each.text[1:]
            elif each.name == "COPY" and not each.text.startswith("--from"):
                for entry in copied():
                    _copy(ROOT / entry, where / entry)
            elif each.name == "RUN":
                command = re.sub(r"useradd [^&]*", "true ", each.text)
                for place in PLACES:
                    command = command.replace(place, str(scratch / place[1:]))
                print(f"RUN {command}", flush=True)
                environment = {**os.environ, "PATH": path}
                subprocess.run(["sh", "-ec", command], cwd=where, env=environment, check=True)
        _start(found, scratch)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def _start(found: list[Instruction], scratch: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    binaries = scratch / "opt/edge-vlm/bin"
    set_ = {name: value for name, value in variables(found).items() if name != "PATH"}
    command = [*the(found, "ENTRYPOINT").words, *the(found, "CMD").words]
    print("ENTRYPOINT", *command, flush=True)
    process = subprocess.Popen(
        [str(binaries / command[0]), *command[1:]],
        cwd=scratch / "data",
        env={
            "PATH": str(binaries),
            "HOME": str(scratch / "data"),
            "EDGE_VLM_PORT": f"{port}",
            **set_,
        },
    )
    try:
        check = health_check(found).replace("8765", f"{port}")
        deadline = time.monotonic() + TIMEOUT_S
        while subprocess.run(
            [binaries / "python", "-c", check], stderr=subprocess.DEVNULL, check=False
        ).returncode:
            assert process.poll() is None, "it ended"
            assert time.monotonic() < deadline, "it is not healthy"
            time.sleep(0.5)
        print("HEALTHCHECK healthy", flush=True)
        process.send_signal(signal.SIGTERM)
        code = process.wait(TIMEOUT_S)
        assert code == 0, f"exit code {code}"
        print("stopped with exit code 0")
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
