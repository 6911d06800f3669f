"""Small pictures and video files for tests."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import av
import numpy as np

from edge_vlm.pixels.frames import encode_jpeg


def picture(seed: int, size: int = 48) -> np.ndarray:
    """Noise: every picture differs from every other one."""
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


@lru_cache(maxsize=64)
def jpeg(seed: int, size: int = 48) -> bytes:
    return encode_jpeg(picture(seed, size))


def scene(kind: str, num_frames: int, size: int = 96) -> list[np.ndarray]:
    """Three coloured squares on a cluttered ground with a camera's noise: `static`, `slow`, `fast`,
    or `bursts` (still for twenty frames, then ten fast ones)."""
    random = np.random.default_rng(7)
    ground = np.kron(random.integers(60, 190, (12, 12, 3)), np.ones((size // 12, size // 12, 1)))
    side, turns, made = size // 5, 0.0, []
    for index in range(num_frames):
        moving = index % 30 >= 20 if kind == "bursts" else True
        turns += {"static": 0.0, "slow": 0.005, "fast": 0.12, "bursts": 0.12}[kind] * moving
        rgb = ground + random.normal(0, 1, ground.shape)
        for thing, colour in enumerate([(255, 40, 40), (40, 255, 60), (60, 60, 255)]):
            angle = 2 * np.pi * (turns + thing / 3)
            place = (size - side) * (0.5 + 0.45 * np.array([np.sin(angle), np.cos(angle)]))
            top, left = place.astype(int)
            rgb[top : top + side, left : left + side] = colour
        made.append(rgb.clip(0, 255).astype(np.uint8))
    return made


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
