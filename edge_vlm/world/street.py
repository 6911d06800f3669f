"""An endless street of the world's things: who comes, stays and goes, at any moment of any day.

A street is a function of its seed alone, and any moment of it can be asked for without those
before: time is cut into minutes of 64 seconds, each drawn from its own random numbers, and one
thing that stands still bridges each cut. One to five things are there at once, no two of a kind or
of a colour, and none returns before everybody of its minute is gone.

Times are in seconds from the street's beginning. A step is half a second, as in the clips that the
demo model was trained on; at other moments things are on their way between two steps.

Shapes: T frames, M things.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_vlm.pixels.frames import Rgb
from edge_vlm.world.draw import draw
from edge_vlm.world.scenes import COLOUR_NAMES, NOISE_KEYS, UNCLEAR, Scenes
from edge_vlm.world.sprites import KINDS
from edge_vlm.world.street_traffic import MINUTE, STEP_S, Thing, keeper, traffic
from edge_vlm.world.textures import GRID, NUM_BACKGROUNDS

MOST_SEED = 2**32 - 1
MOST_TIME_S = 1e9
PICTURE_SIDE = 192
"""Pixels: twice what the demo model reads, so that JPEG's coarse colour is harmless."""

_SEED = 40_961
_LOOK, _MOMENT = 0, 1


class Street:
    """One of them. Safe to share between threads."""

    def __init__(self, seed: int) -> None:
        """Raises ValueError for a seed that is not in 0..MOST_SEED."""
        if not 0 <= seed <= MOST_SEED:
            raise ValueError(f"the seed of a street must be in 0..{MOST_SEED}, got {seed}")
        self.seed = seed
        rng = np.random.default_rng([_SEED, seed, _LOOK])
        self._background = int(rng.integers(NUM_BACKGROUNDS))
        self._noise_sd = rng.uniform(2.5, 5.5)

    def things(self, first_s: float, last_s: float) -> list[Thing]:
        """Those that are there at some moment of a time, in the order in which they come."""
        first, last = first_s / STEP_S, last_s / STEP_S
        numbers = range(int(first // MINUTE), int(last // MINUTE) + 1)
        found = [thing for number in numbers for thing in traffic(self.seed, number)]
        found.append(keeper(self.seed, numbers[-1] + 1))  # comes before its own minute
        there = [thing for thing in found if thing.enter <= last and thing.leave > first]
        return sorted(there, key=lambda thing: (thing.enter, thing.kind))

    def scenes(self, start_s: float, num_frames: int, fps: float = 1 / STEP_S) -> Scenes:
        """One clip of the street: what `questions` asks about and `draw` shows.

        `enter` is 0 for what was there before.
        Raises ValueError for a time that is not in 0..MOST_TIME_S.
        """
        return self.scenes_at(start_s + np.arange(num_frames) / fps)

    def scenes_at(self, times_s: npt.NDArray[np.floating]) -> Scenes:
        """The same at any moments, one behind the other, [T]: of what came and went between two of
        them nothing is told."""
        if not (times_s[0] >= 0 and times_s[-1] <= MOST_TIME_S):
            raise ValueError(f"a street's time must be in 0..{MOST_TIME_S:g} s, got {times_s[0]}")
        num_frames = len(times_s)
        steps = np.round(times_s / STEP_S, 6)  # a third of a second is a whole step after three
        things = self._seen_at(steps)
        enter = np.searchsorted(steps, [thing.enter for thing in things])
        leave = np.searchsorted(steps, [thing.leave for thing in things])
        centre = np.stack([thing.centre(steps) for thing in things], 1) / GRID  # [T, M, 2]
        now = np.arange(num_frames)[:, None]
        headings = [[thing.direction(step) for thing in things] for step in steps.tolist()]
        moments = [self._moment(time_s) for time_s in times_s.tolist()]
        shape = (1, len(things))
        return Scenes(
            kind=np.array([[thing.kind for thing in things]]),
            colour=np.tile([thing.colour for thing in things], (1, num_frames, 1)),
            x=centre[None, ..., 0].astype(np.float32),
            y=centre[None, ..., 1].astype(np.float32),
            size=np.array([[thing.side / GRID for thing in things]], np.float32),
            visible=((now >= enter) & (now < leave))[None],
            enter=enter[None],
            leave=leave[None],
            direction=np.array(
                [[[UNCLEAR if each is None else each for each in row] for row in headings]]
            ),
            speed=np.zeros(shape, np.float32),
            path_key=np.full(shape, -1),
            background=np.full((1, num_frames), self._background),
            shake=(np.array([[shake for shake, _, _ in moments]]) / GRID).astype(np.float32),
            pan=np.zeros((1, num_frames, 2), np.float32),
            noise_sd=np.array([self._noise_sd], np.float32),
            noise_key=np.array([[key for _, key, _ in moments]]),
            brightness=np.array([[brightness for _, _, brightness in moments]], np.float32),
            times_s=times_s[None].astype(np.float32),
            told=np.ones(shape, bool),
        )

    def _seen_at(self, steps: npt.NDArray[np.float64]) -> list[Thing]:
        """Those that are there at one of these steps or more, in the order in which they come."""
        minutes = sorted({int(step // MINUTE) for step in steps})
        found = [thing for number in minutes for thing in traffic(self.seed, number)]
        found += [keeper(self.seed, number + 1) for number in minutes]
        there = {
            (thing.enter, thing.kind): thing  # a keeper belongs to two minutes
            for thing in found
            if ((thing.enter <= steps) & (steps < thing.leave)).any()
        }
        return [there[key] for key in sorted(there)]

    def picture(self, time_s: float, side: int = PICTURE_SIDE) -> Rgb:
        """What is to be seen then, u8 [side, side, 3]. Raises ValueError as `scenes`."""
        return draw(self.scenes(time_s, 1), 0, 0, side)

    def seen(self, time_s: float) -> list[tuple[str, str]]:
        """Colour and name of what is there then, in the order of colours: what a caption says."""
        things = sorted(self.things(time_s, time_s), key=lambda thing: thing.colour)
        return [(COLOUR_NAMES[thing.colour], KINDS[thing.kind]) for thing in things]

    def _moment(self, time_s: float) -> tuple[list[int], int, float]:
        """Of one picture: shift in grid units as (x, y), noise picture, brightness."""
        rng = np.random.default_rng([_SEED, self.seed, _MOMENT, round(time_s * 1000)])
        shakes = rng.random() < 0.5
        shake = (rng.integers(-1, 2, 2) * shakes).tolist()
        return shake, int(rng.integers(NOISE_KEYS)), float(rng.uniform(0.96, 1.04))
