"""An opened video: its pictures as they are decoded, or its packets alone.

A damaged packet is passed over, a clock that jumps goes on, a film on its side is turned. Times
are in seconds from the first frame. rgb is always u8 [H, W, 3], upright.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_vlm.errors import VideoEmpty, VideoNotFound, VideoUnreadable
from edge_vlm.pixels.colour import picture_rgb
from edge_vlm.pixels.film.opening import (
    announced_duration_s,
    av,
    decoding_errors,
    local_file,
    open_container,
    orientation_of,
    reason_of,
    track_of,
)
from edge_vlm.pixels.film.pace import Pace, Skip
from edge_vlm.pixels.film.packets import FramePacket, as_shown, clock_jumps
from edge_vlm.pixels.film.timeline import Timeline
from edge_vlm.pixels.frames import MAX_PIXELS, Rgb, exif_orientation
from edge_vlm.pixels.orientation import Orientation

log = logging.getLogger(__name__)

EPSILON_S = 1e-4
"""How much before its time a frame counts as shown."""
MILLISECONDS_EPSILON_S = 6e-4
"""The same where a container rounds times to milliseconds, as Matroska does."""
MOST_DAMAGED = 30
"""Packets in a row that cannot be decoded: more are a broken source, not a damaged picture."""
DECODE_ERROR, BEHIND, CLOCK_JUMP = "decode_error", "behind", "clock_jump"
"""Kinds of `Video.counts`."""
_NO_TIMES = 0x0080
"""`AVFMT_NOTIMESTAMPS`: of formats that are pictures one after the other, and no more."""
CODECS_WITH_EXIF = {"mjpeg", "png", "apng", "webp"}
FOREIGN_OPTIONS = {
    "format_whitelist": "mov,matroska,avi,mpegts,mpeg,flv,ogg,gif",
    "protocol_whitelist": "file",
}
"""Of FFmpeg, for what a stranger sent."""
_RAW_FPS = 25.0
"""Of a stream that carries neither times nor a rate."""
_CUT_OFF_SHARE, _CUT_OFF_S = 0.1, 0.5
"""How much may be missing of the announced length: headers are not exact."""


@dataclass(frozen=True, eq=False)
class TimedFrame:
    """A decoded frame and when a player shows it: from `time_s` to `end_s`, or to the next one."""

    time_s: float
    end_s: float
    picture: Any
    """PyAV's, as it is stored."""
    name: str
    """Of the video, for errors."""
    orientation: Orientation = Orientation.UPRIGHT
    captured_s: float | None = None
    """Of a camera that says so: when, on `time.monotonic`."""

    def rgb(self, max_side: int | None = None) -> Rgb:
        """u8 [H, W, 3], upright, its longer side at most `max_side`. Raises VideoUnreadable."""
        try:
            return self.orientation.turn(picture_rgb(self.picture, max_side))
        except decoding_errors() as error:
            raise VideoUnreadable(
                f"a frame cannot be converted ({error})", where=self.name
            ) from error


