"""`demo`, a street in the place of a camera: what it is called, its pace, and what is refused."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_vlm.errors import ConfigError, VideoNotFound, VideoUnreadable
from edge_vlm.world.street import MOST_SEED, Street
from edge_vlm_runtime.cameras.config import CameraPlan, read_plan
from edge_vlm_runtime.sources.open import is_live, is_path, open_file, open_source, require_source
from edge_vlm_runtime.sources.street import MOST_STREET_FPS, StreetCamera, seed_of
from tests.runtime.server.live import TIMEOUT_S

FILE = Path("cameras.toml")


def plan_of(*cameras: dict[str, Any]) -> CameraPlan:
    named = [{"name": f"camera{number}", **each} for number, each in enumerate(cameras)]
    return read_plan({"camera": named}, FILE)


@pytest.mark.parametrize(("text", "seed"), [("demo", 0), ("demo:7", 7), ("DEMO:012", 12)])
def test_a_street_is_named_by_its_seed(text: str, seed: int) -> None:
    assert seed_of(text) == seed
    assert is_live(text)
    assert not is_path(text)
    require_source(text, 2.0)


@pytest.mark.parametrize(
    "text",
    ["demo:abc", "demo:", "demo:-1", "demo:1.5", f"demo:{MOST_SEED + 1}", "demo:" + "9" * 80],
)
def test_another_seed_is_refused(text: str) -> None:
    for call in (require_source, lambda text: open_source(text, 2.0)):
        with pytest.raises(VideoUnreadable, match="whole number") as caught:
            call(text)
        assert caught.value.remedy is not None
    with pytest.raises(ConfigError, match="whole number"):
        plan_of({"source": text})


@pytest.mark.parametrize("fps", [MOST_STREET_FPS + 0.1, 1e9])
def test_a_rate_at_which_nothing_is_rendered(fps: float) -> None:
    with pytest.raises(VideoUnreadable, match="up to 30 pictures a second"):
        open_source("demo", fps)
    with pytest.raises(VideoUnreadable, match="up to 30 pictures a second"):
        require_source("demo:3", fps)
    if fps < 1000:
        with pytest.raises(ConfigError, match="up to 30 pictures a second"):
            plan_of({"source": "demo", "fps": fps})


def test_two_cameras_do_not_show_the_same_street() -> None:
    assert len(plan_of({"source": "demo"}, {"source": "demo:1"}, {"source": "demo:2"}).cameras) == 3
    for first, second in (("demo", "demo:0"), ("demo:7", "DEMO:007")):
        with pytest.raises(ConfigError, match="'camera0' shows the demo street") as caught:
            plan_of({"source": first}, {"source": second})
        assert "demo:" in str(caught.value.remedy)


def test_a_street_is_no_file() -> None:
    with pytest.raises(VideoNotFound) as caught:
        open_file("demo:7", 2.0)
    assert "watch --source demo:7" in str(caught.value.remedy)


class Clock:
    """Time that passes when somebody waits, and when it is told to."""

    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s

    def wait(self, event: threading.Event, seconds: float) -> bool:
        self.now_s += seconds
        return event.is_set()


def test_it_runs_in_real_time_and_whoever_is_slow_misses_pictures() -> None:
    clock = Clock()
    camera = StreetCamera("demo:4", 4.0, clock=clock, wait=clock.wait)
    frames = camera.decoded()
    first = [next(frames) for _ in range(3)]
    assert [frame.time_s for frame in first] == [0.0, 0.25, 0.5]
    assert [frame.captured_s for frame in first] == [50.0, 50.25, 50.5]
    clock.now_s += 0.8  # as if the machine had stood still
    assert [next(frames).time_s for _ in range(3)] == [1.25, 1.5, 1.75]
    camera.close()
    assert list(frames) == []


def number_of(rgb: np.ndarray, seed: int) -> int:
    """Which picture of that street it is, at the highest rate."""
    street = Street(seed)
    numbers = (n for n in range(4000) if np.array_equal(street.picture(n / MOST_STREET_FPS), rgb))
    return next(numbers)


def test_live_pictures_are_those_of_their_times() -> None:
    source = open_source("demo:9", MOST_STREET_FPS)
    try:
        assert source.is_live
        pictures = source.pictures()
        first = next(pictures)
        begin = number_of(first.rgb, 9)  # it runs since it was opened
        for _ in range(3):
            picture = next(pictures)
            number = picture.time_s * MOST_STREET_FPS
            assert number == pytest.approx(round(number), abs=1e-3)
            assert number_of(picture.rgb, 9) == begin + round(number)
            assert picture.age_s >= 0
        source.max_side = 96
        assert next(pictures).rgb.shape == (96, 96, 3)
    finally:
        source.close()


def readers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "edge-vlm-camera"}


def test_a_street_that_is_left_ends_at_once(caplog: pytest.LogCaptureFixture) -> None:
    away: list[str | None] = []
    before = readers()
    source = open_source("demo", 0.001, on_away=away.append)  # the next picture is far away
    pictures = source.pictures()
    next(pictures)
    (reader,) = readers() - before
    source.close()
    reader.join(TIMEOUT_S)
    assert not reader.is_alive()
    assert list(pictures) == []
    assert (away, caplog.messages) == ([None], [])


def test_a_street_needs_neither_torch_nor_pillow_nor_a_video_library() -> None:
    """A JPEG of it does."""
    code = (
        "import sys\n"
        "for name in ('torch', 'PIL', 'av', 'simplejpeg'): sys.modules[name] = None\n"
        "from edge_vlm_runtime.sources.open import open_source\n"
        "source = open_source('demo', 30.0)\n"
        "picture = next(source.pictures())\n"
        "source.close()\n"
        "print(picture.rgb.shape)\n"
        "from edge_vlm.errors import MissingExtraError\n"
        "from edge_vlm.pixels.frames import encode_jpeg\n"
        "try: encode_jpeg(picture.rgb)\n"
        "except MissingExtraError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    shape, missing = done.stdout.splitlines()
    assert shape == "(192, 192, 3)"
    assert "edge-vlm[client]" in missing
