"""Settings chosen on footage: what is predicted is what a real session keeps."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_vlm.cli import main
from edge_vlm.errors import ConfigError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.calibrated import AlertsSection, BudgetSection, ChangeSection
from edge_vlm.formats.calibration import Calibration
from edge_vlm.pixels.video import write_video
from edge_vlm.watching import Watcher
from edge_vlm_calibration.agreeing import disagreements
from edge_vlm_calibration.budget import Wanted, budget_section
from edge_vlm_calibration.commands import calibrate as command
from edge_vlm_calibration.commands import share_of
from edge_vlm_calibration.looking import look_at, rows_of
from edge_vlm_calibration.rows import RowFile, Rows, WorkFolder, only_run
from edge_vlm_calibration.run import Request, look, made_with, opened
from edge_vlm_calibration.simulate import DEFAULTS, simulate
from edge_vlm_export.calibrated import CalibrationOf
from edge_vlm_runtime.cameras.config import read_plan
from edge_vlm_runtime.cli.common.config import read_toml
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.inference.bundle_model import calibrated
from edge_vlm_runtime.protocol.settings import ServerLimits, SessionSettings
from edge_vlm_runtime.session.budget import default_settings
from tests.calibration.test_calibrate import make_checkpoint

FPS = 4
STILL, MOVING = 12, 18


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three still seconds, then four and a half in which a square moves."""
    pictures = np.full((STILL + MOVING, 96, 128, 3), (40, 90, 160), np.uint8)
    pictures[:, 60:70] = (90, 40, 30)
    for i in range(MOVING):
        pictures[STILL + i, 10:40, 4 * i : 4 * i + 30] = (240, 60, 30)
    path = tmp_path_factory.mktemp("footage") / "door.mp4"
    write_video(path, pictures, FPS)
    return path


def request_for(*clips: Path, **more: Any) -> Request:
    usual = Request(
        model=DEMO_BUNDLE,
        clips=clips,
        sections=("change", "budget"),
        wanted=Wanted("keep_ratio", 0.3),
        fps=FPS,
        measure_s=60.0,
        threads=1,
        backend="ort",
    )
    return dataclasses.replace(usual, **more)


@pytest.fixture(scope="module")
def watcher(clip: Path) -> Iterator[Watcher]:
    with opened(request_for(clip)) as found:
        yield found


@pytest.fixture(scope="module")
def rows(watcher: Watcher, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    file = RowFile(tmp_path_factory.mktemp("rows") / "rows", rows_of(watcher))
    look_at(watcher, clip, FPS, file, lambda: None)
    return file.read()


def run(*line: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in line]))


