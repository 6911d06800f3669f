"""Draw the sprite atlas, whose result is committed. Needs Pillow and the Noto Color Emoji font.

The committed one was made with Debian's fonts-noto-color-emoji 2.042. Usage, from training/:
python -m edge_vlm_training.world.make_atlas [FONT]
"""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt

from edge_vlm.world.sprites import ATLAS_PATH, KINDS, SHAPES, SPRITE_SIDE, THINGS

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FONT_SIZE = 109  # the only bitmap size in the font
CODEPOINTS = dict(
    zip(
        THINGS,
        (0x1F431, 0x1F415, 0x1F697, 0x1F41F, 0x1F426, 0x1F332, 0x1F3E0, 0x26F5,
         0x2708, 0x1F511, 0x2615, 0x1FA91, 0x1F344, 0x1F514, 0x1F451, 0x1F3A9,
         0x1F98B, 0x26C4, 0x1F455, 0x1F3B8, 0x270B, 0x1F335, 0x1F45F, 0x1FA9C,
         0x1F6B2, 0x1F388, 0x1F40C, 0x23F0, 0x1F34C, 0x1F941, 0x1F319, 0x1F6A9),
        strict=True,
    )
)  # fmt: skip
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
MEAN_LUMINANCE = 0.68  # every sprite is brought to it, so that dark things keep their tint
SUPERSAMPLING = 8

Plane = npt.NDArray[np.floating]


def _inside(name: str, x: Plane, y: Plane) -> npt.NDArray[np.bool_]:
    """Which points of the square -1..1 (y downwards) belong to the shape."""
    radius, angle = np.hypot(x, y), np.arctan2(x, -y)
    if name == "circle":
        return radius <= 1.0
    if name == "square":
        return np.maximum(abs(x), abs(y)) <= 0.9
    if name == "triangle":
        return (y <= 0.9) & (abs(x) <= (y + 0.95) * 0.54)
    if name == "star":
        turn = (angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5
        inner, step = 0.42, np.pi / 5
        # the straight edge between an outer corner (radius 1) and an inner corner, in polar form
        edge = inner * np.sin(step) / (inner * np.sin(step - abs(turn)) + np.sin(abs(turn)))
        inside: npt.NDArray[np.bool_] = radius <= edge
        return inside
    if name == "heart":
        u, v = x * 1.18, 0.12 - y * 1.12
        heart: npt.NDArray[np.bool_] = (u * u + v * v - 1) ** 3 - u * u * v**3 <= 0
        return heart
    if name == "ring":
        return (radius <= 1.0) & (radius >= 0.56)
    if name == "cross":
        return (np.minimum(abs(x), abs(y)) <= 0.31) & (np.maximum(abs(x), abs(y)) <= 0.97)
    if name == "diamond":
        return abs(x) / 0.72 + abs(y) <= 1.0
    raise ValueError(f"no such shape: {name}")


def draw_shape(name: str) -> npt.NDArray[np.uint8]:
    """A shape with a darker rim, u8 [64, 64, 2], antialiased by averaging 8 x 8 samples a pixel."""
    n = SPRITE_SIDE * SUPERSAMPLING
    axis = ((np.arange(n, dtype=np.float32) + 0.5) / n * 2 - 1) * 1.02
    x, y = np.meshgrid(axis, axis)
    solid = _inside(name, x, y)
    rim = solid.copy()
    reach = 3 * SUPERSAMPLING
    for dy, dx in ((reach, 0), (-reach, 0), (0, reach), (0, -reach)):
        rim &= np.roll(solid, (dy, dx), (0, 1))
    luminance = np.where(rim, 0.9, 0.3) * solid
    blocks = (SPRITE_SIDE, SUPERSAMPLING, SPRITE_SIDE, SUPERSAMPLING)
    alpha = solid.reshape(blocks).mean((1, 3))
    light = luminance.reshape(blocks).mean((1, 3)) / np.maximum(alpha, 1e-6)
    sprite: npt.NDArray[np.uint8] = np.rint(np.stack([light, alpha], -1) * 255).astype(np.uint8)
    return sprite


def draw_thing(name: str, font_path: str) -> npt.NDArray[np.uint8]:
    """An emoji as luminance and alpha, u8 [64, 64, 2]; fills the square in its longer direction."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(font_path, FONT_SIZE)
    canvas = Image.new("RGBA", (192, 192), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((24, 24), chr(CODEPOINTS[name]), font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"{font_path} has no picture of {name}")
    picture = canvas.crop(box)
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    small = np.asarray(square.resize((SPRITE_SIDE, SPRITE_SIDE), Image.Resampling.BOX), np.float32)
    alpha = small[..., 3] / 255
    light = (small[..., :3] @ LUMA) / 255
    solid = alpha > 0.5
    low, high = np.percentile(light[solid], [2, 98])
    light = np.clip((light - low) / max(high - low, 1e-3), 0, 1)
    gamma = 1.0
    for _ in range(20):  # light**gamma with the wanted mean, by fixed-point steps
        mean = float((light[solid] ** gamma).mean())
        gamma *= 1 + (mean - MEAN_LUMINANCE)
    light = np.where(alpha > 0, light**gamma, 0)
    sprite: npt.NDArray[np.uint8] = np.rint(np.stack([light, alpha], -1) * 255).astype(np.uint8)
    return sprite


def make_atlas(font_path: str = FONT) -> npt.NDArray[np.uint8]:
    """All sprites in the order of ``KINDS``, u8 [kinds, 64, 64, 2]."""
    return np.stack([draw_shape(k) if k in SHAPES else draw_thing(k, font_path) for k in KINDS])


if __name__ == "__main__":
    np.savez_compressed(ATLAS_PATH, sprites=make_atlas(*sys.argv[1:2]))
