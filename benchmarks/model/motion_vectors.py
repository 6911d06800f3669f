"""Which cells of a film changed: a codec's motion vectors beside the pixel rule of `reuse`.

    ffmpeg -f lavfi -i testsrc2=s=1280x720:d=0.04 room.png
    ffmpeg -loop 1 -i room.png -t 12 -r 25 -vf noise=alls=8:allf=t -pix_fmt yuv420p noisy.mp4
    ffmpeg -loop 1 -i room.png -t 12 -r 25 -vf "eq=brightness='-0.4*gt(t,6)':eval=frame" \\
        -pix_fmt yuv420p lamp.mp4
    python -m benchmarks.model.motion_vectors bikes.mp4 bigbuckbunny.mp4 noisy.mp4 lamp.mp4

Pictures are taken two a second, as a session does, and compared with the one before at the size
that Molmo2-4B sees. FFmpeg exports vectors and no residuals; a cell has moved if a block that
touches it has a vector of half a pixel or more in any of the pictures since, or was coded anew. Two
errors are counted: cells that changed and have no vector, which would be taken from another
picture, and cells that did not change and have one, which would be computed for nothing.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import torch

from benchmarks.harness import RESULTS, result_head, script_parser, write_result
from edge_vlm.config import CELL
from edge_vlm.pixels.frames import Rgb
from edge_vlm.pixels.patches import cell_table, to_pixel_values
from edge_vlm.presets import molmo2_4b
from edge_vlm.pruning.reuse import patch_differences

HALF_PIXEL = 0.5
VISION = molmo2_4b().vision
SIDE = math.isqrt(VISION.num_cells) * CELL
"""Patches along a side."""

Mask = npt.NDArray[np.bool_]


@dataclass
class Counts:
    cells: int = 0
    changed: int = 0
    changed_unmoved: int = 0
    unchanged_moved: int = 0

    def add(self, changed_C: Mask, moved_C: Mask) -> None:
        self.cells += changed_C.size
        self.changed += int(changed_C.sum())
        self.changed_unmoved += int((changed_C & ~moved_C).sum())
        self.unchanged_moved += int((moved_C & ~changed_C).sum())

    def record(self) -> dict[str, float]:
        return {
            "changed": round(self.changed / max(self.cells, 1), 3),
            "changed_without_vector": round(self.changed_unmoved / max(self.changed, 1), 3),
            "unchanged_with_vector": round(
                self.unchanged_moved / max(self.cells - self.changed, 1), 3
            ),
        }


def moved_patches(frame: av.VideoFrame) -> Mask:
    """Patches [SIDE, SIDE] that a vector of this picture touches; all where it has none at all,
    because it was coded without the others."""
    found = np.zeros((SIDE, SIDE), bool)
    side_data = frame.side_data.get("MOTION_VECTORS")
    if side_data is None:
        return ~found if frame.key_frame else found
    vectors: Any = side_data.to_ndarray()
    lengths = np.hypot(vectors["motion_x"], vectors["motion_y"]) / vectors["motion_scale"]
    far = vectors[lengths >= HALF_PIXEL]
    left, right = _edges(far["dst_x"], far["w"], frame.width)
    top, bottom = _edges(far["dst_y"], far["h"], frame.height)
    for i in range(len(far)):
        found[top[i] : bottom[i] + 1, left[i] : right[i] + 1] = True
    return found


def _edges(middle: npt.NDArray[Any], width: npt.NDArray[Any], size: int) -> npt.NDArray[np.int64]:
    """First and last patch [2, n] of blocks along an axis of `size` pixels."""
    half = width / 2.0
    pixels = np.stack([middle - half, middle + half - 1])
    return np.clip(pixels * SIDE / size, 0, SIDE - 1).astype(np.int64)


def pictures(path: Path, fps: float, seconds: float) -> Iterator[tuple[Rgb, Mask]]:
    """Pictures on the grid, each with the patches that moved since the one before."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.options = {"flags2": "+export_mvs"}
        moved, due_s, first_s = np.zeros((SIDE, SIDE), bool), 0.0, None
        for frame in container.decode(stream):
            if frame.time is None:
                continue
            first_s = frame.time if first_s is None else first_s
            if frame.time - first_s > seconds:
                return
            if due_s:  # a key frame before the first picture says nothing
                moved |= moved_patches(frame)
            if frame.time - first_s + 1e-4 >= due_s:
                yield frame.to_ndarray(format="rgb24"), moved
                moved, due_s = np.zeros((SIDE, SIDE), bool), due_s + 1 / fps


def count(path: Path, args: argparse.Namespace) -> Counts:
    counts, before = Counts(), None
    cells = cell_table(SIDE // CELL)
    for rgb, moved in pictures(path, args.fps, args.seconds):
        pixels = to_pixel_values(rgb, VISION)
        if before is not None:
            changed = patch_differences(pixels, before) >= args.level
            counts.add(np.any(changed[cells], axis=1), np.any(moved.ravel()[cells], axis=1))
        before = pixels
    return counts


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "motion_vectors.json")
    parser.add_argument("clips", type=Path, nargs="+")
    parser.add_argument("--fps", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each clip (20)")
    parser.add_argument("--level", type=float, default=8.0, help="grey levels of `reuse` (8)")
    args = parser.parse_args(argv)
    clips = []
    print(f"{'clip':<40} changed  changed, no vector  unchanged, a vector")
    for path in args.clips:
        found = count(path, args).record()
        clips.append({"clip": path.name, **found})
        changed, missed, idle = (f"{value:.1%}" for value in found.values())
        print(f"{path.name:<40} {changed:>7} {missed:>19} {idle:>20}")
    head = result_head(__file__, argv, torch.device("cpu"))
    write_result(args.out, {**head, "fps": args.fps, "level": args.level, "clips": clips})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
