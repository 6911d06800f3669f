"""Frames of videos are those shown at Molmo2's times; what cannot be read names its record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_vlm.errors import (
    RecordInvalid,
    VideoEmpty,
    VideoError,
    VideoNotFound,
    VideoUnreadable,
)
from edge_vlm.pixels.sampling import FrameRule
from edge_vlm.pixels.video import write_video
from edge_vlm_training.data.sample import LAST
from edge_vlm_training.data.video_source import VideoSource

QA = {"type": "qa", "question": "What is it?", "answer": "A cat."}
FPS = 10


def make_video(path: Path, num_frames: int = 31) -> Path:
    """Grey pictures, each 8 levels brighter than the one before."""
    levels = 4 + 8 * np.arange(num_frames, dtype=np.uint8)
    write_video(path, np.broadcast_to(levels[:, None, None, None], (num_frames, 32, 48, 3)), FPS)
    return path


def numbers(pictures: Any) -> list[int]:
    """Which frame of the file each picture is."""
    return [round((float(np.mean(picture)) - 4) / 8) for picture in pictures]


def source(folder: Path, *records: dict[str, Any], **sampling: Any) -> VideoSource:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return VideoSource(path, FrameRule(**sampling), seed=0)


@given(
    end_s=st.floats(0, 100),
    fps=st.sampled_from([0.5, 1, 2, 30]),
    max_frames=st.integers(1, 130),
)
def test_times_follow_the_published_rule(end_s: float, fps: float, max_frames: int) -> None:
    times = FrameRule(max_fps=fps, num_frames=max_frames).times(end_s)
    assert 1 <= len(times) <= max_frames
    assert times[0] == 0
    assert (np.diff(times) > 0).all()
    if max_frames > 1 and end_s > 1e-3:
        assert times[-1] == pytest.approx(end_s)
        even = (max_frames - 1) / fps < end_s
        step = end_s / (max_frames - 1) if even else 1 / fps
        assert np.diff(times)[:-1] == pytest.approx(step)
        assert times[-1] - times[-2] <= step + 1e-6


def test_examples_of_the_rule() -> None:
    rule = FrameRule(max_fps=2, num_frames=5)
    assert rule.times(1.7).tolist() == [0, 0.5, 1.0, 1.5, 1.7]
    assert rule.times(1.5).tolist() == [0, 0.5, 1.0, 1.5]
    assert rule.times(6.0).tolist() == [0, 1.5, 3.0, 4.5, 6.0]
    assert rule.times(0.0).tolist() == [0]
    assert FrameRule().spreads(192.0)
    assert not FrameRule().spreads(191.5)
    with pytest.raises(ValueError, match="only 'uniform_last_frame' is known"):
        FrameRule(mode="fps")
    assert rule.times(1.02, 0.1).tolist() == [0, 0.5, 1.02]  # 1.0 would show the last frame, too


def test_samples_hold_the_stretch_that_their_record_names(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4")
    ask = [QA, QA | {"at_s": 0.0}, QA | {"at_s": 0.7}, QA | {"at_s": 1.1, "history": [["a", "b"]]}]
    stretch = {"video": "a.mp4", "annotations": ask, "start_s": 1.0, "end_s": 2.1}
    sample = source(tmp_path, stretch).sample(0)
    assert sample.times_s == pytest.approx([0, 0.5, 1.0, 1.1])
    assert [branch.frame for branch in sample.branches] == [LAST, 0, 1, 3]
    assert [branch.history for branch in sample.branches] == [(), (), (), (("a", "b"),)]
    pictures = sample.load(24)
    assert pictures.shape == (4, 24, 24, 3)
    assert pictures.dtype == np.uint8
    assert numbers(pictures) == [10, 15, 20, 21]
    assert sample.name == f"{tmp_path / 'train.jsonl'}:1"


def test_every_round_has_every_record_once_in_its_own_order(tmp_path: Path) -> None:
    make_video(tmp_path / "a.mp4", 2)
    videos = source(tmp_path, *[{"video": "a.mp4", "annotations": [QA]}] * 7)
    rounds = [[videos.sample(7 * r + i).name for i in range(7)] for r in range(4)]
    assert all(sorted(names) == sorted(rounds[0]) for names in rounds)
    assert len(set(rounds[0])) == 7
    assert len({tuple(names) for names in rounds}) > 1
    assert [videos.sample(n).name for n in range(7)] == rounds[0]


@pytest.mark.parametrize("content", [b"", b"no video at all", b"\x00" * 4096])
def test_what_is_no_video_names_the_record(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(VideoUnreadable, match=r"train\.jsonl:1, video .*a\.mp4"):
        source(tmp_path, {"video": "a.mp4", "annotations": [QA]}).sample(0)


def test_absent_and_empty_videos_name_the_record(tmp_path: Path) -> None:
    record = {"video": "a.mkv", "annotations": [QA]}
    with pytest.raises(VideoNotFound, match=r"train\.jsonl:1"):
        source(tmp_path, record).sample(0)
    with av.open(str(tmp_path / "b.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        container.start_encoding()
    with pytest.raises(VideoEmpty, match=r"train\.jsonl:1"):
        source(tmp_path, record | {"video": "b.avi"}).sample(0)


def test_a_video_that_breaks_off_in_its_pictures_names_the_record(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", 31)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    rng = np.random.default_rng(0)
    middle = start + (data.index(b"moov") - start) // 3
    end = data.index(b"moov") - 4
    data[middle:end] = rng.integers(0, 256, end - middle, np.uint8).tobytes()
    (tmp_path / "b.mp4").write_bytes(data)
    sample = source(tmp_path, {"video": "b.mp4", "annotations": [QA]}).sample(0)
    with pytest.raises(VideoError, match=r"train\.jsonl:1, video .*b\.mp4"):
        sample.load(24)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"start_s": 7.0}, "$.start_s"),
        ({"end_s": 7.0}, "$.end_s"),
        (
            {
                "annotations": [
                    {
                        "type": "point",
                        "question": "Where?",
                        "label": "cat",
                        "points": [{"time_s": 6, "x": 0.5, "y": 0.5}],
                    }
                ]
            },
            "$.annotations[0].points[0].time_s",
        ),
        ({"annotations": [QA, QA | {"at_s": 6}]}, "$.annotations[1].at_s"),
    ],
)
def test_times_behind_the_video_name_the_field(
    tmp_path: Path, fields: dict[str, Any], field: str
) -> None:
    make_video(tmp_path / "a.mp4")
    record = {"video": "a.mp4", "annotations": [QA], **fields}
    with pytest.raises(RecordInvalid) as caught:
        source(tmp_path, record).sample(0)
    assert caught.value.field == field
    assert str(caught.value.where).endswith("train.jsonl:1")
