"""Videos with records as a source of samples."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import RecordInvalid, VideoError
from edge_vlm.pixels.patches import resize_bilinear
from edge_vlm.pixels.sampling import FrameRule
from edge_vlm.pixels.video import VideoTimes, clip_times, probe_video, read_moments
from edge_vlm_training.data.records import Located, read_records
from edge_vlm_training.data.sample import LAST, Branch, Pictures, Sample, seed_of

_EPSILON_S = 1e-3


class VideoSource:
    """The records of a file or folder, shuffled anew for every round through them.

    Sample number n is record n modulo their number of round n // number: processes that share out
    the numbers share out the records.
    """

    def __init__(self, path: Path, sampling: FrameRule, *, seed: int, name: str = "") -> None:
        """Raises DataError and RecordInvalid as `read_records` does; opens no video."""
        self._name = name or path.stem
        self._sampling, self._seed = sampling, seed
        self._records = read_records(path)
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    @property
    def name(self) -> str:
        return self._name

    def __len__(self) -> int:
        return len(self._records)

    def sample(self, number: int) -> Sample:
        """Raises RecordInvalid and, naming the record, VideoError."""
        round_, place = divmod(number, len(self._records))
        located = self._records[int(self._order(round_)[place])]
        return record_sample(located, self._sampling)

    def _shuffled(self, round_: int) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng(seed_of("records", self._name, self._seed, round_))
        return rng.permutation(len(self._records))


def record_sample(located: Located, sampling: FrameRule) -> Sample:
    """The sample of a record; only its video's times are read.

    Raises RecordInvalid for times outside the video and, naming the record, VideoError.
    """
    record, video = located.record, located.video
    with naming(located.where):
        probed = probe_video(video)
    end_s = _clip_end(located, probed)
    times_s = clip_times(probed, sampling, record.start_s, record.start_s + end_s)

    def load(side: int) -> Pictures:
        with naming(located.where):
            moments = read_moments(video, [record.start_s + float(t) for t in times_s])
            return np.stack([resize_bilinear(rgb, side).astype(np.uint8) for rgb in moments])

    branches = []
    for annotation in record.annotations:
        question, answer = annotation.turn()
        frame = LAST
        if annotation.at_s is not None:
            seen = np.searchsorted(times_s, annotation.at_s + _EPSILON_S, side="right")
            frame = max(int(seen) - 1, 0)
        branches.append(
            Branch(
                kind=annotation.kind,
                question=question,
                answer=answer,
                frame=frame,
                history=tuple(annotation.history),
            )
        )
    return Sample(name=located.where, times_s=times_s, branches=tuple(branches), load=load)


def _clip_end(located: Located, probed: VideoTimes) -> float:
    """When the clip's last frame is shown, from the clip's start."""
    record = located.record
    slack_s = probed.frame_s + _EPSILON_S  # the last frame is shown for a while
    for field, value in (("start_s", record.start_s), ("end_s", record.end_s)):
        if value is not None and value > probed.end_s + slack_s:
            raise RecordInvalid(
                f"{field} = {value}: {record.video} ends at {probed.end_s:.2f} s",
                where=located.where,
                field=f"$.{field}",
                remedy="times count in seconds from the video's first frame",
            )
    end_s = probed.end_s if record.end_s is None else min(record.end_s, probed.end_s)
    clip_s = max(end_s - record.start_s, 0.0)
    for i, annotation in enumerate(record.annotations):
        times = {f"points[{j}].time_s": p.time_s for j, p in enumerate(annotation.places)}
        if annotation.at_s is not None:
            times["at_s"] = annotation.at_s
        for field, time_s in times.items():
            if time_s > clip_s + slack_s:
                raise RecordInvalid(
                    f"{time_s} s, where the clip ends at {clip_s:.2f} s",
                    where=located.where,
                    field=f"$.annotations[{i}].{field}",
                    remedy="times of annotations count in seconds from the clip's start",
                )
    return clip_s


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Lets a VideoError name the record, too."""
    try:
        yield
    except VideoError as error:
        raise type(error)(
            error.what, where=f"{where}, video {error.where}", remedy=error.remedy
        ) from error
