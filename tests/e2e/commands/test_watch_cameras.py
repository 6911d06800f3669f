"""`watch` and `ask` on cameras: late ones, servers that come and go, questions that are typed, and
cameras that the server owns."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.cameras.pictures import write_video
from tests.runtime.cameras.rtsp_camera import RtspCamera
from tests.runtime.ports import KeptPort
from tests.runtime.server.live import TIMEOUT_S
from tests.tiny import tiny_bundle

PROGRAM = str(Path(sys.executable).parent / "edge-vlm")
QUESTION = "what colour is the cube ?"


class Program:
    """A command whose lines are read while it runs."""

    def __init__(self, *arguments: str) -> None:
        # A shell's background job, as these tests may be one, hands on an ignored SIGINT.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self.process = subprocess.Popen(
                [PROGRAM, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        finally:
            signal.signal(signal.SIGINT, before)
        self.seen: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip())
        self._lines.put(None)

    def until(self, pattern: str) -> str:
        """The next line like this."""
        while True:
            line = self._lines.get(timeout=TIMEOUT_S)
            assert line is not None, f"{pattern!r} did not come: {self.seen[-20:]}"
            self.seen.append(line)
            if re.search(pattern, line):
                return line

    def type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()

    def end(self, how: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(TIMEOUT_S)
        raise AssertionError(f"it does not end: {self.seen[-20:]}")

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *ended: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def serve(*arguments: str) -> Program:
    return Program("serve", "--bundle", str(tiny_bundle()), "--threads", "1", *arguments)


def port_of(line: str) -> int:
    found = re.search(r"127\.0\.0\.1:(\d+)", line)
    assert found is not None, line
    return int(found[1])


@pytest.fixture
def absent_port() -> Iterator[int]:
    """Of a camera that is not there yet."""
    port = KeptPort()
    yield port.number
    port.close()


def test_a_watch_outlives_a_late_camera_and_its_server(absent_port: int) -> None:
    kept = KeptPort()
    port = kept.number
    with serve("--port", str(port)) as server:
        server.until("serving")
        source = f"rtsp://user:secret@127.0.0.1:{absent_port}/live"
        alert = f"0.9/0.2@{QUESTION}"
        arguments = ["--source", source, "--ask", QUESTION, "--alert", alert]
        with Program("watch", f"127.0.0.1:{port}", *arguments) as watch:
            assert "secret" not in watch.until("waiting for the camera")
            with RtspCamera(port=absent_port):
                watch.until(r"frame +1 ")
                watch.until(r"^\? ")  # after the first frame, not at an end that never comes
                watch.until(r"^> ")
                watch.type("is there a red ball ?")
                watch.until(r"^\? is there a red ball")
                watch.until(r"^> ")
                assert server.end(signal.SIGTERM) == 0
                watch.until("the session is lost")
                with serve("--port", str(port)) as again:
                    again.until("serving")
                    said = watch.until("connected again")
                    assert "memory is empty" in said
                    assert "watched for again: 1" in said
                    watch.until(r"frame +1 ")
                    watch.type("is there a red ball ?")
                    watch.until(r"^> ")
                    code = watch.end()
                    if sys.version_info >= (3, 11):  # before, asyncio raises the interrupt
                        assert code == 0
                        watch.until("3 of 3 questions answered")


def test_a_camera_that_does_not_come_in_time_is_an_error(absent_port: int) -> None:
    source = f"rtsp://127.0.0.1:{absent_port}/live"
    with serve("--port", "0") as server:
        port = port_of(server.until("serving"))
        command = ["watch", f"127.0.0.1:{port}", "--source", source, "--wait", "0"]
        with Program(*command) as watch:
            watch.until("E-VIDEO-UNREADABLE.*Connection refused")
            assert watch.process.wait(TIMEOUT_S) == 5


def test_the_servers_cameras_are_watched_asked_and_read_anew(tmp_path: Path) -> None:
    with RtspCamera() as camera:
        table = f'[[camera]]\nname = "door"\nsource = "rtsp://127.0.0.1:{camera.port}/live"\n'
        file = tmp_path / "edge-vlm.toml"
        file.write_text(table)
        with serve("--port", "0", "--config", str(file)) as server:
            address = f"127.0.0.1:{port_of(server.until('serving'))}"
            with Program("watch", "--stream", "door", address) as watch:
                watch.until(r"frame +\d+ ")
                watch.type(QUESTION)
                watch.until(r"^> ")
                asked = ask("--stream", "door", address, QUESTION)
                assert asked.returncode == 0, asked.stderr
                watch.until(r"frame +\d+ ")  # it is not disturbed
                unknown = ask("--stream", "dor", address, QUESTION)
                assert unknown.returncode == 10
                assert "there are: door" in unknown.stderr
                own = ask("--stream", "door", address, QUESTION, "--keep-ratio", "0.5")
                assert "E-CONFIG" in own.stderr
                file.write_text(table + table.replace("door", "gate"))
                server.process.send_signal(signal.SIGHUP)
                server.until("read anew: gate new")
                file.write_text("")  # an editor is about to write it
                server.process.send_signal(signal.SIGHUP)
                server.until("stay as they are: the file is empty")
                file.write_text(table.replace("door", "gate"))
                server.process.send_signal(signal.SIGHUP)
                watch.until("E-UNKNOWN-STREAM")
                assert watch.process.wait(TIMEOUT_S) == 10
            assert server.end(signal.SIGTERM) == 0


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PROGRAM, "ask", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S
    )


def listed(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/v1/streams") as reply:
        return bytes(reply.read()).decode()


def test_whoever_comes_when_a_film_is_over_is_told_so(tmp_path: Path) -> None:
    file, film = tmp_path / "edge-vlm.toml", write_video(tmp_path / "film.mp4", num_frames=2)
    file.write_text(f'[[camera]]\nname = "door"\nsource = "{film}"\n')
    with serve("--port", "0", "--config", str(file)) as server:
        address = f"127.0.0.1:{port_of(server.until('serving'))}"
        while '"state":"ended"' not in listed(address):
            time.sleep(0.1)
        with Program("watch", "--stream", "door", address) as watch:
            watch.until("the stream door is ended")
            watch.type(QUESTION)  # of what it remembers
            watch.until(r"^> ")


def test_events_of_a_stream_as_lines_of_json(tmp_path: Path) -> None:
    with RtspCamera() as camera:
        file = tmp_path / "edge-vlm.toml"
        source = f"rtsp://127.0.0.1:{camera.port}/live"
        file.write_text(f'[[camera]]\nname = "door"\nsource = "{source}"\n')
        with serve("--port", "0", "--config", str(file)) as server:
            address = f"127.0.0.1:{port_of(server.until('serving'))}"
            asked = ask("--stream", "door", address, QUESTION, "--json")
            while "E-NO-FRAME" in asked.stdout:  # the first picture is on its way
                time.sleep(0.1)
                asked = ask("--stream", "door", address, QUESTION, "--json")
            events = [json.loads(line) for line in asked.stdout.splitlines()]
            assert events[0]["stream"]["name"] == "door"
            assert events[-1]["type"] in ("response.done", "session.closed")
