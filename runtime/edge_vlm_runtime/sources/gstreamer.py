"""A GStreamer pipeline in a process of its own, whose pictures come through a pipe.

For cameras that only GStreamer reaches, such as the CSI cameras of a Jetson. `gst-launch-1.0` is
the whole interface: no Python bindings, nothing to install but Debian's or JetPack's own packages.
Pictures travel as RGB in a Matroska stream: converted where matrix, range and orientation are
known, with their own times.
"""

from __future__ import annotations

import math
import os
import select
import shlex
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator

from edge_vlm.errors import VideoNotFound, VideoUnreadable
from edge_vlm.pixels.video import TimedFrame, Video
from edge_vlm_runtime.sources.addresses import READ_TIMEOUT_S
from edge_vlm_runtime.sources.masking import mask_credentials

PROGRAM = "gst-launch-1.0"
KILL_AFTER_S = 1.0
MAX_LAST_WORDS = 300
NO_PICTURE = "the pipeline gives no picture"
PROBE = {"probesize": "32768", "analyzeduration": "0", "fpsprobesize": "0"}
"""Raw pictures tell all there is to know in the header: the first one is not waited for."""


def csi_pipeline(sensor: int) -> str:
    """A Jetson's camera at 720p, through its image processor."""
    return (
        f"nvarguscamerasrc sensor-id={sensor} ! "
        "video/x-raw(memory:NVMM),width=1280,height=720,framerate=30/1 ! "
        "nvvidconv ! video/x-raw,format=I420"
    )


def launch_arguments(pipeline: str, fps: float) -> list[str]:
    """The command for a pipeline that ends in raw video, thinned to about `fps` in the process that
    has the pictures anyway. Raises VideoUnreadable when quotes do not match."""
    try:
        elements = shlex.split(pipeline)
    except ValueError as error:
        where = mask_credentials(pipeline)
        raise VideoUnreadable(f"not a pipeline: {error}", where=where) from error
    if not elements:
        raise VideoUnreadable("the pipeline is empty", remedy="gst:videotestsrc is-live=true")
    # Twice the rate: the newest picture is chosen on this side, and should be new.
    most = max(1, math.ceil(2 * fps))
    return [
        *(PROGRAM, "--quiet", *elements),
        *("!", "videorate", "drop-only=true", f"max-rate={most}"),
        *("!", "videoconvert", "!", "videoflip", "video-direction=auto"),
        # By way of 16 bits: the direct way is up to five levels off.
        *("!", "videoconvert", "!", "video/x-raw,format=AYUV64"),
        *("!", "videoconvert", "!", "video/x-raw,format=RGB"),
        *("!", "matroskamux", "streamable=true", "!", "fdsink", "fd=1"),
    ]


class GstPipe:
    """A file to read from: `read` blocks until there is something, but not longer than
    `timeout_s`."""

    def __init__(self, pipeline: str, fps: float, timeout_s: float) -> None:
        """Raises VideoNotFound without GStreamer, VideoUnreadable for what is no pipeline."""
        if shutil.which(PROGRAM) is None:
            raise VideoNotFound(
                f"{PROGRAM} is not installed",
                remedy="apt install gstreamer1.0-tools gstreamer1.0-plugins-good",
            )
        arguments = launch_arguments(pipeline, fps)
        self._timeout_s = timeout_s
        self._said = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )

    def read(self, size: int) -> bytes:
        """At most `size` bytes, none at the end. Raises TimeoutError."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        ready, _, _ = select.select([descriptor], [], [], self._timeout_s)
        if not ready:
            raise TimeoutError(f"no picture for {self._timeout_s:g} s")
        return os.read(descriptor, size)

    def last_words(self) -> str:
        """What the process said was wrong, on one line."""
        if not self._errors.closed:
            self._errors.seek(0)
            self._said = self._errors.read()
        text = self._said.decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        said = [line for line in lines if line.startswith(("ERROR", "WARNING"))] or lines
        return " ".join(said)[:MAX_LAST_WORDS]

    def close(self) -> None:
        """Ends the process. Twice does no harm."""
        process = self._process
        process.terminate()
        try:
            process.wait(KILL_AFTER_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        self.last_words()
        self._errors.close()


class GstCamera:
    """A GStreamer pipeline in the place of a camera."""

    def __init__(self, pipeline: str, name: str, fps: float) -> None:
        """Raises VideoNotFound, VideoUnreadable."""
        self._name = name
        self._pipe = GstPipe(pipeline, fps, READ_TIMEOUT_S)
        try:
            self._video = Video(
                self._pipe, name, refused=NO_PICTURE, format="matroska", options=PROBE
            )
        except VideoUnreadable as error:
            self._pipe.close()
            if why := mask_credentials(self._pipe.last_words()):
                raise VideoUnreadable(f"{NO_PICTURE} ({why})", where=name) from error
            raise

    @property
    def counts(self) -> Counter[str]:
        return self._video.counts

    def decoded(self) -> Iterator[TimedFrame]:
        """Raises VideoUnreadable when the pipeline ends with an error."""
        yield from self._video.raw_rgb()
        if why := mask_credentials(self._pipe.last_words()):
            raise VideoUnreadable(why, where=self._name)

    def close(self) -> None:
        self._video.close()
        self._pipe.close()
