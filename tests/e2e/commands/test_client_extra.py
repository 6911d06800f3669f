"""A camera node has the extra `client` and nothing else: no engines, no server, no torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from edge_vlm_runtime.server.app import Server
from tests.runtime.cameras.pictures import write_video
from tests.runtime.server.live import TIMEOUT_S, open_server
from tests.test_architecture import OPTIONAL

CLIENT = {"PIL", "av", "msgspec", "rich", "websockets"}
ABSENT = {"torch", "prometheus_client", "cryptography", "httpx", "aiomqtt", *OPTIONAL} - CLIENT
QUESTION = "is there a red ball ?"


def without(
    libraries: Sequence[str], code: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Runs `code` where these libraries cannot be imported."""
    hide = f"import sys; sys.modules.update(dict.fromkeys({sorted(libraries)!r})); "
    return subprocess.run(
        [sys.executable, "-c", hide + code, *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with open_server() as running:
        running.start()
        yield running


@pytest.mark.parametrize("name", ["watch", "ask"])
def test_it_watches_and_asks(server: Server, name: str, tmp_path: Path) -> None:
    video = str(write_video(tmp_path / "clip.mp4", num_frames=4))
    arguments = {
        "watch": [server.url, "--source", video, "--fast", "--ask", QUESTION],
        "ask": [video, QUESTION, "--url", server.url],
    }[name]
    code = "from edge_vlm.cli import main; sys.exit(main())"
    done = without(sorted(ABSENT), code, name, *arguments)
    assert done.returncode == 0, done.stderr
    assert "4 frames" in done.stdout + done.stderr


def test_it_has_the_client_for_scripts(server: Server) -> None:
    code = (
        "import asyncio; from edge_vlm_runtime.client.client import Client\n"
        "async def main():\n"
        f"    async with await Client.connect({server.url!r}) as client:\n"
        "        print(client.created.model.bundle)\n"
        "asyncio.run(main())"
    )
    done = without(sorted(ABSENT), code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["watch", "ask"])
def test_for_a_server_of_its_own_it_is_told_of_all_that_takes(name: str, tmp_path: Path) -> None:
    video = str(write_video(tmp_path / "clip.mp4", num_frames=2))
    arguments = ["--source", video] if name == "watch" else [video, QUESTION]
    code = "from edge_vlm.cli import main; sys.exit(main())"
    # With nothing at all its module cannot be read, so that it is told the first step only.
    for absent, extra in ((ABSENT, "ort"), (ABSENT | CLIENT, "client")):
        done = without(sorted(absent), code, name, *arguments)
        assert done.returncode == 9, done.stderr
        assert done.stderr.count("\n") == 1
        assert f"edge-vlm[{extra}]" in done.stderr


def test_an_agents_machine_needs_no_server() -> None:
    absent = ABSENT - {"mcp", "starlette", "uvicorn", "cryptography"}  # which mcp brings
    done = without(sorted(absent), "import edge_vlm_runtime.mcp.server")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("library", "code", "extra"),
    [
        ("websockets", "import edge_vlm_runtime.client.connection", "client"),
        ("msgspec", "import edge_vlm_runtime.protocol.base", "client"),
        ("av", "from edge_vlm.pixels.film.opening import av; av()", "client"),
        ("rich", "import edge_vlm_runtime.client.live_table", "client"),
        ("PIL", "from edge_vlm.pixels.frames import decode_jpeg; decode_jpeg(b'')", "client"),
        ("mcp", "import edge_vlm_runtime.mcp.server", "mcp"),
        ("starlette", "import edge_vlm_runtime.server.app", "serve"),
        ("uvicorn", "import edge_vlm_runtime.server.app", "serve"),
        (
            "tokenizers",
            "from edge_vlm.text.tokenizer import Tokenizer; Tokenizer.from_file('x')",
            "serve",
        ),
    ],
)
def test_the_smallest_extra_that_brings_a_library(library: str, code: str, extra: str) -> None:
    done = without([library], code)
    assert done.returncode == 1
    assert "MissingExtraError" in done.stderr
    assert f"pip install 'edge-vlm[{extra}]'" in done.stderr
