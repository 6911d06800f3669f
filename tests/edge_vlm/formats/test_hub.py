"""`edge-vlm pull` against a server that speaks a model hub's endpoints."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from edge_vlm.cli import main
from edge_vlm.errors import ConfigError
from edge_vlm.errors.export import (
    HubError,
    HubFileDamaged,
    HubNotFound,
    HubRefused,
    HubUnreachable,
    NoSpaceLeft,
)
from edge_vlm.hub import fetch, look_up
from tests.runtime.ports import KeptPort

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "allenai/Tiny"
TIMEOUT_S = 60.0
PROGRAM = "import sys; from edge_vlm.cli import main; sys.exit(main(sys.argv[1:]))"


def blob(data: bytes) -> str:
    """As `git hash-object` names it."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """One repository. `holds_up`: of its weights only half comes, and then nothing."""

    def __init__(self) -> None:
        self.files = {
            "config.json": b'{"model_type": "molmo2"}',
            "model.safetensors": bytes(range(256)) * 4096,
            "modeling_molmo2.py": b"import os",
            "README.md": b"# Tiny",
        }
        self.digest: str | None = None
        """What the weights are said to have, if not their own."""
        self.refusal: tuple[int, str] | None = None
        self.turns = threading.Event()
        self.turns.set()
        self.half_sent = threading.Event()
        self.gets: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def _answer(self, *, with_body: bool) -> None:
                if outer.refusal is not None:
                    status, code = outer.refusal
                    self._reply(status, b"{}", with_body, {"X-Error-Code": code})
                elif self.path.startswith("/api/"):
                    self._reply(200, outer.info(), with_body, {})
                else:
                    self._file(with_body)

            def _file(self, with_body: bool) -> None:
                found = re.fullmatch(rf"/{REPOSITORY}/resolve/{COMMIT}/(.*)", self.path)
                assert found is not None, self.path
                data, wanted = outer.files[found[1]], self.headers["Range"]
                if with_body:
                    outer.gets.append((found[1], wanted))
                etag = hashlib.sha256(data).hexdigest()
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
                first = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
                if first:
                    headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
                self._reply(206 if first else 200, data[first:], with_body, headers)

            def _reply(
                self, status: int, body: bytes, with_body: bool, headers: dict[str, str]
            ) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if not with_body:
                    return
                half = len(body) // 2
                self.wfile.write(body[:half])
                if len(body) > 10_000 and not outer.turns.is_set():
                    self.wfile.flush()
                    outer.half_sent.set()
                    outer.turns.wait(TIMEOUT_S)
                    return
                self.wfile.write(body[half:])

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._port = KeptPort()  # nobody answers there when it is closed
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port.number), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def info(self) -> bytes:
        siblings: list[dict[str, Any]] = []
        for name, data in self.files.items():
            siblings.append({"rfilename": name, "size": len(data), "blobId": blob(data)})
            if name.endswith(".safetensors"):
                digest = self.digest or hashlib.sha256(data).hexdigest()
                siblings[-1]["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 1}
        found = {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings, "private": False}
        return json.dumps(found).encode()

    def close(self) -> None:
        self.turns.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()
    monkeypatch.setenv("HF_ENDPOINT", found.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield found
    found.close()


def pulled(hub: Hub, folder: Path) -> None:
    fetch(look_up(REPOSITORY, "main", hub.url), folder, hub.url)


def test_weights_are_fetched_once_and_their_commit_is_said(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tiny"
    assert main(["pull", REPOSITORY, "-o", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"{REPOSITORY} at {COMMIT}: 3 files, 1.0 MB" in out
    assert "left out, none of it is needed: modeling_molmo2.py" in out
    assert "[3/3] model.safetensors" in out
    assert f"--revision {COMMIT}" in out
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert json.loads(kept.pop("pulled.json")) == {"repository": REPOSITORY, "revision": COMMIT}
    assert kept == {name: data for name, data in hub.files.items() if name[-3:] != ".py"}
    hub.gets.clear()
    assert main(["pull", REPOSITORY, "-o", str(folder)]) == 0
    assert hub.gets == []


def test_a_transfer_that_was_cut_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    hub.files["model.safetensors"] = bytes(24 << 20)  # written by pieces of 10 MB
    hub.turns.clear()
    command = [sys.executable, "-c", PROGRAM, "pull", REPOSITORY, "-o", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not hub.half_sent.wait(0.1):
            assert process.poll() is None, "it ended"
        size = len(hub.files["model.safetensors"])
        deadline = time.monotonic() + TIMEOUT_S
        while not (part := sum(p.stat().st_size for p in folder.rglob("*.part"))):
            assert time.monotonic() < deadline, "no part of it was written"
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert not (folder / "model.safetensors").exists()
    part = sum(path.stat().st_size for path in folder.rglob("*.part"))
    assert 0 < part < size
    hub.turns.set()
    hub.gets.clear()
    pulled(hub, folder)
    assert hub.gets == [("model.safetensors", f"bytes={part}-")]
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]


@pytest.mark.parametrize(
    ("refusal", "kind", "said"),
    [
        ((403, "GatedRepo"), HubRefused, "accept it at"),
        ((401, "GatedRepo"), HubRefused, "accept it at"),
        ((404, "RepoNotFound"), HubNotFound, "no such repository"),
        ((404, "RevisionNotFound"), HubNotFound, "no such revision"),
        ((403, ""), HubRefused, "the hub says 403"),
        ((500, ""), HubError, "the hub says 500"),
    ],
)
def test_what_the_hub_refuses_is_told_by_kind(
    hub: Hub, refusal: tuple[int, str], kind: type[HubError], said: str
) -> None:
    hub.refusal = refusal
    with pytest.raises(HubError, match=said) as raised:
        look_up(REPOSITORY, "main", hub.url)
    assert type(raised.value) is kind


def test_without_a_network_the_way_out_is_said(hub: Hub) -> None:
    hub.close()
    with pytest.raises(HubUnreachable, match="copy the folder from a machine that has it"):
        look_up(REPOSITORY, "main", hub.url)


def test_a_disk_without_room_is_known_before_the_first_byte(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0, 0, 65 << 20))
    hub.files["model.safetensors"] = bytes(2 << 20)
    with pytest.raises(NoSpaceLeft, match=r"69\.2 MB are needed and 68\.2 MB are free"):
        pulled(hub, tmp_path / "tiny")
    assert hub.gets == []
    assert not (tmp_path / "tiny").exists()


def test_a_disk_that_fills_up_on_the_way_is_told(hub: Hub, tmp_path: Path) -> None:
    """By a limit on the size of files, which the system enforces as a full disk."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); {PROGRAM}"
    )
    command = [sys.executable, "-c", code, "pull", REPOSITORY, "-o", str(tmp_path / "tiny")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 12, ran.stderr
    assert "E-NO-SPACE" in ran.stderr
    assert "goes on where it stopped" in ran.stderr


def test_weights_that_are_not_what_the_hub_says_are_removed(hub: Hub, tmp_path: Path) -> None:
    hub.digest = "0" * 64
    with pytest.raises(HubFileDamaged, match="another digest"):
        pulled(hub, tmp_path / "tiny")
    assert not (tmp_path / "tiny" / "model.safetensors").exists()
    (tmp_path / "tiny" / "config.json").write_bytes(b"{'model_type': 'molmo3'}")
    with pytest.raises(HubFileDamaged, match=r"another digest.*config\.json"):
        pulled(hub, tmp_path / "tiny")


def test_a_folder_that_holds_something_else_is_left_alone(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else"):
        pulled(hub, tmp_path)
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "pulled.json").write_text('{"repository": "allenai/Other", "revision": "1"}')
    with pytest.raises(ConfigError, match="holds allenai/Other at 1, not allenai/Tiny"):
        pulled(hub, folder)
    (folder / "pulled.json").write_text("[]")
    with pytest.raises(ConfigError, match="not the record of a pull"):
        pulled(hub, folder)
    (folder / "pulled.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        pulled(hub, folder)


def test_a_repository_without_weights_and_one_without_a_name(hub: Hub) -> None:
    del hub.files["model.safetensors"]
    with pytest.raises(HubNotFound, match="no weights in the format safetensors"):
        look_up(REPOSITORY, "main", hub.url)
    with pytest.raises(ConfigError, match="OWNER/NAME"):
        look_up("a b", "main", hub.url)


def test_a_place_that_cannot_be_written_is_told_before_the_hub_is_asked(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.close()
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nope")):
        assert main(["pull", REPOSITORY, "-o", str(place)]) == ConfigError.exit_code
        assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../a.json", "a/../../b.json", "/a.json", "C:\\a.json"])
def test_a_hub_that_names_files_outside_of_the_folder_is_refused(hub: Hub, name: str) -> None:
    hub.files[name] = b"{}"
    with pytest.raises(HubError, match="outside of the folder"):
        look_up(REPOSITORY, "main", hub.url)


def test_wrong_options_are_not_blamed_on_the_network(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", REPOSITORY, "--revision", ""]) == ConfigError.exit_code
    assert "--revision is empty" in capsys.readouterr().err
    monkeypatch.setenv("HF_ENDPOINT", "mirror.local")
    assert main(["pull", REPOSITORY]) == ConfigError.exit_code
    assert "HF_ENDPOINT is no address: 'mirror.local'" in capsys.readouterr().err
