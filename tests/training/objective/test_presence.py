"""Labels of what is there now agree with the scenes, cell by cell and frame by frame."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from edge_vlm.world.sampling import sample_scenes
from edge_vlm.world.scenes import Scenes, WorldConfig
from edge_vlm_training.objective.probes.dense import CELL_COVERED, things_at
from edge_vlm_training.objective.probes.presence import NOTHING, Present, present, present_loss
from edge_vlm_training.objective.probes.timeline import UNKNOWN
from edge_vlm_training.world.render import render_with_owner

GRID = 4
FRAMES = 9


def _labelled(shown: list[int]) -> tuple[Scenes, torch.Tensor, Present]:
    scenes = sample_scenes(5, 6, WorldConfig(num_frames=FRAMES, crowded=1.0, early_leave=0.8))
    owner = render_with_owner(scenes)[1]
    labels = present(scenes, owner, GRID, CELL_COVERED, np.array(shown))
    thing, empty = things_at(owner[:, shown], scenes.kind.shape[1], GRID, CELL_COVERED)
    return scenes, thing.masked_fill(empty, -1).view(6, len(shown), GRID**2), labels


def test_frames_tell_what_is_there() -> None:
    shown = [0, *range(3, FRAMES)]
    scenes, _, labels = _labelled(shown)
    row = 0
    for clip in range(6):
        for t in shown:
            here = np.flatnonzero(scenes.visible[clip, t])
            assert labels.count[row] == len(here)
            colours = np.flatnonzero(labels.colours[row].numpy())
            assert colours.tolist() == sorted(scenes.colour[clip, t, here])
            row += 1
    assert row == len(labels.count)
    assert labels.count.max() > 2


def test_a_bare_cell_tells_what_was_seen_there_last() -> None:
    shown = [0, *range(3, FRAMES)]
    scenes, thing, labels = _labelled(shown)
    last, gone = (x.view(6, len(shown), GRID**2) for x in (labels.last, labels.gone))
    emptied = 0
    for clip, step, cell in np.ndindex(6, len(shown), GRID**2):
        if thing[clip, step, cell] >= 0:
            assert last[clip, step, cell] == gone[clip, step, cell] == UNKNOWN
            continue
        before = [m for m in thing[clip, :step, cell].tolist() if m >= 0]
        if last[clip, step, cell] == UNKNOWN:  # something covers a little of it
            continue
        if not before:
            assert last[clip, step, cell] == NOTHING
            assert gone[clip, step, cell] == UNKNOWN
            continue
        emptied += 1
        now = clip, shown[step], before[-1]
        assert last[clip, step, cell] == scenes.colour[now]
        there = scenes.visible[now]
        assert gone[clip, step, cell] == int(not there)
    assert emptied > 50
    assert set(labels.gone.tolist()) == {UNKNOWN, 0, 1}


def test_perfect_outputs_cost_nothing() -> None:
    _, _, labels = _labelled(list(range(FRAMES)))
    sizes = ((labels.count, 6), (labels.last, NOTHING + 1), (labels.gone, 2))
    count, last, gone = (50.0 * F.one_hot(x.clamp(min=0), size) for x, size in sizes)
    loss, metrics = present_loss((count, 100 * labels.colours - 50, last, gone), labels)
    assert loss.item() < 1e-4
    assert metrics == {"counted": 1.0, "colours": 1.0, "last": 1.0, "gone": 1.0}
    for place, wrong in enumerate((count.roll(1, -1), -labels.colours, last.roll(1, -1), 1 - gone)):
        outputs = [count, 100 * labels.colours - 50, last, gone]
        outputs[place] = wrong
        assert present_loss(tuple(outputs), labels)[0].item() > 0.1


def test_chosen_cells_keep_their_labels() -> None:
    _, _, labels = _labelled(list(range(FRAMES)))
    chosen = torch.tensor([3, 40, 200])
    part = labels.at(chosen)
    assert part.last.tolist() == labels.last[chosen].tolist()
    assert part.gone.tolist() == labels.gone[chosen].tolist()
    assert part.count is labels.count
