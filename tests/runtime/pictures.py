"""Small pictures and video files for tests."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import av
import numpy as np

from edge_vlm.frames import encode_jpeg


def picture(seed: int, size: int = 48) -> np.ndarray:
    """Noise: every picture differs from every other one."""
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


@lru_cache(maxsize=64)
def jpeg(seed: int, size: int = 48) -> bytes:
    return encode_jpeg(picture(seed, size))


def write_video(
    path: Path, num_frames: int = 8, fps: int = 2, size: int = 48, codec: str = "mpeg4"
) -> Path:
    """MPEG-4 part 2 (every PyAV has it); frame i is grey, of level 20 + 10 i (mod 230)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 400_000
        if num_frames == 0:
            container.start_encoding()
        for index in range(num_frames):
            grey = np.full((size, size, 3), (20 + 10 * index) % 230, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")):
                container.mux(packet)
        if num_frames:
            for packet in stream.encode():
                container.mux(packet)
    return path
