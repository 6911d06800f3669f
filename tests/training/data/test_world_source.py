"""The rendered world as a source; the examples of the documentation as records."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from edge_vlm.world.scenes import WorldConfig
from edge_vlm_training.data.sample import LAST, Sample
from edge_vlm_training.data.schema import KINDS, parse_record
from edge_vlm_training.data.sources.world_source import WorldSource

DOCS = Path(__file__).parents[3] / "docs" / "training-data.md"


def source(seed: int = 0, *, at_end: bool = False) -> WorldSource:
    return WorldSource(WorldConfig(), seed=seed, num_frames=(1, 4, 6), branches=5, at_end=at_end)


def content(sample: Sample) -> tuple[object, ...]:
    return (sample.name, sample.times_s.tolist(), sample.branches, sample.load(24).tobytes())


def test_a_clip_is_a_function_of_seed_and_number() -> None:
    first = [content(source().sample(number)) for number in (0, 7, 123_456)]
    assert [content(source().sample(number)) for number in (0, 7, 123_456)] == first
    assert len({pictures for *_, pictures in first}) == 3
    assert content(source(1).sample(0)) != first[0]


def test_clips_have_the_lengths_and_branches_asked_for() -> None:
    samples = [source().sample(number) for number in range(12)]
    assert {len(sample.times_s) for sample in samples} == {1, 4, 6}
    for sample in samples:
        pictures = sample.load(24)
        assert pictures.shape == (len(sample.times_s), 24, 24, 3)
        assert pictures.dtype == np.uint8
        assert len(sample.branches) == 5
    assert any(branch.frame != LAST for sample in samples for branch in sample.branches)


def test_questions_can_all_come_at_the_end() -> None:
    for number in range(6):
        sample = source(at_end=True).sample(number)
        assert {branch.frame for branch in sample.branches} == {LAST}


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="num_frames"):
        WorldSource(WorldConfig(), seed=0, num_frames=())
    with pytest.raises(ValueError, match="branches"):
        WorldSource(WorldConfig(), seed=0, branches=0)


def test_the_documented_record_is_one_of_every_kind() -> None:
    (block,) = re.findall(r"```json\n(.*?)```", DOCS.read_text(), re.DOTALL)
    record = parse_record(json.dumps(json.loads(block)), "docs")
    assert {annotation.kind for annotation in record.annotations} == set(KINDS)
