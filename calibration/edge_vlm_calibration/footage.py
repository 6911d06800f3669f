"""Clips as pictures with times, each a stream or several: videos, question sets, event sets.

A recording of a session is footage, too, where what opens the model can read it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from itertools import islice
from pathlib import Path

from edge_vlm.errors import (
    ConfigError,
    EdgeVlmError,
    FrameDecodeError,
    MissingExtraError,
    RecordingError,
    VideoEmpty,
    VideoError,
)
from edge_vlm.formats.alert_set import INDEX as EVENT_INDEX
from edge_vlm.formats.alert_set import read_event_set
from edge_vlm.formats.footage import Shot, read_footage
from edge_vlm.formats.qa_set import INDEX as QA_INDEX
from edge_vlm.formats.qa_set import read_question_set
from edge_vlm.json_text import parse_json
from edge_vlm.pixels.duplicates import THUMBNAIL
from edge_vlm.pixels.frames import Rgb, decode_jpeg, thumbnail
from edge_vlm.pixels.video import due_frames, open_video
from edge_vlm_calibration.noise.change import ONE_COLOUR

RECORDING = ".evlm"
FOOTAGE_GROUP = "edge_vlm.footage"
"""Entry points by the ending of a file: a function from its path to times and pictures."""
EPSILON_S = 1e-3


@dataclass(frozen=True)
class Picture:
    """A picture of a stream. `rgb` converts it, which one that is passed over is spared."""

    time_s: float
    """From the stream's first picture."""
    is_first: bool
    rgb: Callable[[], Rgb]


def pictures(path: Path, fps: float, max_side: int) -> Iterator[Picture]:
    """All of a clip, a video's at `fps`, its longer side at most `max_side`.

    Raises VideoError and its leaves; of folders what their readers and `decode_jpeg` raise.
    """
    if path.is_dir():
        yield from _folder_pictures(path)
        return
    if path.suffix == RECORDING:
        yield from _recorded(path, fps)
        return
    with closing(open_video(path)) as video:
        is_first = True
        for time_s, frame in due_frames(video.frames(), fps, video.epsilon_s):
            yield Picture(time_s, is_first, functools.partial(frame.rgb, max_side))
            is_first = False
        if is_first:
            raise VideoEmpty("there is no frame in it", where=path)


def shots(path: Path, fps: float, max_frames: int) -> Iterator[Shot]:
    """The first frames as `read_footage` gives them, of recordings and event sets, too. Raises as
    both."""
    if path.suffix == RECORDING or (path / EVENT_INDEX).is_file():
        for picture in islice(pictures(path, fps, 0), max_frames):
            yield picture.is_first, picture.rgb()
        return
    yield from read_footage(path, fps, max_frames)


@dataclass
class Looked:
    """What became of clips that are looked at one by one."""

    clips: Sequence[Path]
    skipped: dict[Path, str] = field(default_factory=dict)
    """Those that could not be read, and why."""
    shows: bool = False
    """In some picture there is more than one colour."""

    @contextmanager
    def clip(self, path: Path) -> Iterator[None]:
        """One that cannot be read is named and left out."""
        try:
            yield
        except (VideoError, FrameDecodeError, RecordingError, ConfigError) as error:
            if len(self.clips) == 1:
                raise
            self.skipped[path] = str(error)
            print(f"edge-vlm: {path.name} is left out: {error}", file=sys.stderr)

    def seen(self, taken: Iterable[Shot]) -> Iterator[Shot]:
        for shot in taken:
            self.see(shot[1])
            yield shot

    def see(self, rgb: Rgb) -> None:
        self.shows = self.shows or float(thumbnail(rgb, THUMBNAIL).std()) >= ONE_COLOUR

    def require_enough(self) -> None:
        """Raises ConfigError when fewer than half could be read, or nothing is to be seen."""
        left = len(self.clips) - len(self.skipped)
        if 2 * left < len(self.clips):
            why = "; ".join(f"{path.name}: {why}" for path, why in self.skipped.items())
            raise ConfigError(
                f"only {left} of {len(self.clips)} clips can be read: {why}",
                remedy="name clips that play in a video player",
            )
        if not self.shows:
            raise ConfigError(
                "the footage is of one colour: there is nothing to measure",
                where=", ".join(path.name for path in self.clips if path not in self.skipped),
                remedy="is the lens covered? give footage in which things can be seen",
            )


def _recorded(path: Path, fps: float) -> Iterator[Picture]:
    """A session's pictures, no more than `fps` of them a second. Raises RecordingError."""
    points = {point.name: point for point in metadata.entry_points(group=FOOTAGE_GROUP)}
    if RECORDING[1:] not in points:
        raise MissingExtraError.for_library("msgspec", "ort")
    due_s = None
    for time_s, rgb in points[RECORDING[1:]].load()(path):
        if due_s is None or time_s >= due_s - EPSILON_S:
            yield Picture(time_s, due_s is None, functools.partial(_same, rgb))
            # On the grid of the rate, whenever pictures come.
            due_s = max((due_s or 0.0) + 1 / fps, time_s + 0.5 / fps)
    if due_s is None:
        raise VideoEmpty("there is no picture in it", where=path)


def _same(rgb: Rgb) -> Rgb:
    return rgb


def _folder_pictures(path: Path) -> Iterator[Picture]:
    for jpegs, times_s in _streams(path):
        for i, (jpeg, time_s) in enumerate(zip(jpegs, times_s, strict=True)):
            yield Picture(time_s - times_s[0], i == 0, functools.partial(decode_jpeg, jpeg))


def _streams(path: Path) -> Iterator[tuple[Sequence[bytes], list[float]]]:
    if (path / EVENT_INDEX).is_file():
        for part in read_event_set(path):
            yield part.jpegs, [float(time_s) for time_s in part.times_s]
        return
    for clip in read_question_set(path):
        yield clip.jpegs, [float(time_s) for time_s in clip.times_s]


def _count(path: Path) -> int:
    """Pictures of a folder, by its index alone."""
    index = path / (EVENT_INDEX if (path / EVENT_INDEX).is_file() else QA_INDEX)
    lines = index.read_text("utf-8-sig").splitlines()
    return sum(len(parse_json(line)["times_s"]) for line in lines)


def expected_frames(path: Path, fps: float) -> float | None:
    """How many pictures there will be, as far as can be told without reading them."""
    try:
        if path.is_dir():
            return float(_count(path))
        if path.suffix == RECORDING:
            return None
        with closing(open_video(path)) as video:
            return None if video.duration_s is None else max(1.0, video.duration_s * fps)
    except (EdgeVlmError, OSError, KeyError, TypeError, ValueError):
        return 0.0  # it will be skipped, with words
