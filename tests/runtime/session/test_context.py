"""What is remembered equals what a fresh prefill of the same frames would give, in every mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from edge_vlm.pixels.frames import Frame
from edge_vlm.pruning.policies import make_policy
from edge_vlm.text.masks import CAUSAL
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.inference.vision import FrameTokens
from edge_vlm_runtime.protocol.settings import Attention, ModelLimits
from edge_vlm_runtime.session.budget import MemoryPlan
from edge_vlm_runtime.session.context import Change, Evicted, Rebased, StreamContext
from edge_vlm_runtime.session.stream_clock import StreamClock
from tests.runtime.cameras.pictures import picture
from tests.tiny import tiny_bundle

QUESTION = "is there a red ball ?"


@pytest.fixture(scope="module")
def engines() -> Iterator[LoadedBundle]:
    with LoadedBundle.open(tiny_bundle(), threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def frames(engines: LoadedBundle) -> list[FrameTokens]:
    return encode(engines, 24)


def encode(engines: LoadedBundle, count: int, interval_s: float = 0.5) -> list[FrameTokens]:
    state, policy = engines.vision.new_state(), make_policy("stream", 0.5)
    return [
        engines.vision.encode(
            Frame(rgb=picture(i), pts_ns=round(i * interval_s * 1e9), seq=i), state, policy
        )
        for i in range(count)
    ]


def context(
    engines: LoadedBundle,
    *,
    attention: Attention = Attention.FRAME,
    window_tokens: int = 300,
    last_n: int = 3,
    max_time_s: float | None = None,
    max_positions: int = 512,
    reserve_tokens: int = 32,
) -> StreamContext:
    limits = ModelLimits.from_bundle(engines.bundle)
    return StreamContext(
        language=engines.language,
        prompt=engines.prompt,
        clock=StreamClock(),
        model=dataclasses.replace(limits, max_time_s=max_time_s, max_positions=max_positions),
        capacity=limits.max_cache_tokens,
        plan=MemoryPlan(
            attention=attention,
            window_tokens=window_tokens,
            last_n=last_n,
            reserve_tokens=reserve_tokens,
        ),
    )


def add(subject: StreamContext, frames: Sequence[FrameTokens]) -> list[Change]:
    subject.add(frames)
    return subject.changes()


def reconfigure(subject: StreamContext, **changes: Any) -> list[Change]:
    subject.reconfigure(dataclasses.replace(subject._plan, **changes))
    return subject.changes()


def logits_after(engines: LoadedBundle, subject: StreamContext) -> np.ndarray:
    """What the model would say first; leaves the arena as it was."""
    with subject.branch() as arena:
        ids = engines.prompt.question_ids(QUESTION)
        return engines.language.prefill(arena, engines.language.embed(ids))


def fresh_logits(
    engines: LoadedBundle,
    frames: Sequence[FrameTokens],
    stamps_s: Sequence[float],
    two_way_between_frames: bool = False,
) -> np.ndarray:
    """The prompt written out by hand and prefilled at once."""
    prompt, language = engines.prompt, engines.language
    embeds, blocks = [language.embed(prompt.bos_ids)], [np.array([CAUSAL])]
    for index, (frame, stamp_s) in enumerate(zip(frames, stamps_s, strict=True)):
        ids = prompt.frame_ids(stamp_s, len(frame.cells), first=index == 0)
        embeds.append(language.embed(ids, frame.embeds))
        block = 0 if two_way_between_frames else index
        blocks.append(np.where(prompt.vision_mask(ids), block, CAUSAL))
    question = prompt.question_ids(QUESTION)
    embeds.append(language.embed(question))
    blocks.append(np.full(len(question), CAUSAL))
    arena = language.new_arena()
    return language.prefill(arena, np.concatenate(embeds), np.concatenate(blocks))


def seconds(frames: Sequence[FrameTokens]) -> list[float]:
    return [frame.pts_ns * 1e-9 for frame in frames]


def test_frame_by_frame_equals_batches_equals_all_at_once(
    engines: LoadedBundle, frames: list[FrameTokens]
) -> None:
    some = frames[:7]
    singly, batched = context(engines), context(engines)
    for frame in some:
        assert add(singly, [frame]) == []
    assert add(batched, some[:1]) == []
    assert add(batched, some[1:]) == []
    expected = fresh_logits(engines, some, seconds(some))
    np.testing.assert_allclose(logits_after(engines, singly), expected, atol=1e-4)
    np.testing.assert_allclose(logits_after(engines, batched), expected, atol=1e-4)
    assert singly.video_tokens == batched.video_tokens == singly.kv_tokens


def test_exact_mode_shows_all_frames_to_each_other(
    engines: LoadedBundle, frames: list[FrameTokens]
) -> None:
    subject = context(engines, attention=Attention.EXACT)
    subject.add(frames[:4])
    expected = fresh_logits(engines, frames[:4], seconds(frames[:4]), two_way_between_frames=True)
    for _ in range(2):  # asking twice changes nothing
        np.testing.assert_allclose(logits_after(engines, subject), expected, atol=1e-4)
    by_frame = fresh_logits(engines, frames[:4], seconds(frames[:4]))
    assert np.abs(expected - by_frame).max() > 1e-3


def test_last_n_is_a_clip_of_the_last_frames(
    engines: LoadedBundle, frames: list[FrameTokens]
) -> None:
    subject = context(engines, attention=Attention.LAST_N, last_n=2)
    subject.add(frames[:6])
    expected = fresh_logits(engines, frames[4:6], seconds(frames[4:6]), two_way_between_frames=True)
    np.testing.assert_allclose(logits_after(engines, subject), expected, atol=1e-4)


def evictions(changes: list[Change]) -> int:
    return sum(change.frames for change in changes if isinstance(change, Evicted))


def test_eviction_takes_the_oldest_frames_and_never_the_anchor(
    engines: LoadedBundle, frames: list[FrameTokens]
) -> None:
    subject = context(engines, window_tokens=60)
    gone = 0
    for count, frame in enumerate(frames, start=1):
        gone += evictions(add(subject, [frame]))
        kept = subject.frame_numbers()
        assert kept[0] == 0
        assert kept[1:] == list(range(count - len(kept) + 1, count))
        assert len(kept) + gone == count
        assert subject.video_tokens == subject.kv_tokens <= 60
    assert gone > 10
    positions = subject._arena.positions
    assert np.all(np.diff(positions) > 0)
    assert positions[-1] > len(positions)  # survivors keep theirs
    assert np.isfinite(logits_after(engines, subject)).all()


def test_batches_larger_than_the_window_are_still_bounded(
    engines: LoadedBundle, frames: list[FrameTokens]
) -> None:
    subject = context(engines, window_tokens=52)
    subject.add(frames[:16])
    assert subject.frame_numbers()[0] == 0
    assert subject.frame_numbers()[-1] == 15
    assert subject.video_tokens == subject.kv_tokens <= 52


def test_used_up_positions_are_counted_anew_without_changing_the_memory(
    engines: LoadedBundle, frames: list[FrameTokens]
) -> None:
    subject = context(engines, window_tokens=100, max_positions=180)
    rebased = 0
    for frame in frames:
        changes = add(subject, [frame])
        if any(isinstance(change, Rebased) for change in changes):
            rebased += 1
            known = [frames[i] for i in subject.frame_numbers()]
            expected = fresh_logits(engines, known, seconds(known))
            np.testing.assert_allclose(logits_after(engines, subject), expected, atol=1e-4)
        assert subject.next_position + 32 <= 180
    assert rebased >= 1
    assert subject.time_offset_s == 0.0


def test_used_up_time_stamps_are_counted_anew(
    engines: LoadedBundle, frames: list[FrameTokens]
) -> None:
    subject = context(engines, max_time_s=4.0)
    offsets = []
    for frame in frames:
        changes = add(subject, [frame])
        offsets += [change.time_offset_s for change in changes if isinstance(change, Rebased)]
        newest = subject.newest
        assert newest is not None
        assert newest.pts_ns * 1e-9 - subject.time_offset_s <= 4.05
    assert len(offsets) >= 2
    assert offsets == sorted(offsets)
    known = [frames[i] for i in subject.frame_numbers()]
    assert len(known) >= 4
    stamps = [0.0, *(second - offsets[-1] for second in seconds(known)[1:])]
    expected = fresh_logits(engines, known, stamps)
    np.testing.assert_allclose(logits_after(engines, subject), expected, atol=2e-4)


def test_sparse_frames_beyond_the_trained_time_do_not_get_stuck(engines: LoadedBundle) -> None:
    subject = context(engines, max_time_s=4.0)
    for frame in encode(engines, 5, interval_s=30.0):
        subject.add([frame])
        newest = subject.newest
        assert newest is not None
        assert newest.pts_ns * 1e-9 - subject.time_offset_s <= 4.05
    assert subject.frame_numbers()[0] == 0


@pytest.mark.parametrize("there", [Attention.EXACT, Attention.LAST_N])
def test_changing_the_mode_and_back_changes_nothing(
    engines: LoadedBundle, frames: list[FrameTokens], there: Attention
) -> None:
    subject = context(engines)
    subject.add(frames[:5])
    before = logits_after(engines, subject)
    for attention in (there, Attention.FRAME):
        changes = reconfigure(
            subject, attention=attention, window_tokens=300, last_n=2, reserve_tokens=32
        )
        assert changes == []
        logits_after(engines, subject)
    np.testing.assert_allclose(logits_after(engines, subject), before, atol=1e-4)
    subject.add(frames[5:6])
    expected = fresh_logits(engines, frames[:6], seconds(frames[:6]))
    np.testing.assert_allclose(logits_after(engines, subject), expected, atol=1e-4)


def test_a_smaller_window_evicts_at_once_and_a_larger_reserve_rebases(
    engines: LoadedBundle, frames: list[FrameTokens]
) -> None:
    subject = context(engines, max_positions=200)
    subject.add(frames[:10])
    changes = reconfigure(
        subject, attention=Attention.FRAME, window_tokens=60, last_n=3, reserve_tokens=32
    )
    assert evictions(changes) > 0
    assert subject.video_tokens == subject.kv_tokens <= 60
    changes = reconfigure(
        subject, attention=Attention.FRAME, window_tokens=60, last_n=3, reserve_tokens=120
    )
    assert any(isinstance(change, Rebased) for change in changes)
    assert subject.next_position + 120 <= 200
