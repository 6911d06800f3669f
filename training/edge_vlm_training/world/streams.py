"""What a session holds of a stream after minutes: its first frame and the latest, out of streets.

A session keeps the frame with which it began; of all others it forgets the oldest when its memory
is full, drops those that show nothing new, and counts its time stamps anew where they would grow
beyond what the model knows. Clips that begin and end with a film have none of this.

Streets of training have seeds of their own, and nobody in them whose kind is kept for held-out
clips on that background.

Shapes: B clips, T frames, M things.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_vlm.world.scenes import UNCLEAR, Scenes
from edge_vlm.world.splits import pair_is_heldout
from edge_vlm.world.street import MOST_SEED, Street
from edge_vlm.world.street_traffic import STEP_S, TELLING

FIRST_SEED = MOST_SEED // 2
"""Of the streets of training. Those that people watch have small numbers."""
LONGEST_S = 1800.0
"""Since the session began, at the begin of what it remembers."""

_BEGIN_STEPS = 1024
_QUIET = (0.0, 0.0, 0.6, 0.95)
"""Shares of the frames that show nothing new which a session drops, one of these for each clip."""
_HEARTBEAT = 20
"""Steps after which a frame is kept whatever it shows."""
_FIRST_STAMP_S = 0.5
"""Of what a session remembers when it has just counted its stamps anew."""

Steps = npt.NDArray[np.int64]


def stream_scenes(
    rng: np.random.Generator, count: int, num_frames: int, evicted: int, max_time_s: float
) -> Scenes:
    """`count` clips of `num_frames` frames; 1 to `evicted` are the last that a session forgot.

    With `evicted` 0 nothing is missing behind the first frame but what showed nothing new.
    No stamp is above `max_time_s`, which is at least half a second a frame.
    """
    clips = [_clip(rng, num_frames, evicted, max_time_s) for _ in range(count)]
    things = max(clip.kind.shape[1] for clip in clips)
    return _joined([_padded(clip, things) for clip in clips])


def _clip(rng: np.random.Generator, num_frames: int, evicted: int, max_time_s: float) -> Scenes:
    street = Street(int(rng.integers(FIRST_SEED, MOST_SEED)))
    begin = int(rng.integers(_BEGIN_STEPS))
    ago = 1
    if evicted:
        ago = max(2, int(LONGEST_S / STEP_S * math.exp(-rng.exponential(2.0))))
    room = int(max_time_s / STEP_S)
    window = _window(rng, street, begin + ago, num_frames - 1, room - 1)
    scenes = street.scenes_at(np.array([begin, *window]) * STEP_S)
    stamps = np.array([begin, *window]) - begin
    if stamps[-1] > room:
        span = window[-1] - window[evicted]
        first = int(_FIRST_STAMP_S / STEP_S)
        # Just counted anew, or a while ago.
        first = first if rng.random() < 0.3 else int(rng.integers(first, room - span + 1))
        stamps[1:] = np.maximum(window - window[evicted] + first, 0)
    hidden = pair_is_heldout(scenes.kind, scenes.background[:, :1])
    scenes = dataclasses.replace(
        scenes,
        kind=np.where(hidden, -1, scenes.kind),
        visible=scenes.visible & ~hidden[:, None],
        enter=np.where(hidden, num_frames, scenes.enter),
        leave=np.where(hidden, num_frames, scenes.leave),
        times_s=(stamps * STEP_S)[None].astype(np.float32),
    )
    return _as_remembered(scenes, evicted) if evicted else scenes


def _as_remembered(scenes: Scenes, evicted: int) -> Scenes:
    """What is known of a clip without the frames that were forgotten, 1 to `evicted`.

    Whatever is there in the oldest frame behind the gap may have come just then or long before, and
    which way it goes is told by that frame and two later ones. Who came and went in the gap was
    never there.
    """
    oldest = evicted + 1
    enter, leave = scenes.enter, scenes.leave
    unseen = (enter > 0) & (leave <= oldest)
    told = (enter == 0) | (enter > oldest)
    enter = np.where(told, enter, np.where(unseen, scenes.num_frames, oldest))
    direction = scenes.direction.copy()
    direction[:, 1 : oldest + TELLING - 1] = UNCLEAR
    return dataclasses.replace(
        scenes,
        enter=enter,
        leave=np.maximum(enter, leave),
        told=told,
        direction=direction,
    )


def _window(
    rng: np.random.Generator, street: Street, first: int, num_frames: int, longest: int
) -> Steps:
    """The steps of `num_frames` frames from `first` on, within `longest`: those that show something
    new and some that do not."""
    longest = min(longest, num_frames * _HEARTBEAT)  # there are as many by then
    steps = np.arange(first, first + longest)
    scenes = street.scenes_at(steps * STEP_S)
    seen = scenes.visible[0]
    moved = np.diff(scenes.x[0], axis=0) ** 2 + np.diff(scenes.y[0], axis=0) ** 2 > 0
    news = (seen[1:] != seen[:-1]) | (moved & seen[1:])
    kept = np.concatenate([[True], news.any(1) | (rng.random(longest - 1) >= rng.choice(_QUIET))])
    for step in range(longest):
        if not kept[max(0, step - _HEARTBEAT + 1) : step + 1].any():
            kept[step] = True
    missing = num_frames - int(kept.sum())
    if missing > 0:
        kept[rng.choice(np.flatnonzero(~kept), missing, replace=False)] = True
    shown: Steps = steps[kept][:num_frames]
    return shown


def _padded(scenes: Scenes, things: int) -> Scenes:
    """With places for so many things, of whom the last never come."""
    short = things - scenes.kind.shape[1]
    arrays: dict[str, Any] = {}
    for field in dataclasses.fields(scenes):
        values = getattr(scenes, field.name)
        if field.name in Scenes.BY_THING:
            places = [(0, 0)] * (values.ndim - 1) + [(0, short)]
            values = np.pad(values, places, constant_values=_ABSENT.get(field.name, 0))
        arrays[field.name] = values
    if short:
        frames = scenes.num_frames
        for name in ("enter", "leave"):
            arrays[name][:, -short:] = frames
    return Scenes(**arrays)


_ABSENT = {"kind": -1, "path_key": -1, "told": True}


def _joined(clips: list[Scenes]) -> Scenes:
    arrays: dict[str, Any] = {
        field.name: np.concatenate([getattr(clip, field.name) for clip in clips])
        for field in dataclasses.fields(Scenes)
    }
    return Scenes(**arrays)
