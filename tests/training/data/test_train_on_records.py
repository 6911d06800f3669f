"""`edge-vlm train` learns from a file of records, the same with decoding in threads of its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edge_vlm.cli import main
from edge_vlm.pixels.video import write_video
from edge_vlm_training.world.vocabulary import build_tokenizer

ANNOTATIONS = (
    {"type": "qa", "question": "what is it?", "answer": "a cat"},
    {"type": "count", "question": "how many are there?", "count": 1},
    {"type": "caption", "caption": "it gets brighter", "question": "describe it."},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = []
    for i, length in enumerate((3, 9, 14)):
        noise = np.random.default_rng(i).integers(0, 256, (length, 32, 32, 3), np.uint8)
        write_video(tmp_path / f"{i}.mp4", noise, 10)
        lines.append({"video": f"{i}.mp4", "annotations": ANNOTATIONS[: i + 1]})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = [str(text) for note in ANNOTATIONS for text in note.values()]
    build_tokenizer(texts, tmp_path / "words.json")
    return tmp_path


def train(folder: Path, out: str, **settings: object) -> int:
    values = {
        "model": "tiny",
        "steps": 2,
        "save_every": 0,
        "sample_every": 0,
        "peak_tflops": 1.0,
        "tokenizer": folder / "words.json",
        "data": folder / "train.jsonl",
        **settings,
    }
    options = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    return main(["train", "stts_smoke", "-o", str(folder / out), *options])


def losses(folder: Path, out: str) -> list[float]:
    lines = (folder / out / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_threads_change_nothing_of_what_is_learned(folder: Path) -> None:
    assert train(folder, "plain") == 0
    assert train(folder, "ahead", decode_threads=2) == 0
    assert losses(folder, "plain") == losses(folder, "ahead")
    assert len(losses(folder, "plain")) == 2
    assert (folder / "ahead" / "checkpoint" / "model.safetensors").is_file()


@pytest.mark.parametrize("threads", [0, 1])
def test_a_bad_record_ends_a_run_unless_it_may_be_skipped(
    folder: Path, threads: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "1.mp4").write_bytes(b"no video")
    assert train(folder, "strict", decode_threads=threads) == 5
    assert "train.jsonl:2, video" in capsys.readouterr().err
    assert train(folder, "lenient", decode_threads=threads, skip_bad="true") == 0
    assert "left 1 bad records out" in capsys.readouterr().out
    assert len(losses(folder, "lenient")) == 2
