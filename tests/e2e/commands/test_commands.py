"""watch, ask and demo as a user runs them, over their own server with the real tiny model."""

from __future__ import annotations

import functools
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_vlm.errors import ConfigError, EdgeVlmError, OutputError
from edge_vlm_runtime.cli.ask import ask
from edge_vlm_runtime.cli.demo import demo
from edge_vlm_runtime.cli.watch import watch
from edge_vlm_runtime.client.live_table import LiveTable
from edge_vlm_runtime.client.run import Outcome, PlannedQuestion, parse_question
from edge_vlm_runtime.client.terminal import heat_row, heat_rows, summary_line
from edge_vlm_runtime.server.app import Server
from tests.runtime.cameras.pictures import write_video
from tests.runtime.cameras.rtsp_camera import RtspCamera
from tests.runtime.command_line import command_line
from tests.runtime.server.live import TIMEOUT_S
from tests.tiny import ROOT, tiny_bundle

QUESTION = "is there a red ball ?"
SHARED_CLIPS = ROOT.parent / "shared" / "clips"


def own_server() -> list[str]:
    return ["--bundle", str(tiny_bundle()), "--threads", "1"]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", num_frames=8)


def test_watch_shows_every_frame_and_answers_on_the_way(
    video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--source", str(video), "--fast", "--max-answer-tokens", "4", *own_server()]
    arguments += ["--ask", f"1.5@{QUESTION}", "--ask", QUESTION, "--ask", f"100@{QUESTION}"]
    assert command_line(watch, arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:9] for line in lines if line.startswith("frame")] == [
        f"frame {number:>3}" for number in range(1, 9)
    ]
    asked = [line for line in lines if line.startswith("?")]
    moments = ["1.5 s", "3.5 s, the end: 100 s never came", "3.5 s"]
    assert asked == [f"? {QUESTION}  [asked at {moment}]" for moment in moments]
    answers = [line for line in lines if line.startswith("> ")]
    assert "seen until 1.5 s" in answers[0]
    assert "seen until 3.5 s" in answers[1]
    assert "8 frames sent, 8 processed, dropped: none" in lines[-1]
    assert "3 of 3 questions answered" in lines[-1]


