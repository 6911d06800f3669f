"""Which source a text names.

A source gives pictures with times, already thinned to the wanted rate. Files give every due picture
and then end; live sources give the newest picture there is, and never end by themselves.
"""

from __future__ import annotations

import re
from pathlib import Path

from edge_vlm.errors import VideoNotFound
from edge_vlm_runtime.sources.container import Source, mask_credentials
from edge_vlm_runtime.sources.gstreamer import csi_pipeline
from edge_vlm_runtime.sources.live import GstCamera, LiveSource, open_camera
from edge_vlm_runtime.sources.video_file import FileSource

CSI = re.compile(r"csi(?::(\d+))?")
GST = "gst:"
WEBCAM = re.compile(r"(?:webcam(?::(\d+))?|/dev/video(\d+))")


def open_source(text: str, fps: float) -> Source:
    """A file, `webcam`, `webcam:1`, `/dev/video1`, `rtsp://...`, `csi`, `csi:1`, or `gst:` and a
    GStreamer pipeline that ends in raw video, at most `fps` pictures a second.

    Raises VideoNotFound, VideoUnreadable; VideoEmpty only when the pictures are read.
    """
    csi = CSI.fullmatch(text)
    if csi is not None or text.startswith(GST):
        pipeline = text[len(GST) :] if csi is None else csi_pipeline(int(csi.group(1) or 0))
        return LiveSource(text, fps, lambda: GstCamera(pipeline, mask_credentials(text), fps))
    webcam = WEBCAM.fullmatch(text)
    if webcam is not None:
        device = f"/dev/video{webcam.group(1) or webcam.group(2) or 0}"
        if not Path(device).exists():
            raise VideoNotFound(
                f"there is no camera {device}", remedy="plug one in or use the browser page"
            )
        return LiveSource(device, fps, lambda: open_camera(device, format="v4l2"))
    if text.startswith(("rtsp://", "rtsps://")):
        return LiveSource(text, fps, lambda: open_camera(text, options={"rtsp_transport": "tcp"}))
    return FileSource(text, fps)
