"""Clips of streams as tokens: what was forgotten is not there, and what is left knows its place."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from edge_vlm.errors import ConfigError
from edge_vlm.presets import demo
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm.world.questions import ABSENT, NOT_SEEN, NOT_THERE, vocabulary
from edge_vlm_training.data.packing.batch import NOWHERE, PackedBatch, PackedTokens
from edge_vlm_training.data.sources.world_clips import WorldClips
from edge_vlm_training.recipes.base import Clips
from edge_vlm_training.recipes.catalog import RECIPES
from edge_vlm_training.recipes.overrides import override
from edge_vlm_training.trainer.model_factory import trained_usage
from edge_vlm_training.world.curriculum import NOW_KINDS, QuestionMix
from edge_vlm_training.world.streams import stream_scenes
from edge_vlm_training.world.vocabulary import build_tokenizer

CLIPS = Clips(batch=3, num_frames=6, branches=4, stream_share=1.0, history_share=0.5)


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory) -> list[PackedBatch]:
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    cfg = demo(*build_tokenizer(vocabulary(), path))
    clips = WorldClips(CLIPS, cfg, PromptFormat(Tokenizer.from_file(path)), QuestionMix(1), 3)
    found = [clips.next_batch() for _ in range(6)]
    return [batch for batch in found if isinstance(batch, PackedBatch)]


def everything(batch: PackedBatch) -> PackedTokens:
    return batch.pruned(torch.ones(sum(batch.frames_per_clip), 16, dtype=torch.bool))


def test_some_have_forgotten_and_some_have_not(batches: list[PackedBatch]) -> None:
    assert len(batches) == 6
    assert {any(batch.evicted) for batch in batches} == {False, True}
    assert any(any(batch.gaps) for batch in batches)


def test_forgotten_frames_have_no_tokens(batches: list[PackedBatch]) -> None:
    for batch in batches:
        tokens = everything(batch)
        prefix = (tokens.clip_RS != NOWHERE) & (tokens.branch_RS == NOWHERE)
        seen = torch.zeros(sum(batch.frames_per_clip), dtype=torch.bool)
        seen[tokens.frame_RS[prefix]] = True
        assert torch.equal(seen, ~batch.evicted_F())
        assert seen.sum() == 3 * CLIPS.num_frames
        asked = tokens.branch_RS != NOWHERE
        assert not batch.evicted_F()[tokens.frame_RS[asked]].any()
        assert (
            batch.evicted_F().view(3, -1).sum(1) == torch.tensor(batch.evicted or (0,) * 3)
        ).all()


def test_positions_go_on_behind_the_gap(batches: list[PackedBatch]) -> None:
    for batch in batches:
        closed = everything(dataclasses.replace(batch, gaps=()))
        tokens = everything(batch)
        moved = tokens.positions_RS - closed.positions_RS
        first = torch.arange(3)[:, None] * batch.frames_per_clip[0]
        behind = (tokens.frame_RS > first) & (tokens.clip_RS != NOWHERE)
        gaps = torch.tensor(batch.gaps or (0, 0, 0))[:, None]
        assert torch.equal(moved, behind * gaps)
        for row in range(3):  # without the gap: as if the forgotten frames had never been
            prefix = (closed.branch_RS[row] == NOWHERE) & (closed.clip_RS[row] != NOWHERE)
            assert closed.positions_RS[row][prefix].tolist() == list(range(int(prefix.sum())))
        assert tokens.positions_RS.max() < 768


def test_a_model_of_streams_knows_their_times() -> None:
    recipe = RECIPES["demo_streams"]()
    assert trained_usage(recipe).defaults == {"max_time_s": 60.0}
    assert trained_usage(override(recipe, ["stream_time_s=30"])).defaults == {"max_time_s": 30.0}
    assert trained_usage(RECIPES["demo_present"]()).defaults == {"max_time_s": 8.0}


def test_streams_are_for_models_whose_frames_do_not_see_later_ones() -> None:
    with pytest.raises(ConfigError, match="stream_share it must be frame"):
        override(RECIPES["demo_streams"](), ["attention=all"])


@pytest.mark.parametrize("other", [{"branches": 0}, {"num_frames": 1}])
def test_a_share_of_streams_that_there_would_not_be_is_refused(other: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"stream_share.*questions and two frames"):
        Clips(**{"batch": 2, "num_frames": 4, "stream_share": 0.5, **other})  # type: ignore[arg-type]


@pytest.mark.parametrize("seconds", ["17.5", "1801", "inf"])
def test_streams_have_time_for_their_longest_clip_and_an_end(seconds: str) -> None:
    with pytest.raises(ConfigError, match=r"stream_time_s.*must be in 18..1800"):
        override(RECIPES["demo_streams"](), [f"stream_time_s={seconds}"])


@pytest.mark.parametrize("seconds", [18.0, 1800.0])
def test_the_shortest_and_the_longest_streams_have_clips(seconds: float) -> None:
    scenes = stream_scenes(np.random.default_rng(1), 2, 36, 4, seconds)
    assert scenes.visible.shape[:2] == (2, 36)
    assert scenes.times_s.max() <= seconds


def test_a_share_of_the_questions_is_about_what_is_not_there() -> None:
    scenes = stream_scenes(np.random.default_rng(3), 1, 20, 4, 60.0)
    mix = QuestionMix(1)
    asked = mix.branches(scenes, 0, 400, 0.0, 4, in_stream=True, absent_share=0.25)
    absent = [branch for branch in asked if branch.kind == ABSENT]
    assert 70 < len(absent) < 130
    assert {branch.answer for branch in absent} == {NOT_THERE, NOT_SEEN}
    assert all(4 < branch.frame < 20 for branch in absent)
    # Without its times a clip with a gap is asked about now only.
    cut = mix.branches(scenes, 0, 100, 0.0, 4, absent_share=0.5)
    assert {branch.kind for branch in cut} <= set(NOW_KINDS)
    mix.update([ABSENT, "name"], [True, True])
    assert mix.accuracy[ABSENT] == mix.accuracy["name"] > 0
    assert ABSENT not in mix.weights()
