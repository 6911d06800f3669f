"""Draw scenes as pictures: batched torch, CPU or GPU, a pure function of the scenes.

Things are placed on whole 1/96 steps of the picture and every texture and sprite is resized by
exact areas, so a picture of 192 pixels averaged 2 x 2 is the picture of 96 pixels up to noise.

Shapes: F pictures (clips x frames), S picture side, P side of the largest sprite, both in pixels.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from edge_vlm.world.draw import DARKEST, NOISE_SEED, NOISE_STRIDE, pixels
from edge_vlm.world.paths import MAX_SIDE, SMALLEST_SIDE
from edge_vlm.world.sampling import sample_scenes
from edge_vlm.world.scenes import COLOURS, NOISE_KEYS, Scenes, WorldConfig
from edge_vlm.world.sprites import load_atlas
from edge_vlm.world.textures import (
    GRID,
    WIDE_BACKGROUNDS,
    WIDE_MARGIN,
    margin_pixels,
)
from edge_vlm_training.world.backgrounds import area_matrix, background_bank, wide_background


@lru_cache(maxsize=8)
def _sprite_bank(size: int, device: str) -> tuple[Tensor, Tensor]:
    """Alpha and shade of every kind at every side, f32 [kinds * sides, P, P], top left aligned.

    Shade is alpha times the factor by which the colour is multiplied.
    """
    atlas = torch.from_numpy(load_atlas().astype(np.float32) / 255)
    alpha = atlas[..., 1]
    shade = alpha * (DARKEST + (1 - DARKEST) * atlas[..., 0])
    largest = pixels(MAX_SIDE, size)
    num_sides = MAX_SIDE - SMALLEST_SIDE + 1
    bank = torch.zeros(2, len(atlas), num_sides, largest, largest)
    for i, side in enumerate(range(SMALLEST_SIDE, MAX_SIDE + 1)):
        width = pixels(side, size)
        weights = area_matrix(atlas.shape[1], width)
        bank[0, :, i, :width, :width] = weights @ alpha @ weights.T
        bank[1, :, i, :width, :width] = weights @ shade @ weights.T
    flat = bank.flatten(1, 2).to(device)
    return flat[0], flat[1]


@lru_cache(maxsize=8)
def _noise_bank(size: int, device: str) -> Tensor:
    """Standard normal noise pictures as a strided view, f32 [NOISE_KEYS, S * S * 3]."""
    length = size * size * 3
    rng = np.random.default_rng(NOISE_SEED)
    noise = rng.standard_normal(length + NOISE_KEYS * NOISE_STRIDE, dtype=np.float32)
    return torch.from_numpy(noise).to(device).as_strided((NOISE_KEYS, length), (NOISE_STRIDE, 1))


@lru_cache(maxsize=8)
def _background_windows(size: int, device: str) -> Tensor:
    """Backgrounds by shake, u8 view [numbers, dy, dx, S * S * 3 as (S, S * 3)]."""
    bank = background_bank(size).to(device)
    number, row, column, channel = bank.stride()
    offsets = 2 * margin_pixels(size) + 1
    return bank.as_strided(
        (len(bank), offsets, offsets, size, size * 3), (number, row, column, row, channel)
    )


@torch.no_grad()
def render(
    scenes: Scenes, size: int = 96, device: str | torch.device = "cpu", *, noise: bool = True
) -> Tensor:
    """The clips as u8 [B, T, size, size, 3] on ``device``; ``noise=False``: no pixel noise."""
    return _draw(scenes, size, str(device), noise)[0]


@torch.no_grad()
def render_with_owner(
    scenes: Scenes, size: int = 96, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """The clips and, i8 [B, T, size, size], the index of the thing at each pixel (-1: none)."""
    frames, owner = _draw(scenes, size, str(device), True, with_owner=True)
    assert owner is not None
    return frames, owner


def draw_batch(
    seed: int,
    count: int,
    cfg: WorldConfig,
    size: int = 96,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Scenes]:
    """Sample ``count`` clips and draw them: u8 [count, T, size, size, 3] and their scenes."""
    scenes = sample_scenes(seed, count, cfg)
    return render(scenes, size, device), scenes


def _draw(
    scenes: Scenes, size: int, device: str, noise: bool, with_owner: bool = False
) -> tuple[Tensor, Tensor | None]:
    clips, frames, slots = scenes.visible.shape
    shift = np.rint(scenes.shake.reshape(-1, 2) * size).astype(np.int64)
    canvas = _backgrounds(scenes, size, device).view(-1, 3)
    owner = None
    if with_owner:
        owner = torch.full((clips * frames * size * size,), -1, dtype=torch.int8, device=device)
    for slot in range(slots):
        _draw_things(scenes, slot, shift, size, device, canvas, owner)
    pictures = canvas.view(clips * frames, -1)
    brightness = torch.from_numpy(scenes.brightness.reshape(-1, 1)).to(device)
    pictures.mul_(brightness)
    if noise:
        key = torch.from_numpy(scenes.noise_key.reshape(-1)).to(device)
        noise_sd = torch.from_numpy(np.repeat(scenes.noise_sd, frames)[:, None]).to(device)
        pictures.addcmul_(_noise_bank(size, device)[key], noise_sd)
    levels = pictures.add_(0.5).clamp_(0, 255).to(torch.uint8)
    shape = (clips, frames, size, size)
    return levels.view(*shape, 3), None if owner is None else owner.view(shape)


def _backgrounds(scenes: Scenes, size: int, device: str) -> Tensor:
    """What is behind the things, f32 [F, S, S * 3]."""
    numbers = scenes.background.reshape(-1)
    turned = np.rint((scenes.shake + scenes.pan).reshape(-1, 2) * size).astype(np.int64)
    canvas = torch.empty((len(numbers), size, size * 3), device=device)
    is_wide = np.isin(numbers, WIDE_BACKGROUNDS)
    if not is_wide.all():
        margin = margin_pixels(size)
        window = torch.from_numpy(margin - turned[~is_wide].clip(-margin, margin)).to(device)
        number = torch.from_numpy(numbers[~is_wide]).to(device)
        windows = _background_windows(size, device)
        found = windows[number, window[:, 1], window[:, 0]].float()
        canvas[torch.from_numpy(~is_wide)] = found
    margin = margin_pixels(size, WIDE_MARGIN)
    for frame in np.flatnonzero(is_wide):
        column, row = (margin - turned[frame].clip(-margin, margin)).tolist()
        wide = wide_background(int(numbers[frame]), size)
        canvas[frame] = wide[row : row + size, column : column + size].reshape(size, -1)
    return canvas


def _draw_things(
    scenes: Scenes,
    slot: int,
    shift: np.ndarray,
    size: int,
    device: str,
    canvas: Tensor,
    owner: Tensor | None,
) -> None:
    """Blend thing number ``slot`` of every clip into ``canvas`` f32 [F * S * S, 3], in place."""
    frames = scenes.num_frames
    shown = np.flatnonzero(scenes.visible[:, :, slot])
    if not len(shown):
        return
    clip = shown // frames
    side = np.rint(scenes.size[clip, slot] * GRID).astype(np.int64)
    centre = np.stack([scenes.x, scenes.y], -1)[:, :, slot].reshape(-1, 2)[shown]
    corner = np.rint(centre * GRID - side[:, None] / 2)
    corner = np.rint(corner * size / GRID).astype(np.int64) + shift[shown]
    sprite = scenes.kind[clip, slot] * (MAX_SIDE - SMALLEST_SIDE + 1) + side - SMALLEST_SIDE
    tints = np.array(list(COLOURS.values()), np.float32)
    tint = torch.from_numpy(tints[scenes.colour[:, :, slot].reshape(-1)[shown]]).to(device)

    alpha_bank, shade_bank = _sprite_bank(size, device)
    which = torch.from_numpy(sprite).to(device)
    alpha_NPP, shade_NPP = alpha_bank[which], shade_bank[which]
    along = torch.arange(alpha_NPP.shape[1], device=device)
    left = torch.from_numpy(corner[:, 0]).to(device)[:, None] + along
    top = torch.from_numpy(corner[:, 1]).to(device)[:, None] + along
    inside = ((top >= 0) & (top < size))[:, :, None] & ((left >= 0) & (left < size))[:, None, :]
    n, row, column = ((alpha_NPP > 0) & inside).nonzero(as_tuple=True)
    picture = torch.from_numpy(shown).to(device)
    place = (picture[n] * size + top[n, row]) * size + left[n, column]
    alpha = alpha_NPP[n, row, column]
    shade = shade_NPP[n, row, column]
    under = canvas[place]
    canvas[place] = under * (1 - alpha)[:, None] + shade[:, None] * tint[n]
    if owner is not None:
        owner[place[alpha > 0.5]] = slot