@pytest.fixture(scope="module")
def made(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "calibration.json"
    assert run(DEMO_BUNDLE, clip, "-o", out, "--fps", FPS, "--keep-ratio", 0.3) == 0
    return out


def test_defaults_are_those_of_sessions() -> None:
    usual = dataclasses.asdict(SessionSettings())
    assert {name: usual[name] for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    "settings",
    [
        {"keep_ratio": 0.3},
        {"keep_ratio": 0.5, "payback_frames": 8, "bank_frames": 1.0, "max_cells": 6},
        {"vision_tokens_per_s": 20.0},
        {"keep_ratio": 0.4, "duplicate_threshold": 0.5},
        {"keep_ratio": 0.4, "drop_duplicates": False, "min_cells": 0},
    ],
)
def test_a_simulation_keeps_what_a_session_keeps(
    watcher: Watcher, clip: Path, rows: Rows, settings: dict[str, Any]
) -> None:
    from edge_vlm_calibration.footage import pictures

    settings = {**settings, "fps_cap": float(FPS)}
    seen = kept = duplicates = 0
    per_cell = np.zeros(watcher.config.vision.num_cells)
    with watcher.session(settings) as session:
        for picture in pictures(clip, FPS, 1280):
            sent = session.send(picture.rgb(), picture.time_s)
            seen, kept = seen + sent.cells_seen, kept + sent.cells_kept
            duplicates += sent.cells_seen == 0
            per_cell[list(sent.kept)] += 1
    spent = simulate(rows, settings, 1 / FPS)
    assert (spent.seen, spent.duplicates) == (seen, duplicates)
    # Behind duplicates the model compares with another picture than the rows do.
    tolerance = 0 if not duplicates else 0.02 * seen
    assert abs(spent.kept - kept) <= tolerance
    if not duplicates:
        assert spent.kept_map.tolist() == per_cell.tolist()


def test_the_footage_comes_to_what_was_wanted(rows: Rows) -> None:
    base = {"fps_cap": float(FPS), "drop_duplicates": False}
    for wanted in (Wanted("keep_ratio", 0.35), Wanted("vision_tokens_per_s", 22.0)):
        section, _ = budget_section({"door": rows}, wanted, base, "learned")
        spent = simulate(rows, {**base, **section.settings}, 1 / FPS)
        assert wanted.of(spent) == pytest.approx(wanted.value, rel=0.03)
        assert section.share == pytest.approx(spent.share)
        shares = [point.share for point in section.curve]
        assert shares == sorted(shares, reverse=True)
    later = np.array(rows["scores"][~rows["first"]])
    for point in section.curve:
        assert point.share == pytest.approx((later >= point.threshold - 1e-7).mean(), abs=1e-3)


def test_what_cannot_be_held_is_said(rows: Rows) -> None:
    base = {"fps_cap": float(FPS), "drop_duplicates": False}
    _, notes = budget_section({"door": rows}, Wanted("vision_tokens_per_s", 500), base, "learned")
    assert any("more than there are: 64" in note for note in notes)
    _, notes = budget_section({"door": rows}, Wanted("keep_ratio", 0.01), base, "learned")
    assert any("cannot be held on this footage" in note for note in notes)


def test_the_command_writes_settings_that_a_server_takes(made: Path, clip: Path) -> None:
    calibration = Calibration.read(made)
    budget, change = calibration.find(BudgetSection), calibration.find(ChangeSection)
    assert budget is not None
    assert change is not None
    assert not made.with_name(f"{made.name}.work").exists()
    (found,) = budget.clips
    assert (found.name, found.frames) == (clip.name, STILL + MOVING)
    assert found.measured_share == pytest.approx(found.expected_share, abs=0.02)
    assert change.still is not None
    assert change.still.end_s <= STILL / FPS
    bundle = EngineBundle.open(DEMO_BUNDLE)
    settings = default_settings(calibrated(bundle, made), ServerLimits())
    for section in (budget, change):
        for name, value in section.settings.items():
            assert getattr(settings, name) == value, name
    assert settings.keep_ratio != default_settings(bundle, ServerLimits()).keep_ratio
    assert settings.window_tokens == bundle.defaults["window_tokens"]


def test_another_model_is_refused(made: Path, tmp_path: Path) -> None:
    from edge_vlm_calibration.provenance import identity_of

    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match="that of other weights: of 'demo', not of this"):
        Calibration.read(made).require_model(identity_of(checkpoint), made)
    other = Calibration(model=identity_of(checkpoint))
    other.write(tmp_path / "other.json")
    with pytest.raises(ConfigError, match="other weights"):
        calibrated(EngineBundle.open(DEMO_BUNDLE), tmp_path / "other.json")
    with pytest.raises(ConfigError, match="other weights"):
        run("merge", made, tmp_path / "other.json", "-o", tmp_path / "both.json")


