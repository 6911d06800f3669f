"""Computing changed cells only: all of them is the whole stem, and a clip is its frames in turn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from edge_vlm.config import ModelConfig, Rescale
from edge_vlm.model.reuse import StemState, new_state, reuse_clips, reuse_step
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import tiny

FRAMES = 5
FIRST = torch.tensor([True, False, False, False, False])


def configs() -> dict[str, ModelConfig]:
    learned = tiny()
    assert learned.scorer is not None
    by_row = replace(learned, scorer=replace(learned.scorer, rescale=Rescale.ROW))
    return {"frame": learned, "row": by_row, "change": learned.scored_by_change()}


@pytest.fixture(scope="module", params=["frame", "row", "change"])
def model(request: pytest.FixtureRequest) -> VideoLM:
    cfg = configs()[request.param]
    return VideoLM(cfg).init_weights(torch.Generator().manual_seed(1)).eval()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    cfg = tiny().vision
    generator = torch.Generator().manual_seed(2)
    return torch.randn(FRAMES, cfg.num_patches, cfg.patch_dim, generator=generator)


@pytest.fixture(scope="module")
def computed() -> Tensor:
    """A whole frame, some of one, one that does not change at all, a whole one, another part."""
    some = torch.rand(FRAMES, tiny().vision.num_cells, generator=torch.manual_seed(3)) < 0.4
    some[0] = some[3] = True
    some[2] = False
    return some


def close(actual: Tensor | None, expected: Tensor | None) -> None:
    assert actual is not None
    assert expected is not None
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def whole(model: VideoLM, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Hidden states and scores without reuse."""
    if model.scorer is None:
        return model.change_stem(pixels)[0], None
    nobody = torch.zeros(1, model.cfg.vision.num_cells, model.cfg.vision.width)
    hidden, _, scores = model.vit_stem(pixels, nobody, FIRST[: len(pixels)])
    return hidden, scores


def step(
    model: VideoLM, pixels_NP: Tensor, cells_C: Tensor, state: StemState, first: bool
) -> tuple[Tensor | None, StemState]:
    cells = cells_C.nonzero().squeeze(1)
    if not len(cells):
        return state.resting_1C, state
    changed = pixels_NP[model.vit.cell_patches_C9[cells]]
    return reuse_step(model, changed, cells, torch.tensor([first]), state)


@torch.no_grad()
def test_computing_every_cell_is_the_whole_stem(model: VideoLM, pixels: Tensor) -> None:
    everything = torch.ones(FRAMES, model.cfg.vision.num_cells, dtype=torch.bool)
    hidden, scores = whole(model, pixels)
    clips = reuse_clips(model, pixels, everything, FIRST)
    close(clips.hidden_FND, hidden)
    state = new_state(model.cfg)
    for i in range(FRAMES):
        seen, state = step(model, pixels[i], everything[i], state, i == 0)
        close(state.hidden_1ND[0], hidden[i])
        if scores is not None:
            assert seen is not None
            assert clips.scores_FC is not None
            close(seen[0], scores[i])
            close(clips.scores_FC[i], scores[i])
    if model.scorer is None:
        scored = model.vit.cells(model.change_stem(pixels)[1])
        close(clips.scored_FCWD, scored)
        assert state.scored_1ND is not None
        close(model.vit.cells(state.scored_1ND)[0], scored[-1])


@torch.no_grad()
def test_a_clip_at_once_is_its_frames_one_by_one(
    model: VideoLM, pixels: Tensor, computed: Tensor
) -> None:
    clips, state = reuse_clips(model, pixels, computed, FIRST), new_state(model.cfg)
    for i in range(FRAMES):
        scores, state = step(model, pixels[i], computed[i], state, i == 0)
        close(state.hidden_1ND[0], clips.hidden_FND[i])
        if model.scorer is not None:
            assert scores is not None
            assert clips.scores_FC is not None
            close(scores[0], clips.scores_FC[i])
    assert torch.equal(clips.hidden_FND[1], clips.hidden_FND[2])


@torch.no_grad()
def test_unchanged_cells_keep_their_states_and_changed_ones_see_the_whole_frame(
    model: VideoLM, pixels: Tensor
) -> None:
    everything = torch.ones(model.cfg.vision.num_cells, dtype=torch.bool)
    part = torch.zeros_like(everything)
    part[[2, 7]] = True
    _, before = step(model, pixels[0], everything, new_state(model.cfg), first=True)
    _, other = step(model, pixels[1], everything, new_state(model.cfg), first=True)
    _, after = step(model, pixels[3], part, before, first=False)
    _, elsewhere = step(model, pixels[3], part, other, first=False)
    patches = model.vit.cell_patches_C9
    old, new = before.hidden_1ND[0], after.hidden_1ND[0]
    assert torch.equal(new[patches[~part]], old[patches[~part]])
    assert (new[patches[part]] - old[patches[part]]).abs().max() > 1e-2
    assert (new - elsewhere.hidden_1ND[0])[patches[part]].abs().max() > 1e-3
    for mine, kept in zip(after.keys + after.values, before.keys + before.values, strict=True):
        assert torch.equal(mine[patches[~part]], kept[patches[~part]])


