"""The commands of README and docs run as written, page by page, in a copy of a fresh checkout.

What takes minutes runs with EDGE_VLM_LONG_DOCS=1 (`make docs`); why another is not run stands in
`tests.docs.commands.NEEDS` and in the page.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

from edge_vlm import cli
from edge_vlm.errors import NoFrameYet, ServerBusy
from tests.conftest import ROOT
from tests.docs.commands import NEEDS, PAGES, TAKES, DocCommand, commands_of
from tests.runtime.ports import KeptPort
from tests.tiny import traced_once

PATIENCE_S = 300.0
"""For a server to start, which loads the libraries anew: a busy machine is no failure."""
BIN = Path(sys.executable).parent
SERVERS = ("serve", "mcp")
NOT_YET = (NoFrameYet, ServerBusy)
"""What a server says of a camera whose session is being opened, or has seen nothing."""
PORTS = ("8765", "8766")
"""In the pages; each test has free ones in their place, so that tests can run side by side."""
SHELL = set("|&;<>$`(")
FAILS = {"docs/doctor.md": {1}}
"""Exit codes that a page explains: `doctor` about a backend that this machine lacks."""
IS_LONG = bool(os.environ.get("EDGE_VLM_LONG_DOCS"))
LIMIT_S = 4 * 3600.0 if IS_LONG else 1800.0
"""Of a page: some have an export in them, which takes minutes on a busy machine."""
RUN_BY_OTHERS = ("make", "source")
"""`make demo`, `make test` and the environment's activation are how this test came to run."""
ONLY_TELL = ("ask", "data", "doctor", "inspect", "verify")
"""Commands that leave nothing behind for another one."""
HAVE_RUN: set[str] = set()
"""What pages have run already, in these words."""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")


class Server:
    """`edge-vlm serve`, in a terminal of its own."""

    def __init__(self, kind: str, text: str, folder: Path) -> None:
        # Read through a second opening: one that is shared has one position, and a read in the
        # midst of the server's write moves where it writes.
        self._output = tempfile.NamedTemporaryFile(prefix="serve-")  # noqa: SIM115  as it runs
        self.kind, self.text = kind, text
        self._process = subprocess.Popen(
            ["bash", "-c", f"exec env {text}"],
            cwd=folder,
            env=_environment(),
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self) -> None:
        """Until it says that it serves."""
        deadline = time.monotonic() + PATIENCE_S
        while not any(word in self.said for word in ("serving ", "MCP at ")):
            assert self._process.poll() is None, f"{self.text}: {self.said}"
            assert time.monotonic() < deadline, f"{self.text} does not start: {self.said}"
            time.sleep(0.05)

    @property
    def said(self) -> str:
        return Path(self._output.name).read_text()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            code = self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            raise
        said = self.said
        self._output.close()
        assert code == 0, f"{self.text}: {said}"


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": ""}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What lies in a fresh clone, with a place to write."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name != "tests":
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture
def ports() -> Iterator[dict[str, str]]:
    kept = {port: KeptPort() for port in PORTS}
    yield {port: str(one.number) for port, one in kept.items()}
    for one in kept.values():
        one.close()


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(
    page: Path,
    checkout: Path,
    ports: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    commands = commands_of(page)
    runnable = [command for command in commands if not _reason(command)]
    if not runnable:
        reasons = dict.fromkeys(filter(None, map(_reason, commands)))
        pytest.skip("; ".join(reasons) or "edge-vlm: a page without commands")
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("EDGE_VLM_PORT", ports[PORTS[0]])
    servers: list[Server] = []
    try:
        for number, command in enumerate(runnable):
            if _has_run(command, runnable[number + 1 :]):
                continue
            HAVE_RUN.add(command.text)
            text = command.text
            for port, free in ports.items():
                text = text.replace(port, free)
            kind = _server_of(command)
            if kind is not None:
                for before in [server for server in servers if server.kind == kind]:
                    servers.remove(before)  # two at one port there cannot be
                    before.stop()
                servers.append(Server(kind, text.rstrip("& "), checkout))
                servers[-1].wait()
                continue
            code = _run(text, checkout, ports[PORTS[0]])
            shown, deadline = capfd.readouterr(), time.monotonic() + PATIENCE_S
            # Who types takes longer than a camera to begin.
            while servers and any(each.code in shown.err for each in NOT_YET):
                assert time.monotonic() < deadline, shown.err
                time.sleep(0.2)
                code = _run(text, checkout, ports[PORTS[0]])
                shown = capfd.readouterr()
            allowed = {0} | FAILS.get(str(page.relative_to(ROOT)), set())
            assert code in allowed, f"{command.where}: {text}\n{shown.out}\n{shown.err}"
    finally:
        for server in servers:
            server.stop()


def _reason(command: DocCommand) -> str | None:
    if command.needs is not None:
        return NEEDS[command.needs]
    if command.takes and not IS_LONG:
        return TAKES
    if command.words[0] in RUN_BY_OTHERS:
        return "edge-vlm: is what set this up"
    return None


def _server_of(command: DocCommand) -> str | None:
    """Which of SERVERS it starts."""
    words = command.edge_vlm[0] if command.edge_vlm else []
    is_server = bool(words) and words[0] in SERVERS and "--print-config" not in words
    return words[0] if is_server else None


def _has_run(command: DocCommand, later: Sequence[DocCommand]) -> bool:
    """In the same words, and no later one of its page needs that it runs again."""
    if command.text not in HAVE_RUN:
        return False
    kind = _server_of(command)
    if kind is None:
        words = command.words
        return words[0] == "edge-vlm" and words[1] in ONLY_TELL and not SHELL & set(command.text)
    for other in later:
        if any(port in other.text for port in PORTS) or other.words[0] == "python":
            return False  # it goes to the server
        if _server_of(other) == kind:
            break
    return True


def _run(text: str, folder: Path, port: str) -> int:
    """In this process where no shell is needed, which saves loading everything anew."""
    words = shlex.split(text)
    if words[0] == "edge-vlm" and not SHELL & set(_outside_quotes(text)):
        # Of a second `make test`, torch's part of the export is there.
        shared = words[1] == "export" and not IS_LONG
        try:
            with traced_once() if shared else nullcontext():
                return cli.main(words[1:])
        except SystemExit as stopped:
            return int(stopped.code or 0)
    return subprocess.run(
        ["bash", "-eo", "pipefail", "-c", text],
        cwd=folder,
        # What an example goes to if nothing is said.
        env=_environment()
        | ({"EDGE_VLM_URL": f"localhost:{port}"} if words[0] == "python" else {}),
        stdin=subprocess.DEVNULL,
        timeout=LIMIT_S,
    ).returncode


def _outside_quotes(text: str) -> str:
    return "".join(text.replace('"', "'").split("'")[::2])
