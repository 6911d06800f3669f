"""Against a real RTSP server, GStreamer's, on loopback: passwords, cuts, silence. Skipped where it
is not installed (Debian: python3-gi gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-good)."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from edge_vlm.errors import VideoUnreadable
from edge_vlm_runtime.sources import addresses as sources
from edge_vlm_runtime.sources.container import Picture
from edge_vlm_runtime.sources.live import LiveSource
from edge_vlm_runtime.sources.open import open_source

SCRIPT = Path(__file__).parent / "gst_rtsp_server.py"
SYSTEM_PYTHON = "/usr/bin/python3"
PATIENCE_S = 60.0
"""Generous: a busy machine is no failure."""


@lru_cache(maxsize=1)
def is_installed() -> bool:
    asks = "import gi; gi.require_version('GstRtspServer', '1.0')"
    try:
        done = subprocess.run([SYSTEM_PYTHON, "-c", asks], capture_output=True, timeout=PATIENCE_S)
    except OSError:
        return False
    return done.returncode == 0


class RtspServer:
    """The server's process; `cut` and `plug_in` keep its port."""

    def __init__(self) -> None:
        self.port = 0
        self._process: subprocess.Popen[str] | None = None
        self.plug_in()

    def plug_in(self) -> None:
        self._process = subprocess.Popen(
            [SYSTEM_PYTHON, str(SCRIPT), str(self.port), "user", "secret"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self._process.communicate()
        self.port = int(line)

    def cut(self) -> None:
        """As if the plug was pulled."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def url(self, who: str = "user:secret@") -> str:
        return f"rtsp://{who}127.0.0.1:{self.port}/live"


@pytest.fixture
def server() -> Iterator[RtspServer]:
    if not is_installed():
        pytest.skip("GStreamer's RTSP server (gir1.2-gst-rtsp-server-1.0) is not installed")
    running = RtspServer()
    yield running
    running.cut()


def some(pictures: Iterator[Picture], count: int) -> list[Picture]:
    return [next(pictures) for _ in range(count)]


def wait_for_words(caplog: pytest.LogCaptureFixture, words: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while words not in caplog.text:
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.02)


@pytest.mark.parametrize("who", ["user:Wr0ng@", "intruder:Wr0ng@"])
def test_a_wrong_password_is_a_typed_error_that_does_not_repeat_it(
    server: RtspServer, who: str
) -> None:
    with pytest.raises(VideoUnreadable, match="401") as caught:
        open_source(server.url(who), 5.0)
    assert "Wr0ng" not in str(caught.value)
    assert "***@" in str(caught.value)


def test_a_cut_camera_comes_back_on_its_own(
    server: RtspServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    source = open_source(server.url(), 5.0)
    assert isinstance(source, LiveSource)
    pictures = source.pictures()
    seen = some(pictures, 3)
    server.cut()
    wait_for_words(caplog, "went away")
    wait_for_words(caplog, "is still away")  # the port is closed
    server.plug_in()
    seen += some(pictures, 4)
    source.close()
    assert source.reconnects == 1
    assert all(picture.rgb.shape == (120, 160, 3) for picture in seen)
    times = [picture.time_s for picture in seen]
    assert times == sorted(times)
    assert "is back" in caplog.text
    assert "***@" in caplog.text
    assert "secret" not in caplog.text
    assert "user" not in caplog.text


def test_a_camera_that_falls_silent_is_opened_again(
    server: RtspServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection stands and nothing comes: only the watchdog can tell."""
    monkeypatch.setattr(sources, "READ_TIMEOUT_S", 2.0)
    monkeypatch.setattr(sources, "OPEN_TIMEOUT_S", 5.0)
    source = open_source(server.url(), 5.0)
    assert isinstance(source, LiveSource)
    pictures = source.pictures()
    some(pictures, 2)
    server.signal(signal.SIGSTOP)
    wait_for_words(caplog, "went away")
    server.signal(signal.SIGCONT)
    some(pictures, 2)
    while source.reconnects == 0:  # the pictures above may have come before the cut
        some(pictures, 1)
    some(pictures, 2)
    source.close()
    assert "secret" not in caplog.text
