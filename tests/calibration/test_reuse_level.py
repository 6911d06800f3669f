"""The level of `reuse` lies above the camera's noise, and what it saves is what a session saves."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_vlm.errors import ConfigError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.calibrated import ReuseSection
from edge_vlm.formats.calibration import Calibration
from edge_vlm.formats.precision import Precision
from edge_vlm.pixels.frames import Rgb
from edge_vlm.pixels.video import write_video
from edge_vlm_calibration.commands import calibrate as command
from edge_vlm_calibration.footage import pictures
from edge_vlm_calibration.noise.reuse import LEVELS
from edge_vlm_export.calibrated import CalibrationOf
from edge_vlm_runtime import protocol
from edge_vlm_runtime.inference.bundle_model import LoadedBundle, calibrated
from edge_vlm_runtime.protocol.typed import Settings
from tests.calibration.test_calibrate import make_checkpoint
from tests.tiny import tiny_bundle, tiny_reuse_bundle

FPS = 4
STILL, MOVING = 48, 16
SIDE = 144
"""Four times what the tiny model sees: its pictures are sampled, so a pixel's noise is theirs."""


def footage(
    path: Path, noise: float, *, still: int = STILL, moving: int = MOVING, side: int = SIDE
) -> Path:
    """A scene with noise of that spread, then a square that moves in it."""
    rng = np.random.default_rng(0)
    scene = np.kron(rng.integers(60, 200, (6, 6, 3)), np.ones((side // 6, side // 6, 1)))
    taken = scene + rng.normal(0, noise, (still + moving, side, side, 3))
    for i in range(moving):
        taken[still + i, 40:80, 6 * i : 6 * i + 40] = (240, 60, 30)
    write_video(path, np.clip(taken, 0, 255).astype(np.uint8), FPS)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return footage(tmp_path_factory.mktemp("reuse") / "door.mp4", 3.0)


def run(*words: Any) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(list(map(str, words))))


@pytest.fixture(scope="module")
def made(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "calibration.json"
    more = ("--sections", "change,reuse", "--fps", FPS, "-o", out)
    assert run(tiny_reuse_bundle(), clip, *more) == 0
    return out


@pytest.fixture(scope="module")
def section(made: Path) -> ReuseSection:
    found = Calibration.read(made).find(ReuseSection)
    assert found is not None
    return found


def shown(clip: Path) -> Iterator[tuple[Rgb, float]]:
    for picture in pictures(clip, FPS, 1280):
        yield picture.rgb(), picture.time_s


def test_the_level_is_just_above_what_noise_does(section: ReuseSection, clip: Path) -> None:
    level = float(section.settings["reuse"])
    assert section.patch_floor is not None
    assert 1.0 < section.patch_floor < level < 2 * section.patch_floor
    with LoadedBundle.open(tiny_reuse_bundle(), threads=1) as engines:
        still = [rgb for rgb, _ in shown(clip)][:STILL]
        settled = [
            shares_of(engines, still, {"reuse": at, "reuse_refresh": 1000})[1:]
            for at in (level, 0.5 * section.patch_floor)
        ]
    assert sum(settled[0]) < 0.2  # nothing moves; one cell's turn has come
    assert min(settled[1]) > 0.5


def shares_of(engines: LoadedBundle, taken: list[Rgb], settings: dict[str, Any]) -> list[float]:
    """What a session says it computed of each picture; duplicates are none."""
    events: list[protocol.ServerEvent] = []
    wanted: Settings = {"delivery": "live", "drop_duplicates": False, "fps_cap": FPS, **settings}  # type: ignore[typeddict-item]
    with engines.session(wanted, on_event=events.append) as session:
        for i, rgb in enumerate(taken):
            session.send_frame(rgb, i * 1_000_000 // FPS)
    return [e.share_recomputed for e in events if isinstance(e, protocol.FrameAccepted)]


def test_the_shares_are_those_of_sessions(section: ReuseSection, made: Path, clip: Path) -> None:
    threshold = Calibration.read(made).sections["change"].data["settings"]["duplicate_threshold"]
    taken = [rgb for rgb, _ in shown(clip)]
    assert len(section.shares) == 5
    with LoadedBundle.open(tiny_reuse_bundle(), threads=1) as engines:
        for each in section.shares:
            duplicates = {"drop_duplicates": True, "duplicate_threshold": threshold}
            found = shares_of(engines, taken, {**duplicates, "reuse": each.level})
            assert len(found) == section.frames < len(taken)
            assert each.share == pytest.approx(np.mean(found), abs=1e-4)  # they are told rounded
    shares = [each.share for each in section.shares]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < shares[0] < 1.0


def test_only_bundles_that_can_take_the_level(
    made: Path, section: ReuseSection, caplog: pytest.LogCaptureFixture
) -> None:
    level = section.settings["reuse"]
    with caplog.at_level(logging.WARNING):
        able = calibrated(EngineBundle.open(tiny_reuse_bundle()), made)
        assert able.defaults["reuse"] == level
        assert caplog.text == ""
        unable = calibrated(EngineBundle.open(tiny_bundle()), made)
    assert "reuse" not in unable.defaults
    assert f"reuse {level} is left out" in caplog.text
    with LoadedBundle.open(tiny_reuse_bundle(), threads=1, calibration=made) as engines:
        assert max(shares_of(engines, [np.zeros((SIDE, SIDE, 3), np.uint8)] * 3, {})[1:]) < 0.5


def test_an_export_takes_it_with_a_graph_for_it(made: Path, section: ReuseSection) -> None:
    bundle = EngineBundle.open(tiny_bundle())
    cfg = SimpleNamespace(scorer_kind="learned", vision=bundle.config.vision)
    source: Any = SimpleNamespace(cfg=cfg, identity=bundle.source)
    taken = CalibrationOf(made, source)
    assert taken.over({}, reuse=True)["reuse"] == section.settings["reuse"]
    assert "reuse" not in taken.over({}, reuse=False)
    assert taken.notes(Precision(), measures=False, reuse=True) == []
    (note,) = taken.notes(Precision(), measures=False, reuse=False)
    assert "exported with --reuse" in note


@pytest.mark.parametrize(
    ("noise", "still", "moving", "side", "said"),
    [(3.0, 0, 16, SIDE, "cannot be told from motion"), (30.0, 8, 0, 3 * SIDE, "more light")],
)
def test_footage_that_tells_no_level_gets_none(
    noise: float,
    still: int,
    moving: int,
    side: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clip = footage(tmp_path / "clip.mp4", noise, still=still, moving=moving, side=side)
    out = tmp_path / "calibration.json"
    run(tiny_bundle(), clip, "--sections", "reuse", "--fps", FPS, "-o", out)
    found = Calibration.read(out).find(ReuseSection)
    assert found is not None
    assert found.settings == {}
    assert [each.level for each in found.shares] == list(LEVELS)
    told = capsys.readouterr().out
    assert said in told
    assert "settings   none: everything is computed" in told
    assert "has no graph for it" not in told  # there is no level to leave out


def test_a_bundle_that_cannot_is_told(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "calibration.json", tmp_path / "report.html"
    more = ("--fps", FPS, "-o", out, "--report", page)
    run(tiny_bundle(), clip, "--sections", "reuse", *more)
    assert "export the weights again with --reuse" in capsys.readouterr().out
    assert "(chosen)</td>" in page.read_text()


def test_a_model_that_scores_nothing_has_no_such_blocks(clip: Path, tmp_path: Path) -> None:
    bare = make_checkpoint(tmp_path / "bare", scorer=False)
    with pytest.raises(ConfigError, match="this model has none"):
        run(bare, clip, "--sections", "reuse", "-o", tmp_path / "calibration.json")


@pytest.mark.parametrize(
    "broken", [{"settings": {"keep_ratio": 0.5}}, {"frames": -1}, {"shares": 3}]
)
def test_a_broken_section_is_refused(made: Path, broken: dict[str, Any]) -> None:
    calibration = Calibration.read(made)
    data = {**calibration.sections["reuse"].data, **broken}
    with pytest.raises((TypeError, ValueError)):
        ReuseSection.from_data(data)
