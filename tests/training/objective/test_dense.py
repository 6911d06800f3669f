"""Dense labels name what is drawn at a place."""

from __future__ import annotations

import torch

from edge_vlm.world.sampling import sample_scenes
from edge_vlm.world.scenes import COLOUR_NAMES, WorldConfig
from edge_vlm.world.sprites import KINDS
from edge_vlm_training.objective.probes.dense import CELL_COVERED, dense_labels, dense_loss
from edge_vlm_training.world.render import render_with_owner

GRID = 4


def test_labels_agree_with_a_count_of_pixels() -> None:
    scenes = sample_scenes(3, 4, WorldConfig(num_frames=3))
    _, owner = render_with_owner(scenes)
    labels = dense_labels(scenes, owner, GRID, CELL_COVERED)
    side, place, things = owner.shape[-1] // GRID, 0, 0
    for clip in range(4):
        for frame in range(3):
            for row in range(GRID):
                for column in range(GRID):
                    cell = owner[clip, frame][row * side :, column * side :][:side, :side]
                    counts = [int((cell == m).sum()) for m in range(scenes.kind.shape[1])]
                    thing = max(range(len(counts)), key=counts.__getitem__)
                    if counts[thing] < CELL_COVERED * side * side:
                        assert labels.kind[place] == len(KINDS)
                    else:
                        things += 1
                        assert labels.kind[place] == scenes.kind[clip, thing]
                        assert labels.colour[place] == scenes.colour[clip, frame, thing]
                        centre = [scenes.x[clip, frame, thing], scenes.y[clip, frame, thing]]
                        torch.testing.assert_close(labels.centre[place], torch.tensor(centre))
                    place += 1
    assert place == len(labels.kind)
    assert things > 20


def test_perfect_outputs_cost_nothing() -> None:
    scenes = sample_scenes(5, 2, WorldConfig(num_frames=1))
    labels = dense_labels(scenes, render_with_owner(scenes)[1], GRID, CELL_COVERED)
    kind = 50.0 * torch.nn.functional.one_hot(labels.kind, len(KINDS) + 1)
    colour = 50.0 * torch.nn.functional.one_hot(labels.colour, len(COLOUR_NAMES) + 1)
    loss, metrics = dense_loss((kind, colour, labels.centre), labels)
    assert loss.item() < 1e-4
    assert metrics["kind"] == metrics["colour"] == 1.0
    wrong, _ = dense_loss((kind.roll(1, 0), colour, labels.centre), labels)
    assert wrong.item() > 1.0
