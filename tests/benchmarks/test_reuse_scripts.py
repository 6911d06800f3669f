"""The benchmarks of reuse, at tiny size: what they state follows from what they measured."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from benchmarks.model import motion_vectors, reuse_answers, stem_reuse
from edge_vlm.pixels.video import write_video
from edge_vlm.presets import tiny
from tests.runtime.cameras.pictures import scene


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("films") / "slow.mp4"
    write_video(path, np.stack(scene("slow", 8)), 10.0)
    return path


def test_bounds_follow_from_the_share_that_the_rule_computed(tmp_path: Path, film: Path) -> None:
    path = tmp_path / "result.json"
    argv = ["--tiny", "--threads", "1", "--clip", f"slow={film}", "--frames", "4"]
    argv += ["--rounds", "2", "--warmups", "0", "--at-once", "2", "1", "--kept", "0.4", "0.2"]
    assert stem_reuse.main([*argv, "--out", str(path)]) == 0
    result = json.loads(path.read_text())
    assert [clip["at_once"] for clip in result["clips"]] == [2, 1]
    cfg = tiny()
    stem = cfg.whole_blocks / cfg.vision.num_layers
    for clip in result["clips"]:
        assert clip["frames"] == 4
        assert 0 < clip["c"] <= 1
        for case in clip["cases"]:
            assert case["k"] in (round(4 / 9, 4), round(2 / 9, 4))
            for name, c in (("pruned", 1.0), ("reused", clip["c"])):
                bound = 1 / (stem * c + (1 - stem) * case["k"])
                assert case[name]["bound"] == pytest.approx(bound, rel=2e-3)
                rounds = zip(clip["whole_s"]["rounds_s"], case[name]["s"]["rounds_s"], strict=True)
                faster = statistics.median(a / b for a, b in rounds)
                assert case[name]["speed_up"] == pytest.approx(faster, rel=0.05)


def test_a_film_that_is_too_short_says_so(film: Path) -> None:
    with pytest.raises(SystemExit, match="fewer than two pictures"):
        stem_reuse.main(["--tiny", "--clip", f"slow={film}@60"])


def test_answers_are_counted_by_what_changes(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    argv = ["--clips", "2", "--per-clip", "1", "--run", "stream:0.5", "--out", str(path)]
    assert reuse_answers.main(argv) == 0
    groups = json.loads(path.read_text())["groups"]
    assert sum(group["clips"] for group in groups.values()) == 2
    for name, group in groups.items():
        low, high = next((low, high) for kind, low, high in reuse_answers.GROUPS if kind == name)
        assert low <= group["c"] < high
        (figures,) = group["runs"].values()
        assert figures["low"] <= figures["difference"] <= figures["high"]
        assert figures["on"] - figures["off"] == pytest.approx(figures["difference"], abs=2e-3)


def test_vectors_show_what_moves_and_not_what_goes_dark(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    room = np.kron(rng.integers(60, 200, (20, 30, 3), np.uint8), np.ones((16, 16, 1), np.uint8))
    rooms = np.repeat(room[None], 24, 0)
    walks = rooms.copy()
    for i in range(24):
        walks[i, 80:160, 12 * i : 12 * i + 80] = rng.integers(0, 255, (1, 1, 3), np.uint8)
    lamp = rooms.copy()
    lamp[12:] //= 3
    for name, film in (("walks", walks), ("lamp", lamp), ("still", rooms)):
        write_video(tmp_path / f"{name}.mp4", film, 8)
    clips = [str(tmp_path / f"{name}.mp4") for name in ("walks", "lamp", "still")]
    assert motion_vectors.main([*clips, "--out", str(tmp_path / "result.json")]) == 0
    walks_, lamp_, still_ = json.loads((tmp_path / "result.json").read_text())["clips"]
    assert 0 < walks_["changed"] < 0.6
    assert walks_["changed_without_vector"] < 0.6
    assert lamp_["changed"] > 0.15
    assert lamp_["changed_without_vector"] > walks_["changed_without_vector"]
    assert still_ == {"clip": "still.mp4", **dict.fromkeys(list(still_)[1:], 0.0)}
