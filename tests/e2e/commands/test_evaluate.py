"""`edge-vlm eval` as a user runs it: in torch, through a bundle and over a websocket."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from edge_vlm.errors import ConfigError
from edge_vlm.evaluation.command import LOG, RECORD, TABLE, evaluate
from edge_vlm.evaluation.plan import plan
from edge_vlm.formats.qa_set import ClipQuestions, write_question_set
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_training.world.heldout import ALERT, BENCHMARK_KINDS, heldout_clips
from tests.runtime.cameras.pictures import write_video
from tests.runtime.command_line import command_line
from tests.runtime.server.live import open_server
from tests.tiny import ROOT, tiny_bundle, tiny_checkpoint

CHECKPOINT = ROOT / "training" / "checkpoints" / "demo"
RUNS = (
    *("stream:0.5", "random:0.3", "keep_all", "stream:0.5:all", "keep_all:1:all"),
    *("fewer_frames:0.5", "last_n:0.5:all", "difference:0.2", "frame_topk:0.2"),
)
IN_PROCESS_RUNS = ("last_n:0.3:frame",)
CLIP_RUNS = ("clip:0.3", "clip:0.3:all")
"""Over the wire a question has the clip end with it."""
QUESTION = "is there a red ball ?"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "questions"
    clips = heldout_clips(77, 99, kinds=BENCHMARK_KINDS)
    write_question_set(folder, map(with_few_alerts, islice(clips, 2)))
    return folder


def with_few_alerts(clip: ClipQuestions) -> ClipQuestions:
    """Not one behind every frame: they are asked of each row on each path."""
    asked = [q for q in clip.questions if q.kind != ALERT or q.frame % 4 == 3]
    return dataclasses.replace(clip, questions=asked)


def run(*arguments: object) -> int:
    return command_line(evaluate, [*map(str, arguments), "--threads", "1"])


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def test_a_model_answers_alike_in_torch_in_its_bundle_and_over_the_wire(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    rows = [part for name in (*RUNS, *CLIP_RUNS, *IN_PROCESS_RUNS) for part in ("--run", name)]
    paths = "torch,bundle,served"
    models = (CHECKPOINT, DEMO_BUNDLE, "--through", paths)
    assert run(questions, *models, *rows, "-o", out, "--clips", 1) == 0
    said: dict[tuple[str, str], dict[str, Any]] = {}
    for line in log_lines(out)[1:]:
        said.setdefault((line["run"], line["clip"]), {})[line["path"]] = line
    assert len(said) == (len(RUNS) + len(CLIP_RUNS) + len(IN_PROCESS_RUNS))
    compared = other = 0
    for (name, _), by_path in said.items():
        assert set(by_path) == set(paths.split(",")) - {
            "served" for run in IN_PROCESS_RUNS if name.startswith(run)
        }
        if name.startswith(CLIP_RUNS):
            del by_path["served"]
        assert len({line["kept"] for line in by_path.values()}) == 1
        for texts in zip(*(line["said"] for line in by_path.values()), strict=True):
            compared += 1
            other += len(set(texts)) > 1
    assert compared > 150
    assert other <= compared / 100  # as often as rounding may decide

    record = json.loads((out / RECORD).read_text())
    assert len(record["rows"]) == 2 * len(IN_PROCESS_RUNS) + 3 * len(RUNS + CLIP_RUNS)
    assert {row["clips"] for row in record["rows"]} == {1}
    assert set(record["models"]) == set(paths.split(","))
    stream = next(row for row in record["rows"] if row["policy"] == "stream")
    assert stream["kept_percent"] == pytest.approx(50, abs=1)
    assert stream["mean_percent"] > 60
    assert len(stream["points_over_keep_all"]) == 2
    wrong = record["wrong"]["torch stream:0.5:frame"]
    assert len(wrong) == stream["questions"] - sum(k["right"] for k in stream["kinds"].values())
    shown, told = capsys.readouterr()
    assert re.search(
        r"[\d,]+ questions about 1 clip in \d+ rows .* about \d+ .* by the first", told
    )
    assert "stream" in shown
    assert "95 % interval" in shown
    assert (out / TABLE).read_text().startswith("| path | attention | policy | 1 | 0.5 |")


def test_a_run_goes_on_where_it_stopped(questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = ("--run", "stream:0.5", "--run", "random:0.5")
    assert run(questions, CHECKPOINT, *rows, "-o", out, "--clips", 1) == 0
    log = (out / LOG).read_text()
    cut = log.replace('"said": ["', '"said": ["kept! ')  # a mark: nothing is asked again
    (out / LOG).write_text(cut[: cut.rindex("{") + 40])  # and its last line is cut off
    assert run(questions, CHECKPOINT, *rows, "-o", out) == 0
    lines = log_lines(out)[1:]
    assert len(lines) == 4
    assert [line["said"][0].startswith("kept! ") for line in lines] == [True, False, False, False]
    rows_told = json.loads((out / RECORD).read_text())["rows"]
    assert [row["clips"] for row in rows_told] == [2, 2]
    assert run(questions, CHECKPOINT, *rows, "-o", out, "--minutes", 0) == 0
    assert json.loads((out / RECORD).read_text())["rows"] == rows_told
    assert len(log_lines(out)) == 5


def test_answers_of_another_question_set_are_not_mixed_in(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(questions, CHECKPOINT, "--run", "stream:0.5", "-o", out, "--clips", 1) == 0
    other = tmp_path / "other"
    write_question_set(other, islice(heldout_clips(78, 1), 1))
    assert run(other, CHECKPOINT, "--run", "stream:0.5", "-o", out) == ConfigError.exit_code
    assert "given with different questions" in capsys.readouterr().err


def test_ones_own_videos_on_a_running_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "clip.mp4", num_frames=6)
    lines = [
        {"video": "clip.mp4", "question": QUESTION, "answer": "yes", "kind": "ball"},
        {"video": "clip.mp4", "question": QUESTION, "answer": "no", "kind": "ball", "at_s": 1},
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    with open_server() as server:
        server.start()
        code = run(server.url, file, "--policy", "keep_all,clip,stream", "--keep-ratio", "1,0.5")
    shown = capsys.readouterr()
    assert code == 0, shown.err
    rows = [line.split()[:4] for line in shown.out.splitlines() if line.startswith("served")]
    assert rows == [  # one share only: no overview by share
        ["served", attention, policy, keep]
        for attention in ("frame", "all")
        for policy, keep in (("keep_all", "1"), ("stream", "0.5"), ("clip", "0.5"))
    ]
    assert "ball" in shown.out
    assert "note: served: rows clip choose over the frames up to each question" in shown.err
    assert "note: served: the weights were trained with attention frame" in shown.err


def test_questions_late_in_a_stream(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As well answered as early ones, and against answers that moved along."""
    right = []
    for quiet_s in (0, 20):
        out = tmp_path / f"after {quiet_s}"
        assert run(questions, "--run", "stream:0.5", "--quiet-before", quiet_s, "-o", out) == 0
        rows = json.loads((out / RECORD).read_text())["rows"]
        right.append(rows[0]["mean_percent"])
        texts = [text for line in log_lines(out)[1:] for text in line["said"]]
        times = [text for text in texts if text.startswith("at ")]
        assert times
        # What was there from the begin still is; all else came after the quiet time.
        assert all(text == "at 0.0 s" or float(text.split()[1]) >= quiet_s for text in times)
    assert right[1] >= 0.95 * right[0]
    capsys.readouterr()
    out = tmp_path / "after 20"
    assert run(questions, "--run", "stream:0.5", "-o", out) == ConfigError.exit_code
    assert "given with different questions" in capsys.readouterr().err


