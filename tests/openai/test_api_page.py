"""docs/api.md: its programs run as they stand there, and it names every field."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from edge_vlm_runtime.openai.chat_request import IGNORED, NEUTRAL
from edge_vlm_runtime.protocol.responses import ResponseOptions
from edge_vlm_runtime.protocol.settings import ServerLimits
from edge_vlm_runtime.server.app import Server
from tests.openai.served import CLIP, TIMEOUT_S, clip_frames, serving

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
ADDRESS = "127.0.0.1:8765"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.filterwarnings("ignore:connect.. must be used as:DeprecationWarning")  # of the SDK
def test_its_programs_run(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copy(CLIP, tmp_path / "clip.mp4")
    (tmp_path / "frame.jpg").write_bytes(clip_frames()[10])
    monkeypatch.chdir(tmp_path)
    programs = blocks("python")
    assert len(programs) == 2
    for program in programs:
        assert ADDRESS in program
        names: dict[str, object] = {}
        exec(program.replace(ADDRESS, f"127.0.0.1:{server.port}"), names)
        names["client"].close()  # type: ignore[attr-defined]
        assert re.search(r"mushroom|bicycle|dog|balloon", capsys.readouterr().out)


def test_its_curl_line_asks(server: Server) -> None:
    (shell,) = blocks("sh")
    (body,) = re.findall(r"-d '(.*?)'", shell, re.DOTALL)
    reply = httpx.post(
        f"{server.page_url}v1/chat/completions", json=json.loads(body), timeout=TIMEOUT_S
    )
    assert reply.status_code == 200


def test_every_field_and_option_is_named() -> None:
    own = ("keep_ratio", "policy", "detail", "frame_times", "session")
    for name in (*IGNORED, *NEUTRAL, *(f"edge_vlm.{name}" for name in own)):
        assert f"`{name}`" in PAGE, name
    limits = [name for name in ServerLimits.__dataclass_fields__ if "request" in name]
    assert len(limits) == 3
    for name in (*limits, "max_waiting_bytes"):
        assert f"--{name.replace('_', '-')}" in PAGE
    options = ResponseOptions.__struct_fields__
    for name in ("instructions", "max_output_tokens", "input", "conversation", "metadata"):
        assert name in options
        assert f"`{name}`" in PAGE.partition("## Realtime")[2]