def test_watch_asks_again_and_again(video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--source", str(video), "--fast", "--max-answer-tokens", "2", *own_server()]
    assert command_line(watch, [*arguments, "--ask", QUESTION, "--every", "1"]) == 0
    asked = [line for line in capsys.readouterr().out.splitlines() if line.startswith("?")]
    assert [line[-6:-3] for line in asked] == ["1.0", "2.0", "3.0", "3.5"]
    late = ["--ask", f"100@{QUESTION}", "--every", "1"]
    assert command_line(watch, [*arguments, *late]) == 0
    asked = [line for line in capsys.readouterr().out.splitlines() if line.startswith("?")]
    assert asked == [f"? {QUESTION}  [asked at 3.5 s, the end: 100 s never came]"]


def test_watch_follows_a_camera_until_interrupted() -> None:
    """Live: the newest frame wins, Ctrl-C ends it with a summary, credentials stay secret."""
    code = (
        "import signal, sys; from tests.runtime.command_line import command_line; "
        "from edge_vlm_runtime.cli.watch import watch; "
        # A shell's background job, as these tests may be one, hands on an ignored SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.exit(command_line(watch, sys.argv[1:]))"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "runtime")])
    with RtspCamera() as camera:
        url = f"rtsp://user:secret@127.0.0.1:{camera.port}/live"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "--source", url, "--fps", "10", *own_server()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"},
        )
        try:
            assert process.stdout is not None
            seen = 0
            while seen < 3:
                line = process.stdout.readline()
                assert line, process.communicate()
                seen += line.startswith("frame")
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
            process.wait()
    assert "secret" not in out + err
    assert " frames sent, " in out
    if sys.version_info >= (3, 11):  # before, asyncio raises the interrupt all the same
        assert process.returncode == 0
        assert "Traceback" not in err


@pytest.mark.skipif(not SHARED_CLIPS.is_dir(), reason="the shared clips are not here")
@pytest.mark.parametrize(("name", "frames"), [("bikes.mp4", 20), ("bigbuckbunny.mp4", 11)])
def test_watch_runs_real_clips_to_their_end(
    name: str, frames: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--source", str(SHARED_CLIPS / name), "--fast", *own_server()]
    assert command_line(watch, [*arguments, "--ask", "describe the video ."]) == 0
    assert f"{frames} frames sent, {frames} processed" in capsys.readouterr().out


def test_ask_prints_the_answer_and_nothing_else(
    video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(video), QUESTION, "--max-answer-tokens", "4", *own_server()]
    assert command_line(ask, arguments) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert err.startswith("8 frames, ")


def test_settings_that_the_server_refuses(video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(video), QUESTION, "--keep-ratio", "3", *own_server()]
    assert command_line(ask, arguments) == 2
    assert "E-CONFIG: keep_ratio must be in (0, 1]" in capsys.readouterr().err


def write_clip(folder: Path, num_frames: int = 4) -> Path:
    write_video(folder / "clip.mp4", num_frames=num_frames)
    questions = [
        {"ask_at_s": at_s, "text": QUESTION, "answer": "yes ."} for at_s in (0.5, 1.0, 1.5)
    ]
    (folder / "clip.json").write_text(json.dumps({"fps": 2, "questions": questions}))
    return folder


def test_demo_streams_in_real_time_and_shows_answers_beside_the_truth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--clip", str(write_clip(tmp_path)), "--port", "0", *own_server()]
    assert command_line(demo, arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("truth: yes .") == 3
    assert out.count("TTFT") == 3
    assert "4 frames sent, 4 processed" in out
    assert "3 of 3 questions answered" in out
    assert "Browser page: http://127.0.0.1:" in out
    frames = [line for line in out.splitlines() if line.startswith("frame")]
    assert len(frames) == 4


def test_demo_fails_when_the_clip_does_not_run_through(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_clip(tmp_path)
    (folder / "clip.mp4").unlink()
    write_video(folder / "whole.mkv", num_frames=60, fps=10).rename(folder / "whole.mp4")
    whole = (folder / "whole.mp4").read_bytes()
    (folder / "clip.mp4").write_bytes(whole[: len(whole) // 2])
    arguments = ["--clip", str(folder), "--port", "0", *own_server()]
    assert command_line(demo, arguments) == 1
    assert "cut off" in capsys.readouterr().err


def test_demo_takes_another_port_only_when_its_own_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    real_open = Server.open

    def open_server(bundle: Path, *, port: int, **options: Any) -> Server:
        opened.append(port)
        if port == 4:
            raise ConfigError("another reason")
        return real_open(bundle, port=port, **options)

    monkeypatch.setattr(Server, "open", open_server)
    clip = str(write_clip(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert command_line(demo, ["--clip", clip, "--port", str(port), *own_server()]) == 0
    assert opened == [port, 0]
    assert command_line(demo, ["--clip", clip, "--port", "4", *own_server()]) == 2
    assert "another reason" in capsys.readouterr().err
    assert opened == [port, 0, 4]


def test_demo_without_its_clip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(demo, ["--clip", str(tmp_path), "--port", "0", *own_server()]) == 2
    assert "clip.json" in capsys.readouterr().err


# ---- output that nobody reads, or that cannot be written --------------------------------------


def piped(
    arguments: list[str], stdout: int, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, with an output of ours."""
    return subprocess.run(
        [sys.executable, "-m", "edge_vlm", *arguments, *own_server()],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_S,
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | environment,
        check=False,
    )


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In real time it goes on for longer than a test has patience: whatever ends a command is not
    the end of this."""
    num_frames = 2 * round(TIMEOUT_S + 60)
    return write_video(tmp_path_factory.mktemp("video") / "long.mp4", num_frames=num_frames)


@pytest.mark.parametrize(
    ("name", "lines"), [("watch", 0), ("watch", 4), ("ask", 0), ("ask", 1), ("demo", 1)]
)
def test_a_reader_that_goes_ends_a_command_quietly(
    name: str, lines: int, tmp_path: Path, video: Path, long_video: Path
) -> None:
    clip = write_clip(tmp_path)
    shutil.copy(long_video, clip / "clip.mp4")
    arguments = {
        "watch": ["watch", "--source", str(long_video), "--ask", f"0.5@{QUESTION}"],
        "ask": ["ask", str(video), QUESTION],
        "demo": ["demo", "--port", "0", "--clip", str(clip)],
    }[name]
    head = subprocess.Popen(
        ["head", "-n", str(lines)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert head.stdin is not None
    if lines == 0:
        head.wait()  # gone before anything is written
    done = piped(arguments, head.stdin.fileno())
    out, _ = head.communicate()
    errors = [line for line in done.stderr.splitlines() if "cells kept" not in line]  # of `ask`
    assert errors == []
    if name == "ask" and lines:
        assert (done.returncode, out.count(b"\n")) == (0, 1)  # it has no more to say
    else:
        assert (done.returncode, out.count(b"\n")) == (141, lines)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_make_demo_is_quiet_as_well(tmp_path: Path) -> None:
    clip = write_clip(tmp_path)
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "edge-vlm"
    options = " ".join(["--port", "0", "--clip", str(clip), *own_server()])
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m edge_vlm "$@" {options}\n')
    command.chmod(0o755)
    for stamp in (".made", ".ort"):  # as if it had been set up
        (tmp_path / stamp).touch()
    making = f"make demo VENV={tmp_path} ARGS="
    # What a `make test` around this test was called with is not meant for the demo.
    own = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    run = functools.partial(
        subprocess.run, cwd=ROOT, env=own, capture_output=True, text=True, check=False
    )
    done = run(["sh", "-c", f"{making} | head -n 4"])
    assert (done.stderr, done.stdout.count("\n")) == ("", 4)
    clip.joinpath("clip.json").unlink()
    failed = run(making.split())
    assert failed.returncode != 0
    assert "E-CONFIG" in failed.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("name", ["watch", "ask"])
def test_a_full_disk_is_an_error_with_a_message(name: str, video: Path) -> None:
    source = ["--source", str(video), "--fast"] if name == "watch" else [str(video), QUESTION]
    with open("/dev/full", "wb") as full:
        done = piped([name, *source], full.fileno())
    assert done.returncode == OutputError.exit_code
    assert done.stderr.splitlines()[-1] == (
        "edge-vlm: E-OUTPUT: cannot write the output: No space left on device"
    )
    assert "Traceback" not in done.stderr


def test_blocks_that_the_encoding_lacks(video: Path) -> None:
    done = piped(
        ["watch", "--source", str(video), "--fast"], subprocess.PIPE, PYTHONIOENCODING="ascii"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u2588" in done.stdout
    assert "8 frames sent, 8 processed" in done.stdout


def test_the_table_on_a_terminal_that_goes_away(long_video: Path) -> None:
    """It is drawn, and its end is an error rather than a stream that nobody sees."""
    terminal, output = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_vlm", "watch", "--source", str(long_video), *own_server()],
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TERM": "xterm"},
    )
    try:
        os.close(output)
        seen = b""
        while b"kept 9/9" not in seen:
            seen += os.read(terminal, 4096)
        os.close(terminal)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == OutputError.exit_code
    assert errors.splitlines()[-1].startswith("edge-vlm: E-OUTPUT: cannot write the output: ")
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("text", "every_s", "expected"),
    [
        ("what?", None, PlannedQuestion(text="what?")),
        ("3.5@what?", None, PlannedQuestion(text="what?", at_s=3.5)),
        ("who is me@home?", None, PlannedQuestion(text="who is me@home?")),
        ("what?", 5.0, PlannedQuestion(text="what?", at_s=5.0, every_s=5.0)),
        ("2@what?", 5.0, PlannedQuestion(text="what?", at_s=2.0, every_s=5.0)),
        ("a@b.com here?", None, PlannedQuestion(text="a@b.com here?")),
        ("2 cats @home?", None, PlannedQuestion(text="2 cats @home?")),
    ],
)
def test_questions_on_the_command_line(
    text: str, every_s: float | None, expected: PlannedQuestion
) -> None:
    assert parse_question(text, every_s) == expected


@pytest.mark.parametrize("given", [["localhost:1"], ["localhost:1", __file__], [__file__]])
def test_a_forgotten_question_is_not_the_address(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(ask, ["--stream", "door", *given]) == ConfigError.exit_code
    assert f"where the question was to be ({given[-1]})" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["2,5", "2.5 s", "-1", "nan", "inf", "1:30"])
def test_a_time_that_is_none_is_no_part_of_the_question(seconds: str) -> None:
    with pytest.raises(ConfigError, match=f"'{seconds}' is no number of seconds.*SECONDS@TEXT"):
        parse_question(f"{seconds}@what?", None)


@pytest.mark.parametrize("text", ["", " ", "3@", "3@ "])
def test_an_empty_question_is_refused_before_the_clip(text: str) -> None:
    with pytest.raises(ConfigError, match="the question is empty"):
        parse_question(text, None)


def test_heat_maps() -> None:
    assert heat_row([0, 4, 8], 3) == "█·· ·█· ··█"
    assert heat_rows([1], 2) == ["··██", "····"]


def test_the_summary_counts_what_was_not_answered() -> None:
    outcome = Outcome(
        frames_sent=5,
        frames_processed=3,
        cells_seen=48,
        cells_kept=24,
        elapsed_s=1.5,
        questions=1,
        answers=1,
    )
    outcome.dropped["rate"] = 2
    error = EdgeVlmError("no")
    outcome.note(error)
    assert outcome.first_error is error
    assert summary_line(outcome) == (
        "5 frames sent, 3 processed, dropped: 2 rate; 50% of the cells kept; "
        "1 of 2 questions answered; 1.5 s (2.0 frames/s)"
    )


def test_the_live_view_draws_at_any_moment() -> None:
    from rich.console import Console

    from edge_vlm_runtime import protocol

    view = LiveTable(3, "clip.mp4 on tiny")
    console = Console(record=True, width=100)
    console.print(view._render())
    view.event(
        protocol.FrameAccepted(
            frame_sequence=1,
            time_s=0.5,
            cells_seen=9,
            cells_kept=2,
            kept_cells=[0, 4],
            stage_ms={},
            queue_ms=1.0,
            age_ms=12.0,
            kv_tokens=33,
            in_memory=True,
        )
    )
    view.event(protocol.FrameDropped(frame_sequence=2, reason="busy"))
    question = PlannedQuestion(text="what is it ?")
    view.asked(question, 0.5)
    view.delta(question, "a ball")
    console.print(view._render())
    text = console.export_text()
    assert "██····" in text
    assert "kept 2/9" in text
    assert "1 busy" in text
    assert "what is it ?" in text
    assert "a ball" in text
