from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from edge_vlm.errors import VideoNotFound, VideoUnreadable
from edge_vlm.pixels.video import TimedFrame
from edge_vlm_runtime.sources.addresses import open_camera
from edge_vlm_runtime.sources.container import mask_credentials
from edge_vlm_runtime.sources.live import LiveSource
from edge_vlm_runtime.sources.open import open_source
from edge_vlm_runtime.sources.video_file import FileSource
from tests.runtime.cameras.pictures import write_video
from tests.runtime.cameras.rtsp_camera import RtspCamera
from tests.runtime.ports import KeptPort
from tests.runtime.server.live import TIMEOUT_S


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
    port = KeptPort()
    with pytest.raises(VideoUnreadable) as caught:
        open_source(f"rtsp://user:secret@127.0.0.1:{port.number}/live", 2.0)
    assert "secret" not in str(caught.value)
    assert "***@" in str(caught.value)


class FakeCamera:
    """Gives frames until it is unplugged, and then raises `end`."""

    def __init__(self, frames: int, end: BaseException | None = None) -> None:
        self._frames = frames
        self._end = end or VideoUnreadable("unplugged: rtsp://user:secret@cam/1")
        self.counts: Counter[str] = Counter()

    def decoded(self) -> Iterator[TimedFrame]:
        for index in range(self._frames):
            time.sleep(0.002)
            rgb = np.full((16, 16, 3), index % 256, dtype=np.uint8)
            yield TimedFrame(0.0, 0.0, av.VideoFrame.from_ndarray(rgb, format="rgb24"), "cam")
        raise self._end

    def close(self) -> None:
        pass


def test_a_camera_that_goes_away_and_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    attempts = 0

    def open_it() -> FakeCamera:
        nonlocal attempts
        attempts += 1
        if attempts == 2:
            raise VideoUnreadable("still away", where="cam")
        return FakeCamera(frames=20)

    source = LiveSource("rtsp://user:secret@cam/1", 1000.0, open_it, first_back_off_s=0.01)
    assert source.name == "rtsp://***@cam/1"
    times = []
    for picture in source.pictures():
        times.append(picture.time_s)
        if source.reconnects >= 2:
            break
    source.close()
    assert attempts >= 4
    assert times == sorted(times)
    assert "secret" not in caplog.text
    assert "is back" in caplog.text


def sound_only(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        silence = np.zeros((1, 8000), np.int16)
        frame = av.AudioFrame.from_ndarray(silence, format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_a_camera_with_sound_only_is_refused(tmp_path: Path) -> None:
    path = sound_only(tmp_path / "sound.wav")
    with pytest.raises(VideoUnreadable, match="there is no video in it"):
        LiveSource("cam", 2.0, lambda: open_camera(str(path)))


def test_a_camera_that_comes_back_with_sound_only_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clip = write_video(tmp_path / "clip.mp4", num_frames=4)
    opened = iter([clip, sound_only(tmp_path / "sound.wav"), clip, clip, clip])
    source = LiveSource(
        "cam", 1000.0, lambda: open_camera(str(next(opened, clip))), first_back_off_s=0.01
    )
    for _ in source.pictures():
        if source.reconnects:
            break
    wait_for_words(caplog, "is back")  # said behind the count
    source.close()
    assert "still away: there is no video in it" in caplog.text
    assert "went away: the stream ended" in caplog.text


@pytest.mark.parametrize("error", [IndexError("no stream 0"), MemoryError(), ValueError("odd")])
@pytest.mark.parametrize("where", ["reading", "opening"])
def test_no_error_of_a_camera_ends_its_reader(
    error: Exception, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = 0

    def open_it() -> FakeCamera:
        nonlocal attempts
        attempts += 1
        if where == "opening" and attempts == 2:
            raise error
        return FakeCamera(5, error if where == "reading" else None)

    source = LiveSource("cam", 1000.0, open_it, first_back_off_s=0.01)
    for _ in source.pictures():
        if source.reconnects == 2:
            break
    source.close()
    assert f"away: {type(error).__name__}: {error}" in caplog.text


class StopReading(BaseException):
    """Nothing that the reader goes on after."""


def test_a_reader_that_ends_says_so_to_whoever_waits(caplog: pytest.LogCaptureFixture) -> None:
    source = LiveSource("cam", 1000.0, lambda: FakeCamera(3, StopReading("enough")))
    with pytest.raises(VideoUnreadable, match=r"no longer read.*enough"):
        for _ in source.pictures():
            pass
    assert "no longer read" in caplog.text


def test_closing_a_silent_camera_ends_the_wait_for_a_picture() -> None:
    class Silent(FakeCamera):
        def decoded(self) -> Iterator[TimedFrame]:
            unplugged.wait(TIMEOUT_S)
            yield from ()

    unplugged = threading.Event()
    source = LiveSource("cam", 1000.0, lambda: Silent(0))
    seen: list[Any] = []
    waiting = threading.Thread(target=lambda: seen.extend(source.pictures()))
    waiting.start()
    source.close()
    waiting.join(TIMEOUT_S / 2)
    unplugged.set()
    assert not waiting.is_alive()
    assert not seen


def test_an_rtsp_camera_over_tcp_that_is_unplugged_and_plugged_in_again() -> None:
    with RtspCamera() as camera:
        url = f"rtsp://user:secret@127.0.0.1:{camera.port}/live"
        source = open_source(url, 50.0)
        assert source.is_live
        assert "secret" not in source.name
        times: list[float] = []
        levels: list[float] = []
        for picture in source.pictures():
            assert picture.rgb.shape == (64, 64, 3)
            times.append(picture.time_s)
            levels.append(float(picture.rgb.mean()))
            if len(times) == 4:
                camera.unplug()
            if len(times) > 4 and camera.served >= 2:
                break
        source.close()
    assert times == sorted(times)
    assert len(set(levels)) > 1


def test_an_rtsp_camera_that_comes_back_without_its_picture(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with RtspCamera() as camera:
        source = open_source(f"rtsp://user:secret@127.0.0.1:{camera.port}/live", 50.0)
        assert isinstance(source, LiveSource)
        pictures = source.pictures()
        next(pictures)
        camera.sound_only = True
        camera.unplug()
        wait_for_words(caplog, "still away: there is no video in it")
        camera.sound_only = False
        while source.reconnects == 0:
            next(pictures)
        wait_for_words(caplog, "is back")  # said behind the count
        source.close()
    assert "secret" not in caplog.text


def wait_for_words(caplog: pytest.LogCaptureFixture, words: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while words not in caplog.text:
        assert time.monotonic() < deadline, caplog.text
        time.sleep(0.02)


def test_a_live_source_gives_the_newest_picture() -> None:
    first_is_taken, all_are_there, unplugged = (threading.Event() for _ in range(3))

    class InStep(FakeCamera):
        def decoded(self) -> Iterator[TimedFrame]:
            for number, frame in enumerate(super().decoded()):
                yield frame
                if number == 0:
                    first_is_taken.wait(TIMEOUT_S)
                if number == 30:  # whoever asks for another one has taken note of it
                    all_are_there.set()
                    unplugged.wait(TIMEOUT_S)

    source = LiveSource("camera", 1000.0, lambda: InStep(100))
    pictures = source.pictures()
    assert int(next(pictures).rgb[0, 0, 0]) == 0
    first_is_taken.set()
    assert all_are_there.wait(TIMEOUT_S)
    second = int(next(pictures).rgb[0, 0, 0])
    source.close()
    unplugged.set()
    assert second == 30
