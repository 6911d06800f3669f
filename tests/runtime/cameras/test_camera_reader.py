"""The thread that reads one camera of the server's."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import av

from edge_vlm_runtime.cameras.reader import CameraReader
from tests.runtime.cameras.pictures import write_video
from tests.runtime.server.live import TIMEOUT_S


class Taken:
    """A receiver that waits for its first picture."""

    def __init__(self) -> None:
        self.first = threading.Event()

    def picture(self, jpeg: bytes, captured_us: int) -> None:
        self.first.set()

    def state(self, state: str, detail: str | None) -> None: ...


def decoders() -> list[object]:
    return [each for each in gc.get_objects() if type(each) is av.VideoCodecContext]


def number_besides(others: list[object]) -> int:
    """Of decoders. A camera of another test may still be on its way out: one that is in `others`
    is kept by it and does not count, whether or not it would be gone by now."""
    return sum(all(each is not other for other in others) for each in decoders())


def test_the_decoder_of_a_camera_that_is_gone_does_not_wait_for_a_collection(
    tmp_path: Path,
) -> None:
    clip = tmp_path / "clip.mp4"
    write_video(clip, num_frames=50, fps=10)
    gc.collect()
    gc.disable()
    try:
        before, taken = decoders(), Taken()
        reader = CameraReader(str(clip), 10, taken, max_side=64, hwaccel="none")
        reader.start()
        assert taken.first.wait(TIMEOUT_S)
        assert number_besides(before) == 1
        reader.close()
        assert reader.wait(TIMEOUT_S)
        del reader
        assert number_besides(before) == 0
    finally:
        gc.enable()
