from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_vlm.errors import VideoNotFound, VideoUnreadable
from edge_vlm_runtime.sources.container import mask_credentials
from edge_vlm_runtime.sources.live import LiveSource
from edge_vlm_runtime.sources.open import open_source
from edge_vlm_runtime.sources.video_file import FileSource, TimedFrame, due_frames
from tests.runtime.pictures import write_video
from tests.runtime.rtsp_camera import RtspCamera


def grey_levels(path: Path, fps: float) -> list[tuple[float, int]]:
    source = FileSource(path, fps)
    return [(picture.time_s, round(float(picture.rgb.mean()))) for picture in source.pictures()]


def test_a_file_at_the_models_rate_gives_every_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", num_frames=8, fps=2)
    pictures = grey_levels(path, 2.0)
    assert [time_s for time_s, _ in pictures] == [0.5 * i for i in range(8)]
    for index, (_, level) in enumerate(pictures):
        assert abs(level - (20 + 10 * index)) <= 3


def test_a_faster_file_gives_what_is_on_screen_when_due(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", num_frames=20, fps=10)
    pictures = grey_levels(path, 2.0)
    assert [time_s for time_s, _ in pictures] == [0.0, 0.5, 1.0, 1.5]
    for time_s, level in pictures:
        assert abs(level - (20 + 10 * time_s * 10)) <= 3


def test_a_slower_file_gives_each_frame_once(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", num_frames=4, fps=1)
    assert [time_s for time_s, _ in grey_levels(path, 2.0)] == [0.0, 1.0, 2.0, 3.0]


@settings(deadline=None)
@given(st.lists(st.floats(0.001, 3.0), min_size=1, max_size=40), st.sampled_from([0.5, 2.0, 7.0]))
def test_due_frames_never_repeat_and_keep_to_the_rate(gaps: list[float], fps: float) -> None:
    starts = [sum(gaps[:i]) for i in range(len(gaps) + 1)]
    shown = [TimedFrame(a, b, a) for a, b in itertools.pairwise(starts)]
    due = list(due_frames(iter(shown), fps))
    assert len({frame for _, frame in due}) == len(due)
    assert due[0][0] == 0.0
    for (first, _), (second, _) in itertools.pairwise(due):
        assert second - first >= 1 / fps - 1e-6
    for time_s, start_s in due:
        end_s = starts[starts.index(start_s) + 1]
        assert start_s - 2e-4 <= time_s < end_s


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("rtsp://user:pass@cam.local/1", "rtsp://***@cam.local/1"),
        ("rtsp://user:p@ss@cam.local/1", "rtsp://***@cam.local/1"),
        ("cannot open rtsp://u:p@h/x today", "cannot open rtsp://***@h/x today"),
        ("rtsp://cam.local/1", "rtsp://cam.local/1"),
        ("clip.mp4", "clip.mp4"),
    ],
)
def test_credentials_are_masked(text: str, masked: str) -> None:
    assert mask_credentials(text) == masked


def test_a_camera_that_is_not_there() -> None:
    with pytest.raises(VideoNotFound, match="/dev/video97"):
        open_source("webcam:97", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(VideoUnreadable) as caught:
        open_source(f"rtsp://user:secret@127.0.0.1:{port}/live", 2.0)
    assert "secret" not in str(caught.value) and "***@" in str(caught.value)


class Camera:
    """Stands in for a container: gives frames until it is unplugged."""

    def __init__(self, frames: int) -> None:
        self._frames = frames

    def decode(self, video: int) -> Iterator[Any]:
        for index in range(self._frames):
            time.sleep(0.002)
            rgb = np.full((16, 16, 3), index % 256, dtype=np.uint8)
            yield av.VideoFrame.from_ndarray(rgb, format="rgb24")
        raise av.error.ConnectionResetError(104, "unplugged: rtsp://user:secret@cam/1")

    def close(self) -> None:
        pass


def test_a_camera_that_goes_away_and_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    opened = threading.Semaphore(0)
    attempts = 0

    def open_camera(url: str, name: str, **_: Any) -> Camera:
        nonlocal attempts
        attempts += 1
        opened.release()
        if attempts == 2:
            raise VideoUnreadable("still away", where=name)
        return Camera(frames=20)

    source = LiveSource(
        "rtsp://user:secret@cam/1", 1000.0, open_container=open_camera, first_back_off_s=0.01
    )
    assert source.name == "rtsp://***@cam/1"
    times = []
    for picture in source.pictures():
        times.append(picture.time_s)
        if source.reconnects >= 2:
            break
    source.close()
    assert attempts >= 4
    assert times == sorted(times)
    assert "secret" not in caplog.text and "is back" in caplog.text


def test_an_rtsp_camera_over_tcp_that_is_unplugged_and_plugged_in_again() -> None:
    with RtspCamera() as camera:
        url = f"rtsp://user:secret@127.0.0.1:{camera.port}/live"
        source = open_source(url, 50.0)
        assert source.is_live and "secret" not in source.name
        times: list[float] = []
        levels: list[float] = []
        for picture in source.pictures():
            assert picture.rgb.shape == (64, 64, 3)
            times.append(picture.time_s)
            levels.append(float(picture.rgb.mean()))
            if len(times) == 4:
                camera.unplug()
            if len(times) > 4 and camera.served == 2:
                break
        source.close()
    assert times == sorted(times)
    assert len(set(levels)) > 1


def test_a_live_source_gives_the_newest_picture() -> None:
    source = LiveSource("camera", 1000.0, open_container=lambda url, name, **_: Camera(500))
    pictures = source.pictures()
    first = int(next(pictures).rgb[0, 0, 0])
    time.sleep(0.2)
    second = int(next(pictures).rgb[0, 0, 0])
    source.close()
    assert second - first > 5
