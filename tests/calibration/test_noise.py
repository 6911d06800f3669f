"""A camera's noise, told from motion."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_vlm.formats.calibrated import ChangeSection
from edge_vlm_calibration.noise import change
from edge_vlm_calibration.rows import Rows, score_rows
from edge_vlm_calibration.simulate import duplicates_of

CELLS, FPS = 9, 2


def change_section(clips: dict[str, Rows], scorer: str) -> tuple[ChangeSection, list[str]]:
    return change.change_section(clips, change.stillest(clips), scorer)


def made(frames: int, *, noise: float = 0.0, speed: float = 0.0, seed: int = 0) -> Rows:
    """A picture with noise of that size in which a bright square moves by `speed` a frame."""
    rng = np.random.default_rng(seed)
    rows = np.zeros(frames, score_rows(CELLS))
    base = rng.uniform(40, 200, (32, 32))
    for i in range(frames):
        thumb = base + rng.uniform(-noise / 2, noise / 2, (32, 32))
        place = int(4 + speed * i) % 24
        thumb[10:16, place : place + 6] = 250
        rows[i]["thumb"] = thumb
        rows[i]["time_s"] = i / FPS
        rows[i]["first"] = i == 0
        rows[i]["moved"] = rng.uniform(0, noise / 10, CELLS) + (speed > 0) * (i % 3) * 20
        rows[i]["scores"] = rng.uniform(0, 0.01, CELLS)
    return rows


@pytest.mark.parametrize("noise", [0.0, 1.0, 4.0])
def test_noise_is_measured_where_nothing_moves(noise: float) -> None:
    still, moving = made(60, noise=noise), made(60, noise=noise, speed=3, seed=1)
    section, notes = change_section({"still": still, "moving": moving}, "learned")
    assert section.still is not None
    assert section.still.clip == "still"
    assert section.noise == pytest.approx(noise, rel=0.1)
    threshold = float(section.settings["duplicate_threshold"])
    assert threshold == pytest.approx(max(1.0, 1.5 * noise), rel=0.1)
    dropped = duplicates_of(still, section.settings)
    # One in each heartbeat is encoded all the same.
    assert dropped.sum() == 60 - 3
    assert duplicates_of(moving, section.settings).sum() == 0
    assert section.pixel_floor == pytest.approx(noise / 10, rel=0.1, abs=1e-6)
    assert section.score_floor == pytest.approx(0.01, rel=0.05)
    assert not notes


@pytest.mark.parametrize("speed", [0.25, 1, 7])
def test_motion_is_no_noise(speed: float) -> None:
    section, (note,) = change_section({"moving": made(60, noise=1, speed=speed)}, "learned")
    assert section.settings == {}
    assert section.still is None
    assert section.noise is section.pixel_floor is None
    assert "cannot be told from motion" in note


def test_slow_light_is_no_noise() -> None:
    rows = made(120, noise=0.5)
    rows["thumb"] += np.linspace(0, 60, 120)[:, None, None].astype(np.float32)
    section, _ = change_section({"dusk": rows}, "learned")
    assert section.still is None


def test_a_scene_in_which_nothing_happens_is_said() -> None:
    section, notes = change_section({"still": made(60, noise=2)}, "none")
    assert section.score_floor is None
    assert any("nothing moves" in note for note in notes)


def test_a_clip_of_many_streams_is_looked_at_one_by_one() -> None:
    parts: list[Any] = [made(20, noise=1, speed=3), made(20, noise=1), made(4, noise=0)]
    section, _ = change_section({"set": np.concatenate(parts)}, "learned")
    assert section.still is not None
    assert section.still.frames == 8
    assert section.noise == pytest.approx(1.0, rel=0.1)
