"""`edge-vlm data check` finds every bad record, not only the first, and counts the others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edge_vlm import cli
from edge_vlm.pixels.video import write_video
from edge_vlm_training.world.vocabulary import build_tokenizer

QA = {"type": "qa", "question": "what is it?", "answer": "a cat"}
LINES = (
    {"video": "a.mp4", "annotations": [QA, {"type": "caption", "caption": "it is a cat"}]},
    {"video": "a.mp4", "annotations": [{"type": "count", "question": "how many?", "count": "2"}]},
    {"video": "no.mp4", "annotations": [QA]},
    {"video": "bad.mp4", "annotations": [QA]},
    {"video": "a.mp4", "annotations": [QA], "start_s": 0.5},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_video(tmp_path / "a.mp4", np.zeros((21, 32, 32, 3), np.uint8), 10)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    return tmp_path


def write(folder: Path, *numbers: int) -> str:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(LINES[i]) + "\n" for i in numbers))
    return str(path)


def test_good_records_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", write(folder, 0, 4), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["facts"]["records"] == "2 of 2 can be used"
    assert found["facts"]["videos"] == "1"
    assert found["facts"]["clips"] == "0.1 minutes, 9 frames"
    assert found["annotations"] == {"caption": 1, "qa": 2}


def test_every_bad_record_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", write(folder, 0, 1, 2, 3, 4)]) == 15
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("E-")]
    assert [line.partition(":")[0] for line in lines] == [
        "E-DATA-RECORD",
        "E-VIDEO-NOT-FOUND",
        "E-VIDEO-UNREADABLE",
    ]
    for number, line in zip((2, 3, 4), lines, strict=True):
        assert f"train.jsonl:{number}" in line
    assert "at $.annotations[0].count" in lines[0]
    assert "3 of 5 records cannot be used" in err


def test_rows_are_measured_with_a_tokenizer(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = folder / "tokenizer.json"
    texts = ["what is it?", "a cat", "it is a cat", "describe this video in detail."]
    build_tokenizer(texts, tokenizer)
    arguments = ["data", "check", write(folder, 0, 4), "--tokenizer", str(tokenizer)]
    assert cli.main([*arguments, "--cells", "9", "--max-tokens", "300", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)["tokens, at most 300 a row"]
    assert table["packed rows"] == 1
    assert table["clips a row"] == 2
    assert cli.main([*arguments, "--cells", "9", "--max-tokens", "50"]) == 15
    out = capsys.readouterr().out
    assert out.count("E-DATA-TOO-LONG") == 2
    assert "train.jsonl:1" in out


@pytest.mark.parametrize(
    ("option", "word"),
    [(["--fps", "0"], "fps"), (["--removed", "1"], "keep_ratio"), (["--keep-ratio", "0"], "keep_")],
)
def test_a_wrong_option_is_refused(
    folder: Path, option: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["data", "check", write(folder, 0), *option]) == 2
    assert word in capsys.readouterr().err