def test_a_stopped_run_goes_on(watcher: Watcher, clip: Path, rows: Rows, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop_at(most: int) -> Any:
        left = iter(range(most))

        def on_frame() -> None:
            if next(left, None) is None:
                raise Stop

        return on_frame

    file = RowFile(tmp_path / "rows", rows_of(watcher))
    for most in (1, 10, 25):
        with pytest.raises(Stop):
            look_at(watcher, clip, FPS, file, stop_at(most))
    look_at(watcher, clip, FPS, file, lambda: None)
    found = file.read()
    assert len(found) == len(rows)
    for name in rows.dtype.names or ():
        np.testing.assert_allclose(found[name], rows[name], atol=1e-6)


def test_other_rows_are_begun_anew(watcher: Watcher, clip: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        WorkFolder(tmp_path / "work", made_with(request_for(clip), watcher)) as first,
    ):
        (first.path / "0000.rows").write_bytes(b"x")
        raise KeyboardInterrupt
    again = WorkFolder(tmp_path / "work", made_with(request_for(clip), watcher))
    assert again.is_resumed
    assert (again.path / "0000.rows").exists()
    other = WorkFolder(tmp_path / "work", made_with(request_for(clip, fps=3.0), watcher))
    assert not other.is_resumed
    assert not (other.path / "0000.rows").exists()


def test_bad_clips_are_skipped_and_named(
    watcher: Watcher, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"not a video" * 100)
    blank = tmp_path / "blank.mp4"
    write_video(blank, np.full((12, 96, 128, 3), 77, np.uint8), FPS)

    def seen(*clips: Path) -> Any:
        request = request_for(*clips)
        with WorkFolder(tmp_path / "work", made_with(request, watcher)) as work:
            return look(request, watcher, work)

    found = seen(clip, bad)
    assert list(found.rows) == [clip.name]
    assert list(found.skipped) == ["bad.mp4"]
    assert "bad.mp4 is left out" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"only 1 of 3 clips can be read: bad\.mp4.*bad\.mp4"):
        seen(clip, bad, bad)
    with pytest.raises(ConfigError, match="of one colour"):
        seen(blank)
    assert any("blank.mp4 is of one colour" in note for note in seen(clip, blank).notes)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ([], "there are no clips"),
        (["--keep-ratio", "1.5"], "--keep-ratio must be in"),
        (["--tokens-per-second", "0"], "--tokens-per-second above 0"),
        (["--sections", "budgets"], "there is no section 'budgets'"),
        (["--sections", "ranges"], "of a checkpoint, not of a bundle"),
        (["--sections", "alerts"], "there are no marks"),
        (["--fps", "0"], "--fps must be"),
        (["--measure", "inf"], "--measure not negative"),
        (["--sections", "change", "--keep-ratio", "0.3"], "has no use for --keep-ratio"),
        (["--toml", "alerts.toml"], "has no use for --toml"),
        (["--max-frames", "9"], "has no use for --max-frames"),
    ],
)
def test_wrong_requests_are_named(clip: Path, tmp_path: Path, line: list[str], said: str) -> None:
    clips = [clip] if line else []
    with pytest.raises(ConfigError, match=said):
        run(DEMO_BUNDLE, *clips, "-o", tmp_path / "c.json", *line)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_calibrated_too(clip: Path, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    out = tmp_path / "c.json"
    line = [checkpoint, clip, "-o", out, "--fps", 2, "--sections", "budget"]
    assert run(*line, "--measure", 4) == 0
    budget = Calibration.read(out).find(BudgetSection)
    assert budget is not None
    (found,) = budget.clips
    assert found.measured_share == found.expected_share
    assert run(checkpoint, clip, "-o", out, "--fps", 2, "--sections", "change") == 0
    assert set(Calibration.read(out).sections) == {"budget", "change"}


def test_marked_events_become_alerts_that_a_server_reads(clip: Path, tmp_path: Path) -> None:
    marks = tmp_path / "marks.csv"
    begin_s, end_s = STILL / FPS, (STILL + MOVING) / FPS
    marks.write_text(f"alert,question,start,end\ndog,Is there a dog now?,{begin_s},{end_s}\n")
    out, file = tmp_path / "c.json", tmp_path / "server.toml"
    line = [DEMO_BUNDLE, clip, "-o", out, "--sections", "alerts", "--fps", 2]
    run(*line, "--marks", marks, "--camera", "door", "--toml", tmp_path / "alerts.toml")
    section = Calibration.read(out).find(AlertsSection)
    assert section is not None
    (alert,) = section.alerts
    assert (alert.name, alert.events) == ("dog", 1)
    assert alert.watched_h == pytest.approx((STILL + MOVING) / FPS / 3600)
    assert alert.answer_mass > 0.9
    camera = f'[[camera]]\nname = "door"\nsource = "{clip}"\n'
    file.write_text(camera + (tmp_path / "alerts.toml").read_text())
    (found,) = read_plan(read_toml(file), file).alerts
    assert {name: getattr(found.rule, name) for name in alert.rule} == alert.rule


def test_right_answers_stand_beside_shares(clip: Path, tmp_path: Path) -> None:
    questions = tmp_path / "qa.jsonl"
    asked = {"video": str(clip), "question": "Is there a dog now?", "answer": "no"}
    questions.write_text(json.dumps(asked) + "\n")
    out = tmp_path / "c.json"
    line = [DEMO_BUNDLE, clip, "-o", out, "--sections", "budget", "--measure", 0]
    run(*line, "--questions", questions, "--plot", tmp_path / "plot.png")
    budget = Calibration.read(out).find(BudgetSection)
    assert budget is not None
    assert [point.keep_ratio for point in budget.accuracy] == [1.0, 0.7, 0.5, 0.3, 0.2, 0.1]
    assert all(point.asked == 1 and point.accuracy in (0, 1) for point in budget.accuracy)
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_second_run_into_one_file_is_refused(clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "calibration.json"
    with only_run(out), pytest.raises(ConfigError, match="another run is writing this file"):
        run(DEMO_BUNDLE, clip, "-o", out, "--sections", "change")
    run(DEMO_BUNDLE, clip, "-o", out, "--sections", "change")
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]


def test_sections_that_no_longer_fit_each_other_are_said(
    clip: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The predicted share counts duplicates: with another threshold it is another."""
    whole = Calibration.read(made)
    assert not disagreements(whole)
    alone, budget = tmp_path / "change.json", tmp_path / "budget.json"
    section = whole.sections["change"]
    data = {**section.data, "settings": {"drop_duplicates": True, "duplicate_threshold": 77.0}}
    other = dataclasses.replace(section, data=data)
    dataclasses.replace(whole, sections={"change": other}).write(alone)
    dataclasses.replace(whole, sections={"budget": whole.sections["budget"]}).write(budget)
    out = tmp_path / "merged.json"
    command_line = ["merge", made, alone, "-o", out]
    assert run(*command_line) == 0
    said = capsys.readouterr().err
    assert f"change is that of {alone}" in said
    assert "duplicate_threshold" in said
    assert "(now 77.0)" in said
    assert run("merge", budget, alone, "-o", out) == 0
    (line,) = disagreements(Calibration.read(out))
    assert line.startswith("budget was made with other settings")


def test_a_bundle_is_calibrated_for_what_it_was_made_for() -> None:
    assert share_of({"keep_ratio": 0.3}) == Wanted("keep_ratio", 0.3)
    assert share_of({"keep_ratio": 0.3, "vision_tokens_per_s": 9}).name == "vision_tokens_per_s"
    assert share_of({}) == share_of({"keep_ratio": 1.0}) == Wanted("keep_ratio", 0.5)


def test_alerts_whose_names_become_the_same_stay_apart(clip: Path, tmp_path: Path) -> None:
    marks, out = tmp_path / "marks.csv", tmp_path / "c.json"
    marks.write_text(
        "alert,question,start,end\nmy cat,Is there a cat now?,1,2\nmy-cat,Is there a dog now?,,\n",
        "utf-8",
    )
    line = [DEMO_BUNDLE, clip, "-o", out, "--sections", "alerts", "--marks", marks]
    run(*line, "--fps", 2, "--toml", tmp_path / "alerts.toml")
    section = Calibration.read(out).find(AlertsSection)
    assert section is not None
    assert [alert.name for alert in section.alerts] == ["my-cat", "my-cat-2"]
    run(DEMO_BUNDLE, clip, "-o", out, "--sections", "budget", "--fps", 4, "--measure", 0)
    assert any(
        "alerts was made with other" in each for each in disagreements(Calibration.read(out))
    )
    with pytest.raises(ConfigError, match="for 4 frames a second, not for 2"):
        run(*line, "--fps", 2)


def test_an_export_says_which_settings_it_leaves_out(
    made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = EngineBundle.open(DEMO_BUNDLE)

    def exported(scorer: str) -> Any:
        cfg = SimpleNamespace(scorer_kind=scorer, vision=bundle.config.vision)
        source: Any = SimpleNamespace(cfg=cfg, identity=bundle.source)
        return CalibrationOf(made, source).over({}, reuse=False)

    assert exported("learned")["duplicate_threshold"] > 0
    assert not caplog.text
    assert exported("change") == {}
    assert "are left out: they are for scorer 'learned', this bundle's is 'change'" in caplog.text


def test_watching_a_file_says_that_no_duplicates_are_dropped(
    made: Path, clip: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = ["watch", "--source", str(clip), "--fast", "--calibration", str(made)]
    assert main(line) == 0
    assert "every picture of a file is taken" in capfd.readouterr().err
