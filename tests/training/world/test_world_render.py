"""Pictures: repeatable, the same at two sizes, and showing what the scenes say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from edge_vlm.world.sampling import sample_scenes
from edge_vlm.world.scenes import COLOURS, WorldConfig
from edge_vlm.world.sprites import KINDS, load_atlas
from edge_vlm.world.textures import BRIGHTEST
from edge_vlm_training.world.backgrounds import background_bank
from edge_vlm_training.world.render import draw_batch, render, render_with_owner

TINTS = np.array(list(COLOURS.values()), np.float32)


def test_same_seed_same_pictures() -> None:
    cfg = WorldConfig(num_frames=3)
    frames, scenes = draw_batch(4, 3, cfg)
    assert frames.shape == (3, 3, 96, 96, 3)
    assert frames.dtype == torch.uint8
    assert torch.equal(frames, draw_batch(4, 3, cfg)[0])
    assert torch.equal(frames[1:2], render(scenes.select(slice(1, 2))))
    assert not torch.equal(frames, draw_batch(5, 3, cfg)[0])


def test_a_picture_of_twice_the_size_halved_is_the_picture() -> None:
    scenes = sample_scenes(8, 6, WorldConfig(num_frames=4))
    small = render(scenes, 96, noise=False).float()
    large = render(scenes, 192, noise=False).float()
    halved = large.view(6, 4, 96, 2, 96, 2, 3).mean((3, 5))
    difference = (halved - small).abs()
    assert difference.mean() < 0.5
    # edges differ a little: a mean of blends is not the blend of means
    assert difference.max() < 40


def test_owner_and_pixels_agree_with_the_scene() -> None:
    cfg = WorldConfig(split="heldout")
    scenes = sample_scenes(2, 24, cfg)
    still = replace(
        scenes,
        shake=np.zeros_like(scenes.shake),
        brightness=np.ones_like(scenes.brightness),
        noise_sd=np.zeros_like(scenes.noise_sd),
    )
    frames, owner = render_with_owner(still)
    assert owner.shape == frames.shape[:4]
    assert owner.dtype == torch.int8
    pictures, owners = frames.numpy().astype(np.float32), owner.numpy()
    rows, columns = np.mgrid[0:96, 0:96]
    for b, t, m in np.ndindex(scenes.visible.shape):
        mine = owners[b, t] == m
        assert mine.any() == scenes.visible[b, t, m]
        if not mine.any():
            continue
        x, y = scenes.x[b, t, m] * 96, scenes.y[b, t, m] * 96
        half = scenes.size[b, m] * 48 + 1
        assert (abs(columns[mine] + 0.5 - x) <= half).all()
        assert (abs(rows[mine] + 0.5 - y) <= half).all()
        # a pixel is its colour, darkened: the nearest hue must be the right one for the mean
        mean = pictures[b, t][mine].mean(0)
        cosine = (TINTS @ mean) / (np.linalg.norm(TINTS, axis=1) * np.linalg.norm(mean))
        assert cosine.argmax() == scenes.colour[b, t, m]


def test_shake_moves_the_whole_picture() -> None:
    scenes = sample_scenes(2, 4, WorldConfig(num_frames=2))
    scenes = replace(scenes, brightness=np.ones_like(scenes.brightness))
    still = replace(scenes, shake=np.zeros_like(scenes.shake))
    moved = replace(scenes, shake=np.full_like(scenes.shake, 1 / 96))
    before, after = render(still, noise=False), render(moved, noise=False)
    assert torch.equal(after[:, :, 1:, 1:], before[:, :, :-1, :-1])


def test_noise_has_the_stated_strength() -> None:
    scenes = sample_scenes(2, 4, WorldConfig(num_frames=2))
    noise = render(scenes).float() - render(scenes, noise=False).float()
    for b in range(4):
        assert abs(noise[b].std().item() - scenes.noise_sd[b]) < 0.6
    assert not torch.equal(noise[:, 0], noise[:, 1])


def test_backgrounds_are_dark_varied_and_grey() -> None:
    bank = background_bank(96).float()
    assert bank.max() <= BRIGHTEST
    assert len({row.numpy().tobytes() for row in bank[:, 40]}) == len(bank)
    chroma = bank.amax(-1) - bank.amin(-1)
    assert chroma.mean() < 40


def test_sprites_differ_and_are_solid_enough() -> None:
    atlas = load_atlas().astype(np.float32) / 255
    assert len(set(KINDS)) == len(KINDS) == len(atlas)
    assert all(name.isalpha() and name.islower() for name in KINDS)
    alpha = atlas[..., 1]
    assert (alpha.mean((1, 2)) > 0.1).all()
    picture = (alpha * (0.35 + 0.65 * atlas[..., 0])).reshape(len(atlas), -1)
    distance = np.linalg.norm(picture[:, None] - picture[None], axis=-1)
    assert distance[~np.eye(len(atlas), dtype=bool)].min() > 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_draws_the_same() -> None:
    scenes = sample_scenes(8, 6, WorldConfig(num_frames=4))
    difference = render(scenes).int() - render(scenes, device="cuda").cpu().int()
    assert difference.abs().max() <= 1