@dataclass(frozen=True, eq=False)
class VideoTimes:
    """When the frames of a file are shown, from its packets alone: nothing is decoded."""

    starts_s: npt.NDArray[np.float64]
    """Ascending, from 0."""
    keys_s: tuple[float, ...]
    """Ascending times of the frames from which decoding can begin; none if the file has no times of
    its own."""
    epsilon_s: float
    """The video's."""

    @property
    def end_s(self) -> float:
        """When the last frame begins."""
        return float(self.starts_s[-1])

    @property
    def frame_s(self) -> float:
        """Mean distance of two frames; 0 for a single one."""
        return self.end_s / max(len(self.starts_s) - 1, 1)

    def each_frame_once(self, times_s: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """Which of these ascending times show another frame than the time before."""
        shown = np.searchsorted(self.starts_s, times_s + self.epsilon_s, side="right")
        return np.diff(shown, prepend=-1) > 0


class Video:
    """An opened container and the track that is watched."""

    def __init__(
        self,
        file: Any,
        name: str,
        *,
        refused: str = "not a video, or cut off at its beginning",
        is_live: bool = False,
        **options: Any,
    ) -> None:
        """`file`, `options`: as for `open_container`. `name`: for errors, so without passwords.

        Raises VideoUnreadable (`refused` says what it means that it does not open; or there is no
        video in it), MissingExtraError.
        """
        self.name = name
        self.counts: Counter[str] = Counter()
        """Packets that were no picture, pictures left out to keep up, jumps of the clock."""
        try:
            self._container = open_container(file, **options)
        except decoding_errors() as error:
            raise VideoUnreadable(f"{refused} ({reason_of(error)})", where=name) from error
        try:
            self._stream = track_of(self._container, name)
        except BaseException:
            self._container.close()
            raise
        rate = self._stream.average_rate or self._stream.guessed_rate
        self._usual_s = 1 / (float(rate or 0) or _RAW_FPS)
        no_times = int(self._container.format.flags) & _NO_TIMES
        self._assumes_rate = bool(no_times) and not is_live
        self.is_live = is_live
        self._timeline = Timeline(self._usual_s)
        self._pace = Pace() if is_live else None
        self.is_heard = True
        """Whether it logs what is odd; for whoever opens a file twice."""
        self.path: Path | None = None
        """Of a file that can be opened again."""
        self._last_clock_s: float | None = None
        """Of the last picture, on the file's own clock."""
        self._clock_end_s: float | None = None
        """On the file's own clock: when the last packet ends."""

    def close(self) -> None:
        """Twice does no harm."""
        self._container.close()

    @property
    def duration_s(self) -> float | None:
        """Of the track, as the file announces it; None where it does not."""
        return announced_duration_s(self._container, self._stream)

    @staticmethod
    def _length_s(shown: Any) -> float | None:
        """Of a frame or a packet of one, where the file says so."""
        return float((shown.duration or 0) * (shown.time_base or 0)) or None

    @property
    def epsilon_s(self) -> float:
        """How much before its time a frame counts as shown."""
        in_milliseconds = self._stream.time_base == Fraction(1, 1000)
        return MILLISECONDS_EPSILON_S if in_milliseconds else EPSILON_S

    def _broken(self, why: str, error: BaseException) -> VideoUnreadable:
        return VideoUnreadable(f"{why} ({reason_of(error)})", where=self.name)

    def _packets(self) -> Iterator[Any]:
        """PyAV's, the last one empty. A damaged one is passed over. Raises VideoUnreadable."""
        failed: BaseException | None = None
        for _ in range(MOST_DAMAGED):
            try:
                yield from self._container.demux(self._stream)
                return
            except av().error.InvalidDataError as error:
                failed = error
                self.counts[DECODE_ERROR] += 1
            except decoding_errors() as error:
                failed = error
                break
        assert failed is not None
        after_s = self._timeline.end_s
        raise self._broken(f"the video is broken or cut off after {after_s:.1f} s", failed)

    def decoded(self) -> Iterator[TimedFrame]:
        """Every frame from here on. A damaged packet is counted and passed over.

        Raises VideoUnreadable where the video is broken.
        """
        damage = _Damage(self)
        orientation = Orientation.UPRIGHT
        has_exif = self._stream.codec_context.name in CODECS_WITH_EXIF
        began_s = time.monotonic()
        try:
            for packet in self._packets():
                now_s = time.monotonic()
                if packet.size and not self._is_taken(packet, now_s, now_s - began_s):
                    began_s = time.monotonic()
                    continue
                if packet.size and has_exif:
                    orientation = exif_orientation(packet)
                try:
                    pictures = packet.decode()
                except decoding_errors() as error:
                    damage.found(packet, error)
                    pictures = []
                else:
                    damage.none_in(packet, len(pictures))
                self._has_read(packet)
                for picture in pictures:
                    yield self._placed(picture, orientation)
                began_s = time.monotonic()
        except VideoUnreadable:
            yield from self._rest(orientation)
            raise
        if damage.lost > 0:
            yield from self._tail(orientation)
        damage.require_a_picture()

    def _has_read(self, packet: Any) -> None:
        """Keeps how far a file goes, whether or not that can be decoded."""
        if packet.size and packet.pts is not None:
            clock_s = float(packet.pts * packet.time_base)
            end_s = clock_s + (self._length_s(packet) or self._usual_s)
            self._clock_end_s = max(end_s, self._clock_end_s or -math.inf)

    def _tail(self, exif: Orientation) -> Iterator[TimedFrame]:
        """The last pictures of a file anew, in one thread: where several decode, damage near the
        end takes its whole neighbours along."""
        last_s = self._last_clock_s
        if self.path is None or last_s is None or self._timeline.jumps:
            return
        with closing(Video(local_file(self.path), self.name)) as again:
            bad = 0
            again._stream.thread_type = "SLICE"
            place = round(last_s / again._stream.time_base)
            again._container.seek(place, stream=again._stream, backward=True)
            for packet in again._packets():
                try:
                    pictures = packet.decode()
                except decoding_errors():
                    bad += 1
                    continue
                for picture in pictures:
                    if picture.time is not None and picture.time > last_s:
                        yield self._placed(picture, exif)
        self.counts[DECODE_ERROR] = max(self.counts[DECODE_ERROR], bad)

    def raw_rgb(self) -> Iterator[TimedFrame]:
        """Every frame of a stream of raw rgb whose rows are padded, as GStreamer's: decoders take
        them for tight. Raises VideoUnreadable."""
        context = self._stream.codec_context
        width, height = context.width, context.height
        for packet in self._packets():
            if packet.size:
                rows = np.frombuffer(packet, np.uint8, packet.size // height * height)
                rgb = np.ascontiguousarray(rows.reshape(height, -1)[:, : 3 * width])
                picture = av().VideoFrame.from_ndarray(
                    rgb.reshape(height, width, 3), format="rgb24"
                )
                yield TimedFrame(0.0, 0.0, picture, self.name)

    def _rest(self, orientation: Orientation) -> Iterator[TimedFrame]:
        """What the decoder still holds when a file breaks off."""
        try:
            pictures = self._stream.codec_context.decode(None)
        except decoding_errors():
            return
        for picture in pictures:
            yield self._placed(picture, orientation)

    def _is_taken(self, packet: Any, now_s: float, waited_s: float) -> bool:
        stamp = packet.pts if packet.dts is None else packet.dts
        if self._pace is None or stamp is None:
            return True
        camera_s = float(stamp * packet.time_base)
        before = self._pace.skip
        is_taken = self._pace.takes(camera_s, bool(packet.is_keyframe), now_s, waited_s)
        if self._pace.skip is not before:
            if self._pace.skip is Skip.TO_KEY:
                self._stream.codec_context.flush_buffers()
            lenient = self._pace.skip is Skip.NOTHING
            self._stream.codec_context.skip_frame = "DEFAULT" if lenient else "NONREF"
            if not lenient and not self.counts[BEHIND]:
                self._say("decoding is slower than the camera, so pictures are skipped")
        self.counts[BEHIND] += not is_taken
        return is_taken

    def _placed(self, picture: Any, exif: Orientation) -> TimedFrame:
        clock_s = None if picture.time is None else float(picture.time)
        time_s = self._place(clock_s, self._length_s(picture))
        self._last_clock_s = clock_s
        captured_s = None
        if self._pace is not None and clock_s is not None:
            captured_s = self._pace.captured_s(clock_s)
        orientation = orientation_of(picture, exif)
        return TimedFrame(time_s, self._timeline.end_s, picture, self.name, orientation, captured_s)

    def _place(self, clock_s: float | None, length_s: float | None) -> float:
        if self._assumes_rate:
            self._assumes_rate = False
            self._say("no times in it: %g pictures a second are assumed", 1 / self._usual_s)
        time_s = self._timeline.place(clock_s, length_s)
        if clock_s is not None:
            clock_end_s = clock_s + self._timeline.end_s - time_s
            self._clock_end_s = max(clock_end_s, self._clock_end_s or -math.inf)
        if self._timeline.jumps > self.counts[CLOCK_JUMP]:
            if self.counts[CLOCK_JUMP] == 0:
                self._say("its clock jumps at %.1f s: it goes on from there", time_s)
            self.counts[CLOCK_JUMP] = self._timeline.jumps
        return time_s

    def _say(self, text: str, *values: float) -> None:
        if self.is_heard:
            log.warning(f"%s: {text}", self.name, *values)

    def frames(self) -> Iterator[TimedFrame]:
        """Every frame of the file. Raises VideoUnreadable where it is broken or cut off, VideoEmpty
        when it holds no frame."""
        is_empty = True
        for frame in self.decoded():
            is_empty = False
            yield frame
        if is_empty:
            raise VideoEmpty("there is no frame in it", where=self.name)
        if not self._timeline.jumps:
            self._require_whole(self._timeline.end_s, self._clock_end_s)

    def _require_whole(self, end_s: float, clock_end_s: float | None) -> None:
        """Raises VideoUnreadable if the last frame's end is clearly before the announced one."""
        announced_s = self.duration_s
        start = self._stream.start_time
        reached_s = end_s
        if clock_end_s is not None and start is not None:  # what comes first may be undecodable
            reached_s = max(end_s, clock_end_s - float(start * self._stream.time_base))
        if announced_s is not None and reached_s < (1 - _CUT_OFF_SHARE) * announced_s - _CUT_OFF_S:
            raise VideoUnreadable(
                f"the video is cut off: it ends after {reached_s:.1f} of {announced_s:.1f} s",
                where=self.name,
            )

    def seek(self, time_s: float) -> None:
        """`decoded` then begins with the keyframe at `time_s`, or one before. Only after a first
        frame has been decoded, and where the clock does not jump."""
        place = round((time_s + self._timeline.start_s) / self._stream.time_base)
        self._container.seek(place, stream=self._stream, backward=True)
        self._timeline.look_ahead(time_s)

    def packets(self) -> Iterator[FramePacket]:
        """Of each frame that is shown, in that order and undecoded. Raises as `decoded`.

        Only what stands between two jumps of the clock is held in memory.
        """
        piece: list[FramePacket] = []
        last_s = highest_s = -math.inf
        has_key = was_without = False
        for packet in self._packets():
            if not packet.size:
                continue
            first_key = bool(packet.is_keyframe) and not has_key
            has_key = has_key or bool(packet.is_keyframe)
            if packet.is_discard:
                continue
            length_s = self._length_s(packet)
            time_s, decoded_s = (
                None if stamp is None else float(stamp * packet.time_base)
                for stamp in (packet.pts, packet.dts)
            )
            if first_key and piece:  # nothing before it can be decoded
                piece, was_without = [], True
            if time_s is not None:
                usual_s = length_s or self._usual_s
                if clock_jumps(time_s, decoded_s, last_s, highest_s, usual_s):
                    yield from as_shown(piece, was_without)
                    piece, highest_s, was_without = [], -math.inf, False
                last_s = last_s if decoded_s is None else decoded_s
                highest_s = max(highest_s, time_s)
            piece.append(FramePacket(time_s, length_s, bool(packet.is_keyframe)))
        yield from as_shown(piece, was_without)

    def times(self) -> VideoTimes:
        """Of all frames, from the packets alone. Raises VideoUnreadable, VideoEmpty."""
        starts, keys = [], []
        for packet in self.packets():
            starts.append(self._place(packet.time_s, packet.length_s))
            if packet.is_key and packet.time_s is not None:
                keys.append(starts[-1])
        if not starts:
            raise VideoEmpty("there is no frame in it", where=self.name)
        if self._timeline.jumps:
            keys = []  # a place on this clock would be several
        else:
            self._require_whole(self._timeline.end_s, self._clock_end_s)
        return VideoTimes(np.array(starts), tuple(keys), self.epsilon_s)


class _Damage:
    """Counts the packets of a video that are no picture."""

    def __init__(self, video: Video) -> None:
        self._video = video
        self._in_a_row = 0
        self._pictures = 0
        self._has_key = False
        self._last: BaseException | None = None
        self._sound = 0
        """Packets that the decoder took."""

    @property
    def lost(self) -> int:
        """Pictures that never came, though only their neighbours were damaged."""
        return self._sound - self._pictures if self._pictures and not self._video.is_live else 0

    def found(self, packet: Any, error: BaseException) -> None:
        """Raises VideoUnreadable when there is nothing else any more."""
        video = self._video
        self._has_key = self._has_key or bool(packet.is_keyframe)
        self._last = error
        if not self._has_key and not self._pictures:
            return  # a stream that is joined in its middle
        video.counts[DECODE_ERROR] += 1
        self._in_a_row += 1
        if packet.pts is not None and not self._pictures:
            video._place(float(packet.pts * packet.time_base), video._length_s(packet))
        if self._in_a_row >= MOST_DAMAGED:
            after_s = video._timeline.end_s
            raise video._broken(
                f"the video is broken after {after_s:.1f} s: {MOST_DAMAGED} pictures in a row "
                "cannot be decoded",
                error,
            ) from error

    def none_in(self, packet: Any, num_pictures: int) -> None:
        if packet.size:
            self._sound += 1
            self._has_key = self._has_key or bool(packet.is_keyframe)
        if num_pictures:
            self._in_a_row = 0
            self._pictures += num_pictures

    def require_a_picture(self) -> None:
        """Raises VideoUnreadable if there was only damage."""
        if self._last is not None and not self._pictures:
            codec = self._video._stream.codec_context.name
            raise self._video._broken(
                f"none of its pictures can be decoded, as {codec}", self._last
            ) from self._last


def open_video(path: Path, *, name: str | None = None, is_foreign: bool = False) -> Video:
    """A file; `name`: for errors, instead of its path. `is_foreign`: somebody else's, so no list of
    other files or addresses is taken for a video (FFmpeg would read them), nor huge pictures.

    Raises VideoNotFound, VideoUnreadable, MissingExtraError."""
    if not path.exists():
        raise VideoNotFound("no such file", where=name or path)
    if path.is_dir():
        raise VideoUnreadable("a folder, not a video", where=name or path, remedy="name a file")
    options = FOREIGN_OPTIONS if is_foreign else {}
    video = Video(local_file(path), name or str(path), options=options)
    video.path = path
    if is_foreign:
        context = video._stream.codec_context
        if context.width * context.height > MAX_PIXELS:
            video.close()
            raise VideoUnreadable(
                f"its pictures are too large: {context.width}x{context.height}",
                where=name or path,
                remedy=f"send at most {MAX_PIXELS} pixels each",
            )
    video._stream.thread_type = "AUTO"
    return video
