"""What `ask` and `watch` show of a file: its very pixels, and the frames that the model's rule
takes, as many as the memory holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_vlm.formats.bundle import MANIFEST
from edge_vlm.pixels.frames import Rgb
from edge_vlm.pixels.sampling import FrameRule
from edge_vlm.pixels.video import read_clip, read_moments, write_video
from edge_vlm_runtime.cli.ask import ask
from edge_vlm_runtime.cli.watch import watch
from edge_vlm_runtime.session.frames import EncodedFrame
from edge_vlm_runtime.session.ingest import FrameIngest
from edge_vlm_runtime.session.session import Session
from tests.published_folder import image_bundle
from tests.runtime.cameras.pictures import scene
from tests.runtime.command_line import command_line

QUESTION = "is there a red ball ?"
Shown = list[tuple[float, Rgb]]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    pictures = np.stack(scene("fast", 90))  # JPEG would change them
    write_video(folder / "short.mp4", pictures[:9], 4)
    write_video(folder / "long.mp4", pictures, 4)
    return folder


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """Seconds and pixels that come to the sessions of this process."""
    seen: Shown = []
    decode = FrameIngest._decode

    def note(self: FrameIngest, frame: EncodedFrame) -> Rgb:
        rgb = decode(self, frame)
        seen.append((frame.capture_us * 1e-6, rgb))
        return rgb

    monkeypatch.setattr(FrameIngest, "_decode", note)
    return seen


def run(video: Path, *more: str, bundle: Path | None = None) -> int:
    own = ["--bundle", str(bundle or image_bundle()), "--threads", "1", "--max-answer-tokens", "3"]
    return command_line(ask, [str(video), QUESTION, *own, *more])


def require_equal(shown: Shown, wanted: Iterator[tuple[float, Rgb]]) -> None:
    expected = list(wanted)
    assert [time_s for time_s, _ in shown] == pytest.approx([time_s for time_s, _ in expected])
    for (_, got), (_, rgb) in zip(shown, expected, strict=True):
        assert np.array_equal(got, rgb)


def test_a_short_clip_is_shown_with_its_last_frame(
    videos: Path, shown: Shown, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(videos / "short.mp4") == 0
    require_equal(shown, read_clip(videos / "short.mp4", FrameRule()))
    assert [time_s for time_s, _ in shown] == [0.0, 0.5, 1.0, 1.5, 2.0]
    said = capsys.readouterr().err
    assert "5 frames (2 a second and the last one), 45 of 45 cells" in said
    assert said.endswith("[cut at 3 tokens: raise --max-answer-tokens]\n")


def test_a_rate_of_ones_own_keeps_the_last_frame(videos: Path, shown: Shown) -> None:
    assert run(videos / "short.mp4", "--fps", "0.7") == 0
    assert [time_s for time_s, _ in shown] == pytest.approx([0.0, 1 / 0.7, 2.0])


def test_what_the_memory_does_not_hold_is_spread_over_the_whole_clip(
    videos: Path, shown: Shown, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny bundle takes 160 tokens at once, a frame is 17 or 18 of them."""
    assert run(videos / "long.mp4") == 0
    require_equal(shown, read_clip(videos / "long.mp4", FrameRule(num_frames=9)))
    assert shown[-1][0] == pytest.approx(22.25)
    said = capsys.readouterr().err
    assert "9 frames, evenly over 22.2 s (the model was trained on 46; no more fit (" in said
    assert "dropped" not in said


def test_past_its_limit_a_clip_is_spread(
    videos: Path, shown: Shown, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the bundle's manifest says, which is what the folder of the weights said."""
    bundle = tmp_path / "bundle"
    shutil.copytree(image_bundle(), bundle)
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["frames"] |= {"num_frames": 4, "max_fps": 1.0}
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    assert run(videos / "short.mp4", bundle=bundle) == 0
    assert [time_s for time_s, _ in shown] == [0.0, 1.0, 2.0]
    shown.clear()
    assert run(videos / "long.mp4", bundle=bundle) == 0
    assert [time_s for time_s, _ in shown] == pytest.approx([0.0, 7.41667, 14.83333, 22.25])
    assert "4 frames, evenly over 22.2 s, 36 of 36" in capsys.readouterr().err


def test_subtitles_near_a_frame_are_told(
    videos: Path,
    shown: Shown,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entries = [(1.0, 2.0, "the dog"), (4.0, 4.5, "is it red"), (22.0, 23.0, "blue")]
    lines = [
        f"{i}\n00:00:{a:06.3f} --> 00:00:{b:06.3f}\n{text}\n".replace(".", ",")
        for i, (a, b, text) in enumerate(entries, 1)
    ]
    (tmp_path / "a.srt").write_text("\n".join(lines))
    told: list[str] = []
    of = Session._subtitles_of

    def note(self: Session, settings: Any) -> np.ndarray:
        told.append(settings.subtitles)
        return of(self, settings)

    monkeypatch.setattr(Session, "_subtitles_of", note)
    assert run(videos / "long.mp4", "--fps", "0.1", "--subtitles", str(tmp_path / "a.srt")) == 0
    assert told[-1] == "subtitle\n1.0 - 2.0 the dog\n22.0 - 23.0 blue"
    assert [time_s for time_s, _ in shown] == pytest.approx([0.0, 10.0, 20.0, 22.25])
    assert ", 2 of 3 subtitles, 36 of 36 cells" in capsys.readouterr().err


def test_more_subtitles_than_a_prompt_takes_are_refused_by_name(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = "{0}\n00:00:01,{0:03} --> 00:00:02,000\n" + 100 * "the red dog " + "\n\n"
    (tmp_path / "a.srt").write_text("".join(map(entry.format, range(200))))
    assert run(videos / "short.mp4", "--subtitles", str(tmp_path / "a.srt")) != 0
    assert "E-CONFIG: the subtitles near the frames have 24" in capsys.readouterr().err


def test_a_model_of_streams_knows_no_subtitles(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nHello\n")
    arguments = [str(videos / "short.mp4"), QUESTION, "--threads", "1"]
    assert command_line(ask, [*arguments, "--subtitles", str(tmp_path / "a.srt")]) != 0
    assert "E-CONFIG: the model was not trained on whole clips" in capsys.readouterr().err
    alone = ["--subtitles", str(tmp_path / "a.srt"), "--detail", "snapshot"]
    assert command_line(ask, [*arguments, *alone]) != 0
    assert "E-CONFIG: a picture alone" in capsys.readouterr().err


def test_watch_hands_over_the_pixels_of_the_file(videos: Path, shown: Shown) -> None:
    own = ["--bundle", str(image_bundle()), "--threads", "1", "--fast"]
    video = videos / "short.mp4"
    assert command_line(watch, ["--source", str(video), *own]) == 0
    times_s = [0.0, 0.5, 1.0, 1.5, 2.0]
    require_equal(shown, zip(times_s, read_moments(video, times_s), strict=True))
