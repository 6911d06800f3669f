"""What our own code does with a picture, each step in turn with the way it was done before.

    python -m benchmarks.runtime.picture_path

Processor milliseconds (medians and least of the rounds): decoding a JPEG by simplejpeg or by
Pillow, resizing to 378x378 a few rows at a time or whole, and a raw picture from message to array
with one copy or with three. The pixels are the same either way, which is checked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import numpy as np
import torch

from benchmarks.harness import (
    RESULTS,
    in_turn,
    progress,
    result_head,
    script_parser,
    speed_up,
    summary,
    write_result,
)
from edge_vlm.pixels import frames
from edge_vlm.pixels.frames import decode_jpeg, decode_picture, encode_jpeg, raw_picture
from edge_vlm.pixels.patches import _fused_sum, _sample_points, resize_bilinear
from edge_vlm_runtime import protocol

SIDE = 378
SIZES = {"480p": (480, 640), "1080p": (1080, 1920)}
Pair = tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]


def drawn(height: int, width: int) -> np.ndarray:
    """Large shapes and some noise, as a camera sees: JPEGs of a usual size."""
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / 40 + y / 90), np.cos(y / 30), np.sin((x + y) / 200)], 2)
    noise = np.random.default_rng(0).normal(0, 4, waves.shape)
    return np.clip(waves * 90 + 128 + noise, 0, 255).astype(np.uint8)


def whole_resize(rgb: np.ndarray, size: int) -> np.ndarray:
    """As it was: all rows at once, three colours as the innermost loop."""
    height, width = rgb.shape[:2]
    rows, columns = _sample_points(height, size), _sample_points(width, size)
    (top, bottom, weight_y), (left, right, weight_x) = rows, columns
    weight_x, weight_y = weight_x[None, :, None], weight_y[:, None, None]

    def across(lines: np.ndarray) -> np.ndarray:
        mixed: np.ndarray = lines[:, left] * (1 - weight_x) + lines[:, right] * weight_x
        return mixed

    out = across(rgb[top]) * (1 - weight_y) + across(rgb[bottom]) * weight_y
    whole = np.rint(out)
    ties = np.nonzero(np.abs(out - whole) > 0.5 - 2.0**-10)
    whole[ties] = np.rint(_fused_sum(rgb, rows, columns, ties))
    sharp: np.ndarray = np.clip(whole, 0, 255).astype(np.float32)
    return sharp


def three_copies(data: bytes) -> np.ndarray:
    payload = data[protocol.HEADER.size :]
    width, height = int.from_bytes(payload[:2], "little"), int.from_bytes(payload[2:4], "little")
    return decode_picture(raw_picture(payload[4:], width, height))


def one_copy(data: bytes) -> np.ndarray:
    return decode_picture(protocol.decode_frame_message(data).picture())


def by_pillow(data: bytes) -> np.ndarray:
    with mock.patch.object(frames, "has_library", lambda: False):
        return decode_jpeg(data)


def pairs() -> dict[str, Pair]:
    """Before and after, by step."""
    found: dict[str, Pair] = {}
    for name, (height, width) in SIZES.items():
        rgb = drawn(height, width)
        jpeg, raw = encode_jpeg(rgb), protocol.raw_frame_message(1, 0, rgb).encode()
        found[f"decode {name}"] = partial(by_pillow, jpeg), partial(decode_jpeg, jpeg)
        found[f"resize {name}"] = (
            partial(whole_resize, rgb, SIDE),
            partial(resize_bilinear, rgb, SIDE),
        )
        found[f"raw {name}"] = partial(three_copies, raw), partial(one_copy, raw)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "picture_path.json")
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args(argv)
    steps = {}
    for name, (before, after) in pairs().items():
        np.testing.assert_array_equal(before(), after())
        seconds = in_turn(
            {"before": before, "after": after},
            rounds=args.rounds,
            warmups=2,
            device=torch.device("cpu"),
            say=lambda line: None,
            clock=time.process_time,
        )
        ratio = round(speed_up(seconds["before"], seconds["after"]), 2)
        steps[name] = {key: summary(found) for key, found in seconds.items()} | {"ratio": ratio}
        medians = {
            key: round(summary(found)["median_s"] * 1e3, 2) for key, found in seconds.items()
        }
        progress(f"{name}: {medians} ms, {ratio} times")
    write_result(
        args.out,
        {**result_head(__file__, argv, torch.device("cpu")), "unit": "processor s", "steps": steps},
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
