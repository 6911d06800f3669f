"""Every stage sees the same frames of a video, and the same errors."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_vlm.errors import (
    VideoEmpty,
    VideoError,
    VideoNotFound,
    VideoUnreadable,
)
from edge_vlm.evaluation.qa_jsonl import read_questions
from edge_vlm.formats.footage import read_footage
from edge_vlm.pixels import video
from edge_vlm.pixels.frames import decode_jpeg
from edge_vlm.pixels.sampling import FrameRule
from edge_vlm.pixels.video import (
    EPSILON_S,
    TimedFrame,
    due_frames,
    probe_video,
    read_moments,
    read_video,
    write_video,
)
from edge_vlm_runtime.sources.video_file import FileSource
from edge_vlm_training.data.video_source import VideoSource

FPS = 10
FOOTAGE = Path("shared", "footage")
QA = {"type": "qa", "question": "What is it?", "answer": "A cat."}


def numbered_video(
    path: Path,
    num_frames: int,
    *,
    codec: str = "libx264",
    key_every: int = 12,
    rate: Fraction | int = FPS,
    times_ms: Sequence[int] | None = None,
) -> Path:
    """Pictures that show their own number in eight bars, with a keyframe every so many."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"g": str(key_every), "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 128, 32, "yuv420p"
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(num_frames):
            bright = np.array([255 * (number >> bit & 1) for bit in range(8)], np.uint8)
            picture = np.broadcast_to(bright.repeat(16)[None, :, None], (32, 128, 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def bars(picture: Any) -> int:
    width = picture.shape[1]
    bright = picture[:, width // 16 :: width // 8].mean((0, 2)) > 127
    return int((bright * 2 ** np.arange(8)).sum())


Number = Callable[[Any], int]
Seen = list[tuple[float, int]]


def watched(path: Path, fps: float, number: Number) -> Seen:
    return [(p.time_s, number(p.rgb)) for p in FileSource(path, fps).pictures()]


def evaluated(path: Path, fps: float, number: Number) -> Seen:
    questions = path.with_name("questions.jsonl")
    questions.write_text(json.dumps({"video": str(path), "question": "?", "answer": "!"}))
    (clip,) = read_questions(questions, fps, 1000)
    rgbs = map(decode_jpeg, clip.jpegs)
    return [(t, number(rgb)) for t, rgb in zip(clip.times_s, rgbs, strict=True)]


def calibrated(path: Path, fps: float, number: Number) -> list[int]:
    return [number(rgb) for _, rgb in read_footage(path, fps, 1000)]


def trained(path: Path, fps: float, number: Number) -> Seen:
    records = path.with_name("train.jsonl")
    records.write_text(json.dumps({"video": str(path), "annotations": [QA]}))
    sampling = FrameRule(max_fps=fps, num_frames=1000)
    sample = VideoSource(records, sampling, seed=0).sample(0)
    return list(zip(sample.times_s.tolist(), map(number, sample.load(64)), strict=True))


def irregular(path: Path) -> Path:
    gaps = np.random.default_rng(3).choice([20, 33, 50, 400, 1700], 60)
    return numbered_video(path, 60, rate=30, times_ms=[0, *np.cumsum(gaps)[:-1].tolist()])


FILES: dict[str, Callable[[Path], Path]] = {
    "29.97": lambda folder: numbered_video(
        folder / "a.mp4", 150, codec="mpeg4", rate=Fraction(30000, 1001)
    ),
    "24": lambda folder: numbered_video(folder / "a.mkv", 100, rate=24),
    "slower than the model": lambda folder: numbered_video(folder / "a.mp4", 7, rate=1),
    "irregular": lambda folder: irregular(folder / "a.mkv"),
    "one frame": lambda folder: numbered_video(folder / "a.mp4", 1),
    "no times": lambda folder: numbered_video(folder / "a.h264", 90, rate=25),
}


@pytest.mark.parametrize("fps", [0.5, 2.0, 3.0])
@pytest.mark.parametrize("name", FILES)
def test_every_stage_sees_the_same_frames(tmp_path: Path, name: str, fps: float) -> None:
    path = FILES[name](tmp_path)
    seen = watched(path, fps, bars)
    assert seen[0] == (0.0, 0)
    assert len({shown for _, shown in seen}) == len(seen)
    assert seen == evaluated(path, fps, bars)
    assert [shown for _, shown in seen] == calibrated(path, fps, bars)
    # Training shows the last frame besides, at its own time (Molmo2's rule).
    *before, (last_s, last) = trained(path, fps, bars)
    probed = probe_video(path)
    grid = [
        (time_s, shown)
        for time_s, shown in seen
        if time_s < probed.end_s - probed.frame_s / 2 and shown != last
    ]
    assert [shown for _, shown in before] == [shown for _, shown in grid]
    assert [t for t, _ in before] == pytest.approx([t for t, _ in grid])
    assert last_s == pytest.approx(probed.end_s)
    assert last == len(probed.starts_s) - 1


def footage(name: str) -> Path:
    """A file of the collection of awkward footage, where one lies beside the checkout."""
    found = [Path(__file__).parents[2] / "data" / "footage" / name]
    found += [folder / FOOTAGE / name for folder in Path(__file__).parents]
    for path in found:
        if path.exists():
            return path
    pytest.skip(f"{FOOTAGE / name} is not here")


def test_frames_of_a_variable_rate_file() -> None:
    path = footage("05_variable_rate.mkv")
    seen = list(read_video(path, 2.0))
    expected = [0.0, 0.5, 1.0, 4.0, 4.5, 9.0, 9.5, 12.0, 12.5, 20.0, 20.5, 21.0]
    assert [time_s for time_s, _ in seen] == expected
    moments = read_moments(path, expected)
    pictures = FileSource(path, 2.0).pictures()
    for (time_s, rgb), picture, moment in zip(seen, pictures, moments, strict=True):
        assert time_s == picture.time_s
        assert np.array_equal(rgb, picture.rgb)
        assert np.array_equal(rgb, moment)


def test_frames_on_a_grid_of_rounded_times_are_all_seen(tmp_path: Path) -> None:
    """Matroska rounds 1/3 s to 333 ms and 2/3 s to 667 ms: before and after the tick."""
    path = numbered_video(tmp_path / "a.mkv", 12, rate=3)
    assert [shown for _, shown in watched(path, 3.0, bars)] == list(range(12))


@settings(deadline=None)
@given(st.lists(st.floats(0.001, 3.0), min_size=1, max_size=40), st.sampled_from([0.5, 2.0, 7.0]))
def test_due_frames_never_repeat_and_keep_to_the_rate(gaps: list[float], fps: float) -> None:
    starts = [sum(gaps[:i]) for i in range(len(gaps) + 1)]
    frames = [TimedFrame(a, b, a, "") for a, b in itertools.pairwise(starts)]
    due = list(due_frames(iter(frames), fps))
    assert len({frame for _, frame in due}) == len(due)
    assert due[0][0] == 0.0
    for (first, _), (second, _) in itertools.pairwise(due):
        assert second - first >= 1 / fps - 1e-6
    for time_s, frame in due:
        assert frame.time_s - 2 * EPSILON_S <= time_s < frame.end_s


def test_a_wild_time_costs_nothing() -> None:
    frames = [TimedFrame(0.0, 0.5, 0, ""), TimedFrame(5e9, 5e9 + 0.5, 1, "")]
    assert [time_s for time_s, _ in due_frames(frames, 2.0)] == [0.0, 5e9]


def test_what_could_be_decoded_of_a_broken_file_comes_before_its_error() -> None:
    def frames() -> Iterator[TimedFrame]:
        yield TimedFrame(0.0, 0.5, 0, "")
        yield TimedFrame(0.5, 1.0, 1, "")
        raise VideoUnreadable("broken after 1.0 s")

    due = due_frames(frames(), 2.0)
    assert [next(due)[0], next(due)[0]] == [0.0, 0.5]
    with pytest.raises(VideoUnreadable, match=r"after 1\.0 s"):
        next(due)


# ---- errors ----------------------------------------------------------------------------------


def absent(path: Path) -> Path:
    return path


def no_video(path: Path) -> Path:
    path.write_bytes(b"\x00" * 4096)
    return path


def text(path: Path) -> Path:
    target = path.with_suffix(".txt")
    target.write_text("hello\n" * 100)
    return target


def sound(path: Path) -> Path:
    target = path.with_suffix(".wav")
    with av.open(str(target), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        silence = np.zeros((1, 8000), np.int16)
        frame = av.AudioFrame.from_ndarray(silence, format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    return target


def no_frames(path: Path) -> Path:
    target = path.with_suffix(".avi")
    with av.open(str(target), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        container.start_encoding()
    return target


def cut_off(path: Path) -> Path:
    """Matroska has its index at its end, so a cut file begins to play."""
    whole = numbered_video(path.with_name("whole.mkv"), 60, codec="mpeg4", key_every=1)
    target = path.with_suffix(".mkv")
    target.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    return target


ERRORS: dict[Callable[[Path], Path], tuple[type[VideoError], str]] = {
    absent: (VideoNotFound, "no such file"),
    no_video: (VideoUnreadable, "not a video, or cut off at its beginning"),
    text: (VideoUnreadable, "not a video but text"),
    sound: (VideoUnreadable, "there is no video in it"),
    no_frames: (VideoEmpty, "there is no frame in it"),
    cut_off: (VideoUnreadable, r"cut off: it ends after [23]\.\d of 6\.0 s"),
}


@pytest.mark.parametrize("make", ERRORS, ids=lambda make: make.__name__)
def test_every_stage_says_the_same_of_a_bad_file(tmp_path: Path, make: Any) -> None:
    path = make(tmp_path / "a.mp4")
    kind, words = ERRORS[make]
    stages = [watched, calibrated, trained] + ([evaluated] if path.exists() else [])
    said = set()
    for stage in stages:
        with pytest.raises(kind, match=words) as caught:
            stage(path, 2.0, bars)
        assert type(caught.value) is kind
        assert str(path) in str(caught.value.where)
        said.add(caught.value.what)
    assert len(said) <= 2  # packets may reach a little farther than the last whole picture


@pytest.mark.parametrize("name", ["05_first_pts_5s.mkv", "06_sound_outlasts_film.mkv"])
def test_a_file_that_begins_late_or_has_longer_sound_is_whole(name: str) -> None:
    path = footage(name)
    assert [t for t, _ in read_video(path, 2.0)] == [0.5 * i for i in range(16)]
    assert probe_video(path).end_s == pytest.approx(7.5)


def test_what_an_edit_list_hides_is_not_shown() -> None:
    path = footage("13_edit_list_cut_at_5s.mp4")
    assert [t for t, _ in read_video(path, 2.0)] == [0.5 * i for i in range(6)]
    assert probe_video(path).end_s == pytest.approx(2.8)
    assert len(list(read_moments(path, [0.0, 1.0, 2.5]))) == 3


def test_a_file_whose_first_time_is_late_is_whole(tmp_path: Path) -> None:
    times = [20_000 + 100 * i for i in range(10)]
    path = numbered_video(tmp_path / "a.mkv", 10, times_ms=times)
    assert watched(path, 2.0, bars) == [(0.0, 0), (0.5, 5)]
    assert probe_video(path).end_s == pytest.approx(0.9)


# ---- chosen moments --------------------------------------------------------------------------


def grey_video(path: Path) -> Path:
    """Pictures each 8 levels brighter than the one before."""
    levels = 4 + 8 * np.arange(31, dtype=np.uint8)
    write_video(path, np.broadcast_to(levels[:, None, None, None], (31, 32, 48, 3)), FPS)
    return path


def numbers(pictures: Any) -> list[int]:
    """Which frame of `grey_video` each picture is."""
    return [round((float(np.mean(picture)) - 4) / 8) for picture in pictures]


def test_moments_are_the_frames_shown_then(tmp_path: Path) -> None:
    path = grey_video(tmp_path / "a.mp4")
    probed = probe_video(path)
    assert len(probed.starts_s) == 31
    assert (probed.end_s, probed.frame_s) == pytest.approx((3.0, 0.1), abs=1e-6)
    times = [0.0, 0.09, 0.1, 0.55, 0.55, 2.99, 3.0, 9.0]
    assert numbers(read_moments(path, times)) == [0, 0, 1, 5, 5, 29, 30, 30]


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mkv", "libx264"),
        ("a.ts", "libx264"),
        ("a.avi", "mpeg4"),
        ("a.h264", "libx264"),
    ],
)
def test_far_moments_are_the_same_as_when_every_frame_is_decoded(
    tmp_path: Path, name: str, codec: str
) -> None:
    path = numbered_video(tmp_path / name, 200, codec=codec, key_every=15)
    frame_s = probe_video(path).frame_s
    times = (np.arange(200) + 0.4) * frame_s
    every = [bars(picture) for picture in read_moments(path, times.tolist())]
    assert every == list(range(200))
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 20):
        chosen = np.sort(rng.integers(0, 200, count))
        moments = read_moments(path, times[chosen].tolist())
        assert [bars(picture) for picture in moments] == chosen.tolist()


def test_keyframes_in_wrong_places_are_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = numbered_video(tmp_path / "a.mp4", 200, key_every=15)
    told = dataclasses.replace(probe_video(path), keys_s=tuple(range(20)))
    monkeypatch.setattr(video, "probe_video", lambda path: told)
    moments = read_moments(path, [0.0, 7.9, 15.2, 19.9])
    assert [bars(picture) for picture in moments] == [0, 79, 152, 199]


def test_a_jump_over_minutes_is_no_other_clock(tmp_path: Path) -> None:
    """A long film is jumped through, and shows the frames that it should."""
    path = numbered_video(tmp_path / "a.mp4", 250, key_every=10, rate=1)
    counts: Counter[str] = Counter()
    moments = read_moments(path, [0.0, 83.0, 166.0, 249.0], counts=counts)
    assert [bars(picture) for picture in moments] == [0, 83, 166, 249]
    assert not counts


def test_a_jump_that_lands_before_its_aim_is_not_tried_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = numbered_video(tmp_path / "a.mp4", 60, key_every=10, rate=1)
    seek = video.Video.seek
    monkeypatch.setattr(video.Video, "seek", lambda self, time_s: seek(self, 0.0))
    moments = read_moments(path, [0.0, 30.0, 59.0])
    assert [bars(picture) for picture in moments] == [0, 30, 59]


def test_pictures_that_were_read_do_not_wait_for_a_collection(tmp_path: Path) -> None:
    path = numbered_video(tmp_path / "a.mp4", 40, key_every=10, rate=1)

    def pictures() -> int:
        return sum(type(each) is av.VideoFrame for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = pictures()
        assert len(list(video.read_video(path, 1))) == 40
        assert pictures() <= before + 2, "what holds them?"
    finally:
        gc.enable()