@torch.no_grad()
def test_a_cell_that_rests_scores_as_one_that_was_computed_twice(pixels: Tensor) -> None:
    """The scorer compares it with itself, without being run for it."""
    model = VideoLM(tiny()).init_weights(torch.Generator().manual_seed(1)).eval()
    everything = torch.ones(model.cfg.vision.num_cells, dtype=torch.bool)
    _, state = step(model, pixels[0], everything, new_state(model.cfg), first=True)
    twice, _ = step(model, pixels[0], everything, state, first=False)
    close(state.resting_1C, twice)


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_several_frames_at_once_go_on_from_what_was_kept(
    model: VideoLM, pixels: Tensor, computed: Tensor, cut: int
) -> None:
    """A burst behind single frames, also one in which nothing changes at first."""
    whole_clip = reuse_clips(model, pixels, computed, FIRST)
    before = reuse_clips(model, pixels[:cut], computed[:cut], FIRST[:cut])
    burst = reuse_clips(model, pixels[cut:], computed[cut:], FIRST[cut:], before.state)
    close(burst.hidden_FND, whole_clip.hidden_FND[cut:])
    if model.scorer is not None:
        close(burst.scores_FC, None if whole_clip.scores_FC is None else whole_clip.scores_FC[cut:])
    state = new_state(model.cfg)
    for i in range(FRAMES):
        _, state = step(model, pixels[i], computed[i], state, i == 0)
    for found, expected in (
        (burst.state.hidden_1ND, state.hidden_1ND),
        (torch.stack(burst.state.keys), torch.stack(state.keys)),
        (torch.stack(burst.state.values), torch.stack(state.values)),
    ):
        close(found, expected)
    kept = before.state.cells_1CD, before.state.resting_1C, before.state.scored_1ND
    assert [each is None for each in kept] == [model.scorer is None] * 2 + [
        model.cfg.change is None
    ]


@torch.no_grad()
def test_a_burst_in_which_nothing_changes_is_what_was_kept(model: VideoLM, pixels: Tensor) -> None:
    everything = torch.ones(1, model.cfg.vision.num_cells, dtype=torch.bool)
    before = reuse_clips(model, pixels[:1], everything, FIRST[:1])
    nothing = torch.zeros(2, model.cfg.vision.num_cells, dtype=torch.bool)
    still = reuse_clips(model, pixels[1:3], nothing, FIRST[1:3], before.state)
    close(still.hidden_FND, before.hidden_FND.expand_as(still.hidden_FND))
    with pytest.raises(ValueError, match="first frame"):
        reuse_clips(model, pixels[1:3], nothing, FIRST[1:3])


def test_clips_end_to_end_do_not_see_each_other(model: VideoLM, pixels: Tensor) -> None:
    computed = torch.zeros(FRAMES, model.cfg.vision.num_cells, dtype=torch.bool)
    computed[[0, 3]] = True
    computed[[1, 4], 5] = True
    starts = torch.tensor([True, False, False, True, False])
    with torch.no_grad():
        together = reuse_clips(model, pixels, computed, starts)
        alone = reuse_clips(model, pixels[3:], computed[3:], starts[3:])
    close(together.hidden_FND[3:], alone.hidden_FND)
    computed[3, 0] = False
    with pytest.raises(ValueError, match="first frame"):
        reuse_clips(model, pixels, computed, starts)


def test_what_is_kept_learns_nothing_from_those_that_attend_to_it(pixels: Tensor) -> None:
    cfg = configs()["change"]
    model = VideoLM(cfg).init_weights(torch.Generator().manual_seed(1))
    computed = torch.zeros(2, cfg.vision.num_cells, dtype=torch.bool)
    computed[0], computed[1, 4] = True, True
    x = pixels[:2].clone().requires_grad_()
    hidden = reuse_clips(model, x, computed, FIRST[:2]).hidden_FND
    hidden[1][model.vit.cell_patches_C9[4]].square().sum().backward()
    assert x.grad is not None
    assert x.grad[1].abs().max() > 0
    assert x.grad[0].abs().max() == 0


def test_the_gradient_of_whole_frames_is_that_of_the_whole_stem(
    model: VideoLM, pixels: Tensor
) -> None:
    everything = torch.ones(FRAMES, model.cfg.vision.num_cells, dtype=torch.bool)
    found = []
    for reused in (False, True):
        x = pixels.clone().requires_grad_()
        if reused:
            hidden = reuse_clips(model, x, everything, FIRST).hidden_FND
        else:
            hidden = whole(model, x)[0]
        hidden.square().mean().backward()
        assert x.grad is not None
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-6)


def test_a_model_without_scores_has_nothing_to_reuse() -> None:
    with pytest.raises(ValueError, match="without a scorer"):
        new_state(replace(tiny(), scorer=None))
