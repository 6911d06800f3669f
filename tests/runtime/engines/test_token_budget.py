"""What a stream costs: the budget is held to whatever the clip shows, a static scene costs little.

With the demo model, whose scores mean something, through whole sessions.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest

from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm_runtime import protocol
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.sources.video_file import FileSource
from tests.runtime.cameras.pictures import scene
from tests.runtime.session.fake_engines import FakeClock
from tests.runtime.session.viewer import Viewer
from tests.tiny import ROOT

SCENES = ("static", "slow", "fast", "bursts")
LONG = 60
"""Pictures of a clip: as long as a budget takes to be held to a tenth."""
SHARED_CLIPS = ROOT.parent / "shared" / "clips"


@pytest.fixture(scope="module")
def engines() -> Iterator[LoadedBundle]:
    with LoadedBundle.open(DEMO_BUNDLE, threads=1) as opened:
        yield opened


class Watched(Viewer):
    """A session that is shown a clip, every frame at its own time."""

    def __init__(self, engines: LoadedBundle, **settings: Any) -> None:
        super().__init__(engines, FakeClock(), **settings)
        self._number = 0

    def see(self, pictures: list[np.ndarray], times_s: list[float]) -> None:
        for rgb, time_s in zip(pictures, times_s, strict=True):
            self._number += 1
            self.put(self._number, data=encode_jpeg(rgb), at_s=time_s)
            self.run()

    def accepted(self, since: int = 0) -> list[protocol.FrameAccepted]:
        return self.of(protocol.FrameAccepted)[since:]

    def kept(self, since: int = 0) -> int:
        return sum(event.cells_kept for event in self.accepted(since))

    def share(self, since: int = 0) -> float:
        return self.kept(since) / sum(event.cells_seen for event in self.accepted(since))


def evenly(count: int, fps: float, begin_s: float = 0.0) -> list[float]:
    return [begin_s + index / fps for index in range(count)]


def shared_clip(name: str) -> list[np.ndarray]:
    path = SHARED_CLIPS / f"{name}.mp4"
    if not path.exists():
        pytest.skip("the shared clips are not here")
    source = FileSource(path, 8.0)
    try:
        return [picture.rgb for picture in islice(source.pictures(), LONG)]
    finally:
        source.close()


def clip(name: str) -> list[np.ndarray]:
    return scene(name, LONG) if name in SCENES else shared_clip(name)


@pytest.mark.parametrize(
    ("name", "keep_ratio"),
    [
        *[("static", 0.25), ("static", 0.6), ("slow", 0.6), ("fast", 0.25)],
        *[("bursts", 0.25), ("bursts", 0.6), ("bikes", 0.6), ("bigbuckbunny", 0.25)],
    ],
)
def test_a_keep_ratio_is_held_on_static_and_on_fast_clips(
    engines: LoadedBundle, name: str, keep_ratio: float
) -> None:
    pictures = clip(name)
    watched = Watched(engines, keep_ratio=keep_ratio)
    watched.see(pictures, evenly(len(pictures), 2.0))
    assert len(watched.accepted()) == len(pictures)
    assert 0.9 * keep_ratio <= watched.share() <= keep_ratio + 1e-9


@pytest.mark.parametrize(
    ("name", "fps", "per_s"),
    [
        *[("static", 1.0, 6.0), ("slow", 5.0, 12.0), ("fast", 1.0, 6.0), ("fast", 5.0, 12.0)],
        *[("bursts", 5.0, 12.0), ("bikes", 1.0, 6.0), ("bigbuckbunny", 5.0, 12.0)],
    ],
)
def test_a_rate_of_tokens_is_held_whatever_the_rate_of_frames(
    engines: LoadedBundle, name: str, fps: float, per_s: float
) -> None:
    pictures = clip(name)
    watched = Watched(engines, vision_tokens_per_s=per_s)
    watched.see(pictures, evenly(len(pictures), fps))
    assert 0.9 * per_s <= watched.kept() / (len(pictures) / fps) <= 1.1 * per_s


def test_a_rate_of_tokens_is_held_while_frames_come_irregularly(engines: LoadedBundle) -> None:
    random = np.random.default_rng(3)
    gaps_s = [0.25, 0.5, 1.0, 2.0]
    times_s = np.cumsum([0.0, *random.choice(gaps_s, LONG - 1)]).tolist()
    for name in ("slow", "fast"):
        watched = Watched(engines, vision_tokens_per_s=10.0)
        watched.see(scene(name, LONG), times_s)
        assert 9.0 <= watched.kept() / (times_s[-1] + 0.9) <= 11.0


def test_a_budget_is_changed_in_mid_stream(engines: LoadedBundle) -> None:
    watched = Watched(engines, keep_ratio=0.8)
    part_of = 40
    pictures = scene("fast", 4 * part_of)
    times_s = evenly(len(pictures), 2.0)
    changes: list[dict[str, Any]] = [
        {},
        {"keep_ratio": 0.25},
        {"vision_tokens_per_s": 16.0},
        {"vision_tokens_per_s": 0.0, "keep_ratio": 0.6},
    ]
    shares = []
    for part, change in enumerate(changes):
        watched.update(**change)
        since = part * part_of
        watched.see(pictures[since : since + part_of], times_s[since : since + part_of])
        shares.append(watched.share(since))
        if part:  # another budget does not begin with a whole frame
            assert watched.accepted(since)[0].cells_kept < 16
    assert shares == pytest.approx([0.8, 0.25, 0.5, 0.6], rel=0.1)


def test_a_static_scene_costs_less_than_a_tenth_of_a_busy_one(engines: LoadedBundle) -> None:
    """Half a minute of a camera with the default settings: frames through engines, and tokens."""
    costs = {}
    for name in ("static", "fast"):
        watched = Watched(engines, delivery="live", window_tokens=0)
        watched.see(scene(name, LONG), evenly(LONG, 2.0))
        costs[name] = (len(watched.accepted()), watched.kept())
        reasons = set(watched.drop_reasons().values())
        assert reasons == ({"duplicate"} if name == "static" else set())
    for still, busy in zip(costs["static"], costs["fast"], strict=True):
        assert 0 < still < 0.1 * busy
    assert costs["static"][0] == 3  # a heartbeat each ten seconds


def test_a_drift_too_slow_to_see_between_frames_is_not_lost(engines: LoadedBundle) -> None:
    """Compared with the last picture encoded, not with the last one: light that fades adds up."""
    base = scene("static", 1)[0].astype(np.float32)
    fading = [(base * (1 - 0.005 * index)).astype(np.uint8) for index in range(60)]
    watched = Watched(engines, delivery="live", heartbeat_s=1000.0)
    watched.see(fading, evenly(60, 2.0))
    assert 5 < len(watched.accepted()) < 30
