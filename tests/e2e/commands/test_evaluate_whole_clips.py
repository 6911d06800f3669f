"""`edge-vlm eval` on a published folder: in torch, through its bundle and over a websocket, whole
clips by the rule that it was trained on, and never a shorter one than was asked about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_vlm.errors import ConfigError
from edge_vlm.evaluation.command import LOG, evaluate
from edge_vlm.evaluation.qa_jsonl import read_questions
from edge_vlm.pixels.sampling import FrameRule
from edge_vlm.pixels.video import write_video
from tests.published_folder import image_bundle, published_folder
from tests.runtime.cameras.pictures import scene
from tests.runtime.command_line import command_line
from tests.tiny import ROOT

ALL = ("--run", "keep_all:1:all")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    pictures = np.stack(scene("fast", 45))
    write_video(folder / "short.mp4", pictures[:9], 4)
    write_video(folder / "long.mp4", pictures, 4)
    for name in ("short", "long"):
        video = f"{name}.mp4"
        lines = [
            {"video": video, "question": "is there a red ball ?", "answer": "yes"},
            {"video": video, "question": "how many cars ?", "answer": "two", "at_s": 1.2},
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def run(*arguments: object) -> int:
    return command_line(evaluate, [*map(str, arguments), *ALL, "--threads", "1"])


def said(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / LOG).read_text().splitlines()[1:]]


def test_all_paths_see_the_same_whole_clip(folder: Path, tmp_path: Path) -> None:
    models = (published_folder(), image_bundle(), "--through", "torch,bundle,served")
    out = tmp_path / "out"
    assert run(folder / "short.jsonl", *models, "-o", out) == 0
    lines = said(out)
    assert [line["path"] for line in lines] == ["torch", "bundle", "served"]
    assert {line["kept"] for line in lines} == {5 * 9}  # 2 a second of 2.25 s, and the last one
    assert len({json.dumps(line["said"]) for line in lines}) == 1
    assert len(set(lines[0]["said"])) == 2


@pytest.mark.parametrize("path", ["bundle", "served"])
def test_a_clip_that_the_memory_does_not_hold_is_an_error(
    folder: Path, tmp_path: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its 23 frames are more than the 10 of this bundle; 9 are taken from the whole clip."""
    asked = (folder / "long.jsonl", image_bundle(), "--through", path)
    assert run(*asked) == ConfigError.exit_code
    why = capsys.readouterr().err
    assert "--max-frames" in why
    assert "10 frames" in why
    out = tmp_path / "out"
    assert run(*asked, "--max-frames", 9, "-o", out) == 0
    assert said(out)[0]["kept"] == 9 * 9


def test_the_newest_frames_alone_need_no_room_for_the_others(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = (str(folder / "long.jsonl"), str(image_bundle()), "-o", str(out), "--threads", "1")
    assert command_line(evaluate, [*asked, "--run", "last_n:0.3:all"]) == 0
    assert said(out)[0]["kept"] == 7 * 9


def test_torch_takes_more_frames_than_it_works_on_at_once(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = (folder / "long.jsonl", published_folder(), "--fps", 4, "-o", out)
    assert run(*asked) == 0
    assert said(out)[0]["kept"] == 45 * 9
    capped = tmp_path / "capped"
    assert run(*asked[:-1], capped, "--max-frames", 200) == 0  # a limit that nothing reaches
    assert said(capped)[0]["said"] == said(out)[0]["said"]


def test_a_question_in_between_is_asked_after_the_frames_up_to_it(folder: Path) -> None:
    rule = FrameRule(num_frames=5, max_fps=2.0)
    (clip,) = read_questions(folder / "long.jsonl", rule=rule)
    assert clip.times_s == pytest.approx([0.0, 2.75, 5.5, 8.25, 11.0])
    assert [question.frame for question in clip.questions] == [4, 0]


def test_models_of_different_rules_are_not_compared(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo bundle was trained on streams."""
    demo = ROOT / "training" / "checkpoints" / "demo"
    assert run(folder / "short.jsonl", demo, image_bundle()) == ConfigError.exit_code
    assert "torch as a stream, served 384 at 2 fps" in capsys.readouterr().err
