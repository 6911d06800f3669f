"""The harder world: smaller things that stay for less time, partly hidden, in the dark, seen by a
camera that turns or is cut to another place.

In the present world things are large and mostly stand still, so that half of the cells at random
hold nearly all there is to know. Here they do not.

Shapes: B clips, T frames, M things.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np

from edge_vlm.world.paths import APART, MIN_SIDE, SMALLEST_SIDE, FloatArray, Spans
from edge_vlm.world.scenes import UNCLEAR, Scenes, WorldConfig
from edge_vlm.world.splits import BoolArray, IntArray
from edge_vlm.world.textures import GRID, WIDE_MARGIN

_MIDDLE_SIDE = 18
_HIDING_APART = 0.15
_DARK = (0.3, 0.5)
_SWITCHED = 0.5
"""Share of dark clips in which the light is switched on or off."""
_LONGEST_TURN = 6
_SLOWEST_TURN, _FASTEST_TURN = 2, 6
_MOST_TURN = WIDE_MARGIN - 1
_EDGE = 4 / GRID
"""What is nearer to the edge of the picture, or beyond, is not seen."""


def harder(world: WorldConfig) -> WorldConfig:
    """The same clips of the harder world."""
    return replace(
        world, small=0.6, brief=0.35, overlapping=0.3, night=0.25, panning=0.25, cuts=0.15
    )


def things(
    rng: np.random.Generator, side: IntArray, spans: Spans, cfg: WorldConfig
) -> tuple[IntArray, Spans, FloatArray]:
    """Sides [B, M], life spans, and how far things keep clear of each other [B]."""
    shape, frames = side.shape, cfg.num_frames
    middling = rng.random(shape) < 0.5
    smaller = np.where(
        middling,
        rng.integers(_MIDDLE_SIDE, MIN_SIDE, shape),
        rng.integers(SMALLEST_SIDE, _MIDDLE_SIDE, shape),
    )
    side = np.where(rng.random(shape) < cfg.small, smaller, side)
    leave = spans.enter + rng.integers(2, 4, shape)
    brief = (rng.random(shape) < cfg.brief) & (leave < spans.leave) & (leave < frames)
    spans = replace(spans, leave=np.where(brief, leave, spans.leave))
    hiding = rng.random(len(side)) < cfg.overlapping
    return side, spans, np.where(hiding, _HIDING_APART, APART).astype(np.float32)


def seen_by_camera(rng: np.random.Generator, scenes: Scenes, cfg: WorldConfig) -> Scenes:
    """The light goes, the camera turns: what leaves the picture is gone."""
    count, frames = len(scenes), scenes.num_frames
    dark = rng.uniform(*_DARK, (count, 1))
    switch = rng.integers(0, frames, (count, 1))
    is_dark = (np.arange(frames) >= switch) ^ (rng.random((count, 1)) < 0.5)
    is_dark |= rng.random((count, 1)) >= _SWITCHED
    is_dark &= rng.random((count, 1)) < cfg.night
    turns = np.stack([_turn(rng, frames) for _ in range(count)])
    turns *= (rng.random((count, 1, 1)) < cfg.panning).astype(np.int64)
    pan = (turns / GRID).astype(np.float32)
    x, y = scenes.x + pan[..., :1], scenes.y + pan[..., 1:]
    inside = (np.minimum(x, y) >= _EDGE) & (np.maximum(x, y) <= 1 - _EDGE)
    moved = np.zeros((count, frames), bool)
    moved[:, 1:] = (np.diff(turns, axis=1) != 0).any(2)
    moved[:, 2:] |= moved[:, 1:-1]  # a direction is that of three frames
    scenes = replace(
        scenes,
        x=x,
        y=y,
        pan=pan,
        direction=np.where(moved[..., None], UNCLEAR, scenes.direction),
        brightness=(scenes.brightness * np.where(is_dark, dark, 1.0)).astype(np.float32),
    )
    return _only(scenes, scenes.visible & inside)


def cut(rng: np.random.Generator, scenes: Scenes, others: Scenes, cfg: WorldConfig) -> Scenes:
    """Some clips go on, from some frame on, as those of the same number in `others`.

    Where one of a kind is there before the cut and another behind it, nothing tells whether that
    other one appeared with the cut.
    """
    count, frames = len(scenes), scenes.num_frames
    at = rng.integers(2, max(3, frames - 1), (count, 1))
    is_cut = (rng.random((count, 1)) < cfg.cuts) & (frames >= 4)
    is_other = is_cut & (np.arange(frames) >= at)
    arrays: dict[str, Any] = {}
    for field in fields(Scenes):
        one, other = getattr(scenes, field.name), getattr(others, field.name)
        if field.name in Scenes.BY_THING:
            arrays[field.name] = np.concatenate([one, other], -1)
        elif field.name in Scenes.BY_FRAME:
            chosen = is_other.reshape(count, frames, *[1] * (one.ndim - 2))
            arrays[field.name] = np.where(chosen, other, one)
        else:
            arrays[field.name] = one
    shown = np.concatenate(
        [scenes.visible & ~is_other[..., None], others.visible & is_other[..., None]], -1
    )
    arrays["times_s"] = scenes.times_s
    before, behind = (
        np.take_along_axis(each.visible, frame[..., None].clip(max=frames - 1), 1)[:, 0]
        for each, frame in ((scenes, at - 1), (others, at))
    )
    alike = others.kind[:, :, None] == scenes.kind[:, None]
    again = is_cut & behind & (alike & before[:, None]).any(2)
    arrays["told"] = np.concatenate([scenes.told, others.told & ~again], -1)
    return _only(Scenes(**arrays), shown)


def _turn(rng: np.random.Generator, frames: int) -> IntArray:
    """The background's shift in grid units while the camera turns once, [T, 2]."""
    length = int(rng.integers(2, _LONGEST_TURN + 1))
    begin = int(rng.integers(0, max(1, frames - 1)))
    speed = int(rng.integers(_SLOWEST_TURN, _FASTEST_TURN + 1)) * int(rng.choice([-1, 1]))
    way = np.zeros((frames, 2), np.int64)
    axis = int(rng.random() < 0.2)
    way[:, axis] = (np.arange(frames) - begin).clip(0, length) * speed
    return way.clip(-_MOST_TURN, _MOST_TURN)


def _only(scenes: Scenes, visible: BoolArray) -> Scenes:
    """The same where only this is to be seen, [B, T, M]."""
    frames, ever = scenes.num_frames, visible.any(1)
    return replace(
        scenes,
        kind=np.where(ever, scenes.kind, -1),
        visible=visible,
        enter=np.where(ever, visible.argmax(1), frames),
        leave=np.where(ever, frames - visible[:, ::-1].argmax(1), frames),
    )
