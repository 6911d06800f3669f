"""The processes that are killed, each of which can be started again where it was."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT
from benchmarks.runtime.fault_parts.accounts import Told
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE

MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
TIMEOUT_S = 120.0
PARTS = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
    """Raises TimeoutError in these words."""
    until_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until_s:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.005)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """A journal; what is not whole is said."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Victim:
    """A program that is started again with the same command."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._command, self._log = list(command), log
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self._process: subprocess.Popen[str] | None = None
        self.starts = 0

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        self.starts += 1
        with open(self._log, "a") as log:
            self._process = subprocess.Popen(
                [each.replace("{start}", str(self.starts)) for each in self._command],
                stdout=subprocess.PIPE if self.reads_output else log,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=self._environment,
            )

    reads_output = False

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def end(self, timeout_s: float = TIMEOUT_S) -> int:
        """By SIGTERM; returns its exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(timeout_s)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return status

    def log_text(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""


class ServerVictim(Victim):
    """`edge-vlm serve` with the demo bundle, always on the same port."""

    reads_output = True

    def __init__(
        self,
        folder: Path,
        options: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        config = folder / "faults.toml"
        values = {"bundle": str(DEMO_BUNDLE), "threads": 1, "port": self.port, **options}
        config.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items()))
        command = [sys.executable, "-m", "edge_vlm", "serve", "--config", str(config)]
        super().__init__(command, folder / "server.log", environment)
        self._ready = threading.Event()
        self.generation = folder / "generation"
        """Holds the number of the start, as long as it may answer."""

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def is_ready(self) -> bool:
        return self._ready.is_set()

    def start(self) -> None:
        self._ready = ready = threading.Event()
        written = self.generation.with_suffix(".new")
        written.write_text(str(self.starts + 1))
        written.replace(self.generation)
        super().start()
        assert self._process is not None
        output = self._process.stdout
        assert output is not None

        def read() -> None:
            try:
                for line in output:
                    if re.match(r"serving .* at ", line):
                        ready.set()
            except ValueError:  # closed behind a kill
                pass

        threading.Thread(target=read, daemon=True).start()

    def wait_ready(self) -> None:
        def known() -> bool:
            if not self.is_running:
                raise RuntimeError(f"the server ended: {self.log_text()[-2000:]}")
            return self.is_ready

        wait_until(known, "the server is ready")


class Receiver(Victim):
    def __init__(self, folder: Path) -> None:
        self.port, self.path = free_port(), folder / "received.jsonl"
        program = str(PARTS / "receiver.py")
        arguments = [str(self.port), str(self.path), "{start}"]
        super().__init__([sys.executable, "-I", "-S", program, *arguments], folder / "receiver.log")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/alerts"

    def lines(self) -> list[dict[str, Any]]:
        return lines_of(self.path)


class Viewer(Victim):
    def __init__(self, folder: Path, server: ServerVictim) -> None:
        self.journal = folder / "viewer.jsonl"
        module = "benchmarks.runtime.fault_parts.client"
        arguments = [server.address, str(self.journal), "{start}", str(server.generation)]
        super().__init__([sys.executable, "-m", module, *arguments], folder / "viewer.log")

    @property
    def size(self) -> int:
        return self.journal.stat().st_size if self.journal.exists() else 0

    def lines(self) -> list[dict[str, Any]]:
        return lines_of(self.journal)

    def told(self) -> dict[str, Told]:
        """Alert events."""
        generation, told = 0, {}
        for line in self.lines():
            generation = line.get("generation", generation)
            if "told" in line:
                told[line["told"]] = Told(line["at"], generation)
        return told


class Broker(Victim):
    """mosquitto; raises FileNotFoundError where it is not installed."""

    def __init__(self, folder: Path) -> None:
        if MOSQUITTO is None:
            raise FileNotFoundError("mosquitto is not installed")
        self.port = free_port()
        config = folder / "mosquitto.conf"
        config.write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\n")
        super().__init__([MOSQUITTO, "-c", str(config)], folder / "mosquitto.log")


def kept_in(queue: Path, scratch: Path) -> dict[str, list[str]]:
    """By receiver, events that a queue's file holds; of a copy, whose server was killed."""
    scratch.mkdir(exist_ok=True)
    for old in scratch.iterdir():
        old.unlink()
    for file in queue.parent.glob(f"{queue.name}*"):
        shutil.copy(file, scratch / file.name)
    if not (scratch / queue.name).exists():
        return {}
    database = sqlite3.connect(scratch / queue.name)
    try:
        rows = database.execute("SELECT receiver, body FROM deliveries ORDER BY number").fetchall()
    except sqlite3.OperationalError as error:  # killed before it had made its table
        if "no such table" not in str(error):
            raise
        rows = []
    finally:
        database.close()
    kept: dict[str, list[str]] = {}
    for receiver, body in rows:
        kept.setdefault(receiver.partition(" ")[0], []).append(json.loads(body)["id"])
    return kept
