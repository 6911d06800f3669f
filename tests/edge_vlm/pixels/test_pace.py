"""A camera that is faster than the decoder, on a clock of our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from edge_vlm.pixels.film.pace import Pace, Skip


@dataclass
class Run:
    ages_s: list[tuple[float, float]] = field(default_factory=list)
    """When a picture was decoded, and how old it was then."""
    decoded: list[int] = field(default_factory=list)
    skipped: int = 0
    told_s: list[float] = field(default_factory=list)
    """When the camera saw each decoded picture, as the pace has it."""


def watch(
    *,
    rate: float,
    cost_s: float,
    seconds: float = 60.0,
    key_every: int = 60,
    referenced: Callable[[int], bool] = lambda number: True,
    camera_rate: float | None = None,
    arrives: Callable[[float], float] = lambda seen_s: seen_s,
) -> Run:
    """Decodes a camera's pictures one by one. `cost_s`: of one picture; `camera_rate`: what its
    clock claims; `arrives`: when what is seen then gets here."""
    pace, run, now_s = Pace(), Run(), 100.0
    for number in range(int(seconds * rate)):
        seen_s = number / rate
        camera_s = number / (camera_rate or rate)
        waited_s = max(arrives(seen_s) + 100.0 - now_s, 0.0)
        now_s += waited_s + 1e-4
        is_key = number % key_every == 0
        if not pace.takes(camera_s, is_key, now_s, waited_s):
            run.skipped += 1
            continue
        if pace.skip is Skip.UNREFERENCED and not referenced(number):
            run.skipped += 1
            continue
        run.told_s.append(pace.captured_s(camera_s) - 100.0)
        now_s += cost_s
        run.decoded.append(number)
        run.ages_s.append((now_s - 100.0, now_s - 100.0 - seen_s))
    return run


def oldest(run: Run, after_s: float = 10.0) -> float:
    return max(age_s for now_s, age_s in run.ages_s if now_s > after_s)


def test_a_decoder_that_keeps_up_skips_nothing() -> None:
    run = watch(rate=30, cost_s=0.02)
    assert run.skipped == 0
    assert oldest(run) < 0.05


@pytest.mark.parametrize("key_every", [1, 30, 60])
def test_pictures_do_not_grow_older_than_a_moment(key_every: int) -> None:
    """4K at 60 a second on a core that decodes 37: 12.9 s old after 24 s, where nothing skips."""
    run = watch(rate=60, cost_s=1 / 37, key_every=key_every)
    assert run.skipped > 0
    assert oldest(run) < 2.0
    assert max(b - a for (a, _), (b, _) in zip(run.ages_s, run.ages_s[1:], strict=False)) < 2.0


def test_leaving_out_what_nothing_builds_upon_may_be_enough() -> None:
    run = watch(rate=60, cost_s=1 / 45, key_every=600, referenced=lambda n: n % 2 == 0)
    assert oldest(run) < 1.0
    assert len(run.decoded) > 30 * 30  # no group of pictures is lost


def test_after_a_gap_decoding_begins_with_a_key_picture() -> None:
    run = watch(rate=60, cost_s=1 / 20, key_every=48)
    for before, number in zip(run.decoded, run.decoded[1:], strict=False):
        assert number == before + 1 or number % 48 == 0


def test_capture_times_are_those_of_the_camera() -> None:
    run = watch(rate=60, cost_s=1 / 37)
    for number, told_s in zip(run.decoded, run.told_s, strict=True):
        assert told_s == pytest.approx(number / 60, abs=0.1)


@pytest.mark.parametrize("camera_rate", [15.0, 24.0, 25.0, 29.9, 30.1, 60.0])
def test_a_camera_whose_clock_is_wrong_is_not_skipped(camera_rate: float) -> None:
    run = watch(rate=30, cost_s=0.01, camera_rate=camera_rate, seconds=300)
    assert run.skipped == 0
    told = [told_s - number / 30 for number, told_s in zip(run.decoded, run.told_s, strict=True)]
    assert max(map(abs, told)) < 6.0  # and is never trusted for long


def test_a_network_that_pauses_is_caught_up_with() -> None:
    def arrives(seen_s: float) -> float:
        return max(seen_s, 23.0) if seen_s > 20.0 else seen_s

    run = watch(rate=30, cost_s=0.005, arrives=arrives)
    assert oldest(run, 25.0) < 0.1
