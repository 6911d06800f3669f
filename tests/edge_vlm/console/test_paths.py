"""Where a command is to write is known to be possible before it begins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edge_vlm import cli, errors
from edge_vlm.console.paths import output_file, output_file_in_folder, output_folder
from edge_vlm.errors import ConfigError, RecordingError
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE, DEMO_FOLDER
from tests.tiny import ROOT

CLIP = str(DEMO_FOLDER / "clip.mp4")
CHECKPOINT = str(ROOT / "training/checkpoints/demo")
BAD = "/proc/nowhere"
"""Even root cannot write there."""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs Linux")
@pytest.mark.parametrize(
    "line",
    [
        ("serve", "--record", BAD),
        ("watch", "--source", CLIP, "--record", f"{BAD}/x.evlm"),
        ("eval", "-o", BAD),
        ("eval", "--json", BAD),
        ("eval-alerts", "footage", "--json", BAD),
        ("replay", "x.evlm", "--json", BAD),
        ("calibrate", CHECKPOINT, CLIP, "-o", BAD),
        ("export", CHECKPOINT, "-o", BAD),
        ("convert", CHECKPOINT, "-o", BAD),
        ("build", str(DEMO_BUNDLE), "--engines", BAD),
        ("train", "smoke", "-o", BAD),
        ("world", "-o", BAD),
        ("bench", "--json", BAD),
        ("bench", "--trace", BAD),
        ("pull", "a/b", "-o", BAD),
    ],
    ids=lambda line: line[0],
)
def test_an_output_that_cannot_be_written_is_told_at_once(
    line: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    kind = RecordingError if "--record" in line else ConfigError
    assert cli.main(line) == kind.exit_code
    shown = capsys.readouterr()
    assert shown.err.startswith(f"edge-vlm: {kind.code}: cannot be written: ")
    assert "/proc" in shown.err
    assert not shown.out


def test_the_variable_is_checked_as_well(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("EDGE_VLM_RECORD", str(file))
    assert cli.main(["serve"]) == RecordingError.exit_code
    assert f"a file is in the way ({file})" in capsys.readouterr().err


@pytest.mark.parametrize("line", [("calibrate", CHECKPOINT), ("verify", ".", "--footage")])
def test_footage_that_is_not_there(
    line: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*line, "nope.mp4"]) == errors.VideoNotFound.exit_code
    assert "nope.mp4" in capsys.readouterr().err


def test_training_data_that_is_not_there_costs_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    line = ("train", "stts_smoke", "-o", str(run), "--set", "data=world@1,nope.jsonl@3")
    assert cli.main(line) == errors.DataError.exit_code
    assert "nope.jsonl" in capsys.readouterr().err
    assert not run.exists()


def test_what_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "old"
    file.write_text("text")
    assert output_file(file) == file
    assert output_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert output_file_in_folder(tmp_path / "a" / "c") == tmp_path / "a" / "c"
    assert output_file("/dev/null") == Path("/dev/null")
    assert sorted(tmp_path.iterdir()) == [file]
    assert file.read_text() == "text"


@pytest.mark.parametrize("kind", [output_file, output_file_in_folder])
def test_a_file_is_no_folder(kind: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is a folder"):
        kind(tmp_path)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=r"no such folder|in the way"):
        kind(file / "below")
