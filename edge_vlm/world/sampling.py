"""Draws scenes of the rendered world by seed: what is where, when and in what colour."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from edge_vlm.world.harder import cut, seen_by_camera, things
from edge_vlm.world.paths import MAX_SIDE, MIN_SIDE, Spans, place
from edge_vlm.world.scenes import COLOURS, NOISE_KEYS, Scenes, WorldConfig
from edge_vlm.world.splits import SEED_SPACE, IntArray, allowed_pairs
from edge_vlm.world.sprites import KINDS
from edge_vlm.world.textures import GRID

_CAMERA, _OTHERS = 1, 2


def sample_scenes(seed: int, count: int, cfg: WorldConfig) -> Scenes:
    """``count`` clips, a function of (seed, count, cfg) only; the splits' seeds are unrelated.

    Raises ValueError for a negative seed.
    """
    if not cfg.is_harder:
        return _before_camera(seed, count, cfg)
    rng = np.random.default_rng([SEED_SPACE[cfg.split], seed, _CAMERA])
    scenes = seen_by_camera(rng, _before_camera(seed, count, cfg), cfg)
    if not cfg.cuts:
        return scenes
    others = _before_camera(seed, count, cfg, _OTHERS)
    return cut(rng, scenes, seen_by_camera(rng, others, cfg), cfg)


def _before_camera(seed: int, count: int, cfg: WorldConfig, *more: int) -> Scenes:
    """What is there. ``more`` numbers beside the seed mean other things in other places."""
    rng = np.random.default_rng([SEED_SPACE[cfg.split], seed, *more])
    frames, slots = cfg.num_frames, cfg.max_objects
    allowed, backgrounds = allowed_pairs(cfg.split, wide=cfg.is_harder)
    background = backgrounds[rng.integers(len(backgrounds), size=count)]
    ranks = np.where(allowed[background], rng.random((count, len(KINDS))), 2.0)
    kind = np.argsort(ranks, axis=1)[:, :slots]
    wanted = rng.integers(1, slots + 1, size=count)
    if cfg.crowded:
        wanted = np.where(rng.random(count) < cfg.crowded, slots, wanted)
    kind[np.arange(slots) >= wanted[:, None]] = -1

    side = rng.integers(MIN_SIDE, MAX_SIDE + 1, size=(count, slots))
    spans = _sample_spans(rng, count, cfg)
    apart = None
    if cfg.is_harder:
        side, spans, apart = things(rng, side, spans, cfg)
    paths = place(rng, side, kind >= 0, spans, frames, cfg.split == "heldout", apart)
    kind, enter, leave = np.where(paths.placed, kind, -1), paths.enter, paths.leave
    now = np.arange(frames)[:, None]
    visible = (kind >= 0)[:, None] & (now >= enter[:, None]) & (now < leave[:, None])

    # all first and later colours of a clip differ, so they are distinct at every moment
    palette = np.argsort(rng.random((count, len(COLOURS))), axis=1)
    later = np.arange(slots, 2 * slots)
    changes = (rng.random((count, slots)) < cfg.colour_change) & (leave - enter >= 2)
    changes &= later < len(COLOURS)  # of five things only three find a free colour to change to
    change_at = enter + 1 + (rng.random((count, slots)) * (leave - enter - 1)).astype(np.int64)
    changed = changes[:, None] & (now >= change_at[:, None])
    free = palette[:, np.minimum(later, len(COLOURS) - 1)]
    colour = np.where(changed, free[:, None], palette[:, None, :slots])

    shaken = rng.random((count, frames, 1)) < 0.5
    shake = rng.integers(-1, 2, size=(count, frames, 2)) * shaken
    half_seconds = rng.integers(1, max(2, int(cfg.max_start_s * 2) + 1), size=count)
    starts = np.where(rng.random(count) < cfg.start_at_zero, 0, half_seconds) * 0.5
    order = np.argsort(rng.random((count, slots)), axis=1)  # placing order must not show
    centre = paths.centre / GRID
    scenes = Scenes(
        kind=kind,
        colour=colour,
        x=centre[..., 0].astype(np.float32),
        y=centre[..., 1].astype(np.float32),
        size=(side / GRID).astype(np.float32),
        visible=visible,
        enter=enter,
        leave=leave,
        direction=np.repeat(paths.direction[:, None], frames, 1),
        speed=(paths.speed / GRID).astype(np.float32),
        path_key=paths.key,
        background=np.repeat(background[:, None], frames, 1),
        shake=(shake / GRID).astype(np.float32),
        pan=np.zeros((count, frames, 2), np.float32),
        noise_sd=rng.uniform(2.5, 5.5, size=count).astype(np.float32),
        noise_key=rng.integers(NOISE_KEYS, size=(count, frames)),
        brightness=rng.uniform(0.96, 1.04, size=(count, frames)).astype(np.float32),
        times_s=starts.astype(np.float32)[:, None]
        + np.arange(frames, dtype=np.float32) / np.float32(cfg.fps),
        told=np.ones(kind.shape, bool),
    )
    return _reorder(scenes, order)


def _reorder(scenes: Scenes, order: IntArray) -> Scenes:
    """The same scenes with things numbered anew; ``order`` is [B, M]."""
    per_thing = ("kind", "size", "enter", "leave", "speed", "path_key")
    arrays: dict[str, Any] = {
        n: np.take_along_axis(getattr(scenes, n), order, 1) for n in per_thing
    }
    for name in ("colour", "x", "y", "visible", "direction"):
        arrays[name] = np.take_along_axis(getattr(scenes, name), order[:, None], 2)
    return replace(scenes, **arrays)


def _sample_spans(rng: np.random.Generator, count: int, cfg: WorldConfig) -> Spans:
    """Life spans as ``cfg`` wants them; nothing stays for less than two frames of a longer clip."""
    frames, shape = cfg.num_frames, (count, cfg.max_objects)
    moves = (rng.random(shape) < cfg.moving) & (frames > 1)
    late = (rng.random(shape) < cfg.late_entry) & (frames > 1)
    enter = np.where(late, rng.integers(1, max(2, frames - 1), size=shape), 0)
    leaves = (rng.random(shape) < cfg.early_leave) & (enter + 2 < frames)
    gathers = (rng.random(count) < cfg.gathering)[:, None]
    enter, moves, leaves = np.where(gathers, enter // 2, enter), moves & ~gathers, leaves & ~gathers
    length = 2 + (rng.random(shape) * (frames - enter - 2)).astype(np.int64)
    return Spans(enter=enter, leave=np.where(leaves, enter + length, frames), moves=moves)