def test_a_clip_that_the_model_cannot_hold_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "long.mp4", num_frames=60)
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"video": "long.mp4", "question": QUESTION, "answer": "yes"}))
    assert run(tiny_checkpoint(), file, "--run", "keep_all") == ConfigError.exit_code
    assert "the model has room for" in capsys.readouterr().err


def test_without_questions_the_benchmark_is_rendered_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = (tiny_checkpoint(), "--run", "keep_all", "-o", tmp_path, "--per-kind", 1)
    assert run(*wanted, "--clips", 1) == 0
    shown = capsys.readouterr().out
    assert "alert" in shown
    assert "held-out clips" in shown
    assert run(*wanted, "--clips", 1) == 0
    assert "held-out clips" not in capsys.readouterr().out
    assert run(*wanted, "--seed", 5) == ConfigError.exit_code
    assert "holds another benchmark" in capsys.readouterr().err


def test_what_is_named_is_told_apart_by_its_files(questions: Path, tmp_path: Path) -> None:
    file = str(ROOT / "README.md")
    bundle, checkpoint = str(tiny_bundle()), str(tiny_checkpoint())
    assert plan([bundle]).targets == {"served": bundle}
    assert plan([bundle], "bundle,served").targets == {"bundle": bundle, "served": bundle}
    assert plan([bundle, "ws://there/v1"]).targets == {"served": "ws://there/v1", "bundle": bundle}
    assert plan([bundle, checkpoint, file]).targets == {"served": bundle, "torch": checkpoint}
    assert plan([bundle, "ws://there/v1/realtime"], "bundle,served").targets == {
        "bundle": bundle,
        "served": "ws://there/v1/realtime",
    }
    for address in ("jetson:8765", "[::1]:8765", "https://jetson/yard/"):
        assert plan([address]).targets == {"served": address}
    adapter, steps = tmp_path / "adapter", tmp_path / "run"
    (steps / "step20-unsharded").mkdir(parents=True)
    adapter.mkdir()
    (adapter / "adapter_config.json").touch()
    for model in map(str, (adapter, steps)):
        assert plan([model]).targets == {"torch": model}
    assert plan([]).targets == {"served": None}
    assert plan([], "bundle").targets == {"bundle": None}
    assert plan([str(questions)]).questions == questions
    assert plan([file]).questions == Path(file)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["nowhere"], "no such file or folder"),
        (["tests"], "neither a checkpoint nor a bundle"),
        (["README.md", "LICENSE"], "two question sets"),
        (["training/checkpoints/demo"] * 2, "two checkpoints"),
        (["ws://a/v1/realtime", "ws://b/v1/realtime"], "two servers"),
        (["--through", "wire"], "must name some of"),
        (["--through", "torch"], "can be measured through torch"),
        (["training/checkpoints/demo", "--through", "bundle"], "through bundle"),
        (["--run", "best"], "cannot read run"),
        (["--keep-ratio", "half"], "cannot read the table's rows"),
        (["--attention", "some"], "cannot read the table's rows"),
        (["--policy", "best"], "policy must be one of"),
        (["--json", "nowhere/table.json"], "no such folder"),
        (["--quiet-before", "5", "--through", "bundle"], "only a served bundle"),
    ],
)
def test_what_makes_no_sense_is_an_error_before_anything_is_opened(
    arguments: list[str],
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    assert run(*arguments) == ConfigError.exit_code
    assert what in capsys.readouterr().err


def test_a_missing_library_names_the_extra_of_its_path(
    questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class WithoutTorch:
        name = "torch"

        def load(self) -> object:
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [WithoutTorch()])
    assert run(questions, tiny_checkpoint()) == 9
    assert "pip install 'edge-vlm[train]'" in capsys.readouterr().err
