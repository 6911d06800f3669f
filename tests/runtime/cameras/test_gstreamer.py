"""Pictures from a GStreamer pipeline, as a Jetson's CSI camera gives them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

import pytest

from edge_vlm.errors import VideoNotFound, VideoUnreadable
from edge_vlm_runtime.sources import gstreamer as gst_pipe
from edge_vlm_runtime.sources.gstreamer import GstPipe, csi_pipeline, launch_arguments
from edge_vlm_runtime.sources.live import LiveSource
from edge_vlm_runtime.sources.open import open_source
from tests.runtime.server.live import TIMEOUT_S

BALL = "videotestsrc is-live=true pattern=ball ! video/x-raw,width=160,height=120,framerate=20/1"


@pytest.fixture
def gstreamer() -> None:
    if shutil.which(gst_pipe.PROGRAM) is None:
        pytest.skip("GStreamer (gstreamer1.0-tools) is not installed")


def test_the_command_of_a_csi_camera() -> None:
    arguments = launch_arguments(csi_pipeline(1), 2.0)
    assert arguments[:4] == ["gst-launch-1.0", "--quiet", "nvarguscamerasrc", "sensor-id=1"]
    assert "max-rate=4" in arguments
    assert arguments[-3:] == ["!", "fdsink", "fd=1"]


def test_a_pipeline_is_words_and_never_a_shell_s() -> None:
    arguments = launch_arguments("filesrc location='my clip.mp4' ! decodebin; rm $HOME", 1.0)
    assert "location=my clip.mp4" in arguments
    assert "decodebin;" in arguments
    assert "$HOME" in arguments
    for bad in ("'", "", "   "):
        with pytest.raises(VideoUnreadable):
            launch_arguments(bad, 1.0)


def test_without_gstreamer_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda program: None)
    for text in ("csi", "csi:1", f"gst:{BALL}"):
        with pytest.raises(VideoNotFound, match=r"gstreamer1\.0-tools"):
            open_source(text, 2.0)


def test_pictures_from_a_pipeline(gstreamer: None) -> None:
    source = open_source(f"gst:{BALL}", 10.0)
    assert source.is_live
    seen = []
    for picture in source.pictures():
        seen.append(picture)
        if len(seen) == 4:
            break
    source.close()
    assert all(picture.rgb.shape == (120, 160, 3) for picture in seen)
    assert len({picture.rgb.tobytes() for picture in seen}) > 1  # the ball moves
    times = [picture.time_s for picture in seen]
    assert times == sorted(times)
    assert times[0] == 0.0


def test_a_pipeline_that_ends_is_started_again(
    gstreamer: None, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_source(f"gst:{BALL.replace('is-live=true', 'is-live=true num-buffers=8')}", 50.0)
    assert isinstance(source, LiveSource)
    for _ in source.pictures():
        if source.reconnects == 2:
            break
    source.close()
    assert "is back" in caplog.text


@pytest.mark.parametrize(
    ("pipeline", "why"),
    [
        ("nosuchelement", "no element"),
        ("videotestsrc num-buffers=0", "no picture"),
        ("rtspsrc location=rtsp://user:secret@127.0.0.1:9/x ! decodebin", "Could not open"),
    ],
)
def test_what_is_wrong_with_a_pipeline_is_said_without_secrets(
    gstreamer: None, pipeline: str, why: str
) -> None:
    with pytest.raises(VideoUnreadable, match=why) as caught:
        open_source(f"gst:{pipeline}", 2.0)
    assert "secret" not in str(caught.value)


def test_a_pipeline_that_falls_silent_is_noticed_and_killed(
    gstreamer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gst_pipe, "READ_TIMEOUT_S", 0.5)
    with pytest.raises(VideoUnreadable, match=r"no picture for 0\.5 s"):
        open_source("gst:appsrc", 2.0)
    pipe = GstPipe("appsrc", 2.0, timeout_s=0.1)
    with pytest.raises(TimeoutError):
        pipe.read(1)
    pipe.close()
    pipe.close()
    assert pipe._process.poll() is not None


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """A closed source ends its process, at the latest with its next picture."""
    before = set(_children())
    yield
    deadline = time.monotonic() + TIMEOUT_S
    while set(_children()) - before:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _children() -> list[str]:
    from pathlib import Path

    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = status.read_text()
        except OSError:
            continue
        if "(gst-launch-1.0)" in text and f" {_own_id()} " in text.partition(")")[2]:
            found.append(text.split()[0])
    return found


def _own_id() -> int:
    import os

    return os.getpid()
