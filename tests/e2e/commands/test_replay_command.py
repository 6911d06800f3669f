"""A watched stream recorded and replayed, as a user does it, with the real tiny model."""

from __future__ import annotations

import json
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest

from edge_vlm.errors import RecordingError
from edge_vlm_runtime.cli.replay import replay
from edge_vlm_runtime.cli.watch import watch
from edge_vlm_runtime.client.client import Client
from edge_vlm_runtime.server.app import Server
from tests.runtime.cameras.pictures import jpeg, write_video
from tests.runtime.command_line import command_line
from tests.runtime.server.live import run
from tests.tiny import tiny_bundle

QUESTION = "is there a red ball ?"
BUNDLE = ["--bundle", str(tiny_bundle())]


class Watched(NamedTuple):
    recording: Path
    lines: list[str]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder = tmp_path_factory.mktemp("recording")
    video = write_video(folder / "clip.mp4", num_frames=8)
    arguments = ["--source", str(video), "--fast", "--max-answer-tokens", "4", "--threads", "1"]
    arguments += ["--ask", f"1.5@{QUESTION}", "--ask", QUESTION, *BUNDLE]
    arguments += ["--alert", "is there a dog ?"]
    out = StringIO()
    with redirect_stdout(out):
        assert command_line(watch, [*arguments, "--record", str(folder / "a.evlm")]) == 0
    return Watched(folder / "a.evlm", out.getvalue().splitlines())


def kinds(lines: list[str]) -> list[list[str]]:
    """Frames, questions and answers, each in their order; how they interleave is the terminal's."""
    starts = ("frame", "?", ">", "!", "alert")
    return [[line for line in lines if line.startswith(start)] for start in starts]


def test_replay_prints_the_same_report_as_live(
    watched: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(replay, [str(watched.recording), *BUNDLE]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert kinds(lines) == kinds(watched.lines)
    assert [len(kind) for kind in kinds(lines)][:3] == [8, 2, 2]
    assert len(kinds(lines)[-1]) == 1
    # all but the time around it, which is the client's there and the session's here
    assert lines[-2].rsplit(";", 1)[0] == watched.lines[-1].rsplit(";", 1)[0]
    assert lines[-1].startswith("all ")
    assert "came again" in lines[-1]


def test_a_recording_that_was_cut_off(
    watched: Watched, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = watched.recording.read_bytes()
    path = tmp_path / "cut.evlm"
    path.write_bytes(whole[: whole.index(b"\xff\xd8\xff", len(whole) // 3) + 50])  # in a picture
    assert command_line(replay, [str(path), *BUNDLE]) == 0
    out, err = capsys.readouterr()
    assert "note: the recording is cut off" in err
    frames = kinds(out.splitlines())[0]
    assert 0 < len(frames) < 8
    assert frames == kinds(watched.lines)[0][: len(frames)]


def test_measuring_a_recording(
    watched: Watched, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    arguments = [str(watched.recording), "--measure", "--json", str(figures), *BUNDLE]
    assert command_line(replay, arguments) == 0
    out, _ = capsys.readouterr()
    assert "8 in, 8 processed" in out
    assert " of 2\n" in out
    record = json.loads(figures.read_text())
    assert record["frames"] == 8
    assert record["frames_per_s"] > 0
    assert record["answers"] == record["answers_recorded"] == len(record["ttft_s"]) == 2


def test_what_cannot_be_replayed(
    watched: Watched, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(replay, [str(watched.recording)]) == 14
    assert "E-RECORDING: recorded with another bundle" in capsys.readouterr().err
    text = tmp_path / "text.evlm"
    text.write_text("hello")
    assert command_line(replay, [str(text), *BUNDLE]) == 14
    assert "not a recording" in capsys.readouterr().err
    damaged = bytearray(watched.recording.read_bytes())
    damaged[damaged.index(b"\xff\xd8\xff", len(damaged) // 2) + 50] ^= 1  # inside a picture
    path = tmp_path / "damaged.evlm"
    path.write_bytes(damaged)
    assert command_line(replay, [str(path), *BUNDLE]) == 14
    assert "damaged at byte" in capsys.readouterr().err


def test_a_session_that_answers_otherwise_is_named(
    watched: Watched, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same recording, said to be of a bundle that it was not made with."""
    other = tmp_path / "other"
    shutil.copytree(tiny_bundle(), other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["defaults"] = {"note": "same graphs"}
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert command_line(replay, [str(watched.recording), "--bundle", str(other)]) == 14
    assert command_line(replay, [str(watched.recording), "--measure", "--bundle", str(other)]) == 0
    capsys.readouterr()


def test_where_recordings_cannot_go(
    watched: Watched, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = str(write_video(tmp_path / "clip.mp4", num_frames=2))
    there = ["--source", video, "--fast", *BUNDLE, "--record", str(watched.recording)]
    assert command_line(watch, there) == 14
    assert "already" in capsys.readouterr().err
    elsewhere = ["ws://127.0.0.1:9/v1/realtime", "--source", video, "--record", "a.evlm"]
    assert command_line(watch, elsewhere) == 2
    assert "edge-vlm serve" in capsys.readouterr().err


def test_a_server_that_could_not_record_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RecordingError, match="cannot be written"):
        Server.open(tiny_bundle(), threads=1, record_to=tmp_path / "file" / "folder")


def test_a_server_records_each_session(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def session(url: str, offset: int) -> None:
        async with await Client.connect(url, {"delivery": "wait"}) as client:
            for number in range(3):
                await client.send_frame(jpeg(number + offset), number * 500_000)
            await client.ask(QUESTION)
            await client.wait_processed()  # a question comes before the frames that wait

    with Server.open(tiny_bundle(), threads=1, record_to=tmp_path / "all") as server:
        server.start()
        for offset in (0, 10):
            run(session(server.url, offset))
    files = sorted((tmp_path / "all").iterdir())
    assert len(files) == 2
    for file in files:
        assert command_line(replay, [str(file), *BUNDLE]) == 0
        assert "3 frames sent, 3 processed" in capsys.readouterr().out
