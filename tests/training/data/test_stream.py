"""The stream is a function of its seed: resumed, dealt out or made ahead, it is the same."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter

import pytest
import torch

from edge_vlm.config import VisionAttention
from edge_vlm.errors import (
    CheckpointError,
    DataError,
    RecordTooLong,
    VideoUnreadable,
)
from edge_vlm_training.data.packing.batch import PackedBatch, PackedTokens
from edge_vlm_training.data.packing.row_stream import PackingConfig
from edge_vlm_training.data.packing.stream import PackedStream, merge_states
from edge_vlm_training.data.packing.trees import TreeBuilder
from edge_vlm_training.data.prefetch import Prefetch
from edge_vlm_training.data.sample import Pictures, Sample
from edge_vlm_training.data.sources.mixture import Mixture, Share
from tests.training.data.trees import SMALL, Clips, clip, config, mixture, prompt

MIXED = dataclasses.replace(SMALL, keep_ratio=(1.0, 0.5, 0.2), min_cells=(0, 2))


def stream(
    *,
    mix: Mixture | None = None,
    lanes: tuple[int, ...] = (0,),
    num_lanes: int = 1,
    packing: PackingConfig = MIXED,
    rows_per_batch: int | None = None,
    skip_bad: bool = False,
    report: list[str] | None = None,
    threads: int = 0,
) -> PackedStream:
    said: list[str] = []
    return PackedStream(
        mix or mixture(),
        prompt(),
        config(),
        packing,
        lanes=lanes,
        num_lanes=num_lanes,
        rows_per_batch=rows_per_batch,
        skip_bad=skip_bad,
        report=(said if report is None else report).append,
        threads=threads,
    )


def take(batches: PackedStream | Prefetch, count: int) -> list[PackedBatch]:
    taken = []
    for batch in itertools.islice(iter(batches), count):
        assert isinstance(batch, PackedBatch)
        taken.append(batch)
    return taken


def assert_same(one: PackedBatch, other: PackedBatch) -> None:
    assert one.clip_names == other.clip_names
    assert (one.keep_ratio, one.min_cells) == (other.keep_ratio, other.min_cells)
    assert torch.equal(one.frames_FSS3, other.frames_FSS3)
    for field in dataclasses.fields(PackedTokens):
        assert torch.equal(getattr(one.tokens, field.name), getattr(other.tokens, field.name))


def test_same_seed_same_batches_and_another_seed_others() -> None:
    first, again = take(stream(), 4), take(stream(threads=2), 4)
    for one, other in zip(first, again, strict=True):
        assert_same(one, other)
    others = take(stream(mix=mixture(seed=1)), 4)
    assert [b.clip_names for b in others] != [b.clip_names for b in first]


@pytest.mark.parametrize("after", [1, 3])
def test_resumed_stream_goes_on_with_the_next_batch(after: int) -> None:
    whole = take(stream(lanes=(0, 1), num_lanes=2), 6)
    broken_off = stream(lanes=(0, 1), num_lanes=2)
    take(broken_off, after)
    state = json.loads(json.dumps(broken_off.state_dict()))
    resumed = stream(lanes=(0, 1), num_lanes=2)
    resumed.load_state_dict(state)
    for one, other in zip(whole[after:], take(resumed, 6 - after), strict=True):
        assert_same(one, other)
    for one, other in zip(whole[after:], take(broken_off, 6 - after), strict=True):
        assert_same(one, other)


def test_two_processes_see_the_rows_of_one() -> None:
    together = stream(lanes=(0, 1), num_lanes=2)
    apart = [stream(lanes=(lane,), num_lanes=2) for lane in (0, 1)]
    for batch in take(together, 3):
        rows = [take(lane, 1)[0] for lane in apart]
        names = [row.clip_names for row in rows]
        assert batch.clip_names == names[0] + names[1]
        assert {row.keep_ratio for row in rows} == {batch.keep_ratio}
        for number, row in enumerate(rows):
            ids = row.tokens.ids_RS[0]
            assert torch.equal(batch.tokens.ids_RS[number, : len(ids)], ids)
    merged = merge_states([lane.state_dict() for lane in apart])
    assert merged == together.state_dict()
    alone = stream(lanes=(1,), num_lanes=2)
    alone.load_state_dict(merged)
    assert_same(take(alone, 1)[0], take(apart[1], 1)[0])


def test_lanes_take_turns_inside_a_step() -> None:
    one = stream(lanes=(0, 1), num_lanes=2, rows_per_batch=1)
    both = stream(lanes=(0, 1), num_lanes=2)
    for batch in take(both, 2):
        parts = take(one, 2)
        assert batch.clip_names == parts[0].clip_names + parts[1].clip_names
        assert {part.keep_ratio for part in parts} == {batch.keep_ratio}


def test_every_branch_comes_exactly_once() -> None:
    packing = dataclasses.replace(SMALL, keep_ratio=(1.0,), window=4)
    batches = stream(packing=packing)
    met: Counter[str] = Counter()
    branches: Counter[str] = Counter()
    for batch in take(batches, 30):
        met.update(set(batch.clip_names))
        counts = torch.zeros(len(batch.clip_names), dtype=torch.int64)
        numbers = torch.stack([batch.tokens.clip_RS[0], batch.tokens.branch_RS[0]], 1)
        pairs = {(clip, branch) for clip, branch in numbers.tolist()}
        for clip_number, branch in pairs:
            if clip_number >= 0 and branch >= 0:
                counts[clip_number] += 1
        for name, count in zip(batch.clip_names, counts.tolist(), strict=True):
            branches[name] += count
        assert int(batch.tokens.lengths_R.max()) <= packing.max_tokens
        assert len(batch.frames_FSS3) <= packing.max_frames
    state = batches.state_dict()["lanes"]["0"]
    waiting = {f"{source} {number}" for source, number, _ in state["window"]}
    sources = {"a": Clips("a"), "b": Clips("b")}
    for name, count in branches.items():
        source, number = name.split()
        if name not in waiting:
            assert count == len(sources[source].sample(int(number)).branches)
    drawn = {f"{source} {n}" for source, taken in state["taken"].items() for n in range(taken)}
    assert set(branches) | waiting == drawn
    shares = {source: taken / state["draws"] for source, taken in state["taken"].items()}
    assert 0.5 < shares["a"] < 0.85


def test_prefetched_batches_are_the_same_and_resume_where_they_were_taken() -> None:
    whole = take(stream(), 5)
    with Prefetch(stream(), depth=2) as ahead:
        for one, other in zip(whole[:2], take(ahead, 2), strict=True):
            assert_same(one, other)
        state = json.loads(json.dumps(ahead.state_dict()))
        assert_same(whole[2], take(ahead, 1)[0])
    with Prefetch(stream(), depth=3) as resumed:
        resumed.load_state_dict(state)
        for one, other in zip(whole[2:], take(resumed, 3), strict=True):
            assert_same(one, other)


@dataclasses.dataclass(frozen=True)
class Broken(Clips):
    """Every third clip cannot be decoded, every third cannot even be opened."""

    all_of_them: bool = False

    def sample(self, number: int) -> Sample:
        sample = super().sample(number)
        if self.all_of_them or number % 3 == 1:
            raise VideoUnreadable("not a video", where=f"bad.jsonl:{number}")
        if number % 3 == 2:

            def load(side: int) -> Pictures:
                raise VideoUnreadable("breaks off", where=f"bad.jsonl:{number}")

            return dataclasses.replace(sample, load=load)
        return sample


def test_bad_record_stops_the_stream() -> None:
    def broken() -> PackedStream:
        return stream(mix=Mixture([Share(Broken(), 1)], seed=0))

    with pytest.raises(VideoUnreadable, match=r"bad\.jsonl:1"):
        take(broken(), 1)
    with Prefetch(broken()) as ahead, pytest.raises(VideoUnreadable, match=r"bad\.jsonl:1"):
        take(ahead, 1)


def test_bad_records_are_skipped_counted_and_reported_only_if_asked() -> None:
    said: list[str] = []
    broken = stream(mix=Mixture([Share(Broken(), 1)], seed=0), skip_bad=True, report=said)
    batches = take(broken, 6)
    names = {name for batch in batches for name in batch.clip_names}
    assert names
    assert all(int(name.split()[1]) % 3 == 0 for name in names)
    assert len(said) == len(broken.skipped) >= 6
    assert all(line.startswith("skipped: E-VIDEO-UNREADABLE") for line in said)
    resumed = stream(mix=Mixture([Share(Broken(), 1)], seed=0), skip_bad=True)
    resumed.load_state_dict(broken.state_dict())
    assert resumed.skipped == broken.skipped
    assert_same(take(resumed, 1)[0], take(broken, 1)[0])


@dataclasses.dataclass(frozen=True)
class TwoClips(Clips):
    """A good clip and one that cannot be opened, in turn."""

    def sample(self, number: int) -> Sample:
        if number % 2:
            raise VideoUnreadable("not a video", where="bad.jsonl:2")
        return super().sample(0)


def test_a_bad_record_is_counted_whenever_it_is_met_but_reported_once() -> None:
    said: list[str] = []
    half = stream(mix=Mixture([Share(TwoClips(), 1)], seed=0), skip_bad=True, report=said)
    take(half, 4)
    assert len(said) == 1
    assert half.skipped["bad.jsonl:2"] >= 4


def test_nothing_but_bad_records_is_an_error_even_then() -> None:
    broken = stream(mix=Mixture([Share(Broken(all_of_them=True), 1)], seed=0), skip_bad=True)
    with pytest.raises(DataError, match="in a row are bad"):
        take(broken, 1)


@pytest.mark.parametrize(
    "packing",
    [dataclasses.replace(SMALL, max_tokens=20), dataclasses.replace(SMALL, max_frames=1)],
)
def test_what_does_not_fit_a_row_is_named(packing: PackingConfig) -> None:
    small = stream(packing=packing)
    with pytest.raises(RecordTooLong, match=r"\((a|b) \d+\)"):
        take(small, 1)


def test_a_question_in_mid_clip_is_refused_where_frames_see_later_ones() -> None:
    cfg = config(VisionAttention.ALL)
    asks = PackedStream(mixture(at_end=False), prompt(), cfg, SMALL)
    with pytest.raises(DataError, match="would see later frames"):
        take(asks, 1)


def test_a_word_that_the_vocabulary_lacks_is_not_learned_as_unknown() -> None:
    sample = clip("x", 1, 1)
    odd = dataclasses.replace(sample.branches[0], answer="a zebra")
    builder = TreeBuilder(prompt(), VisionAttention.FRAME)
    with pytest.raises(DataError, match=r"lacks in .*'a zebra' \(x\)"):
        builder.build(dataclasses.replace(sample, branches=(odd,)))


def test_another_streams_state_is_refused() -> None:
    state = stream().state_dict()
    with pytest.raises(CheckpointError, match="packing differs"):
        stream(packing=SMALL).load_state_dict(state)
    with pytest.raises(CheckpointError, match="seed differs"):
        stream(mix=mixture(seed=5)).load_state_dict(state)
    with pytest.raises(CheckpointError, match="num_lanes differs"):
        stream(lanes=(1,), num_lanes=2).load_state_dict(state)
    two = stream(lanes=(0,), num_lanes=2).state_dict()
    with pytest.raises(CheckpointError, match=r"no lanes \[1\]"):
        stream(lanes=(1,), num_lanes=2).load_state_dict(two)
    with pytest.raises(CheckpointError):
        stream().load_state_dict({})


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="lanes"):
        stream(lanes=(2,), num_lanes=2)
    with pytest.raises(ValueError, match="rows_per_batch"):
        stream(lanes=(0, 1), num_lanes=2, rows_per_batch=3)
    with pytest.raises(ValueError, match="keep_ratio"):
        PackingConfig(keep_ratio=(0.0,))
    with pytest.raises(ValueError, match="weight of x"):
        Mixture([Share(Clips("x"), 0.0)], seed=0)
    with pytest.raises(ValueError, match="different names"):
        Mixture([Share(Clips("x"), 1.0), Share(Clips("x"), 1.0)], seed=0)


def test_clip_is_the_same_for_the_same_name() -> None:
    assert (clip("x", 2, 3).load(6) == clip("x", 2, 3).load(6)).all()
