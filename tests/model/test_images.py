"""Features of still images: padding and neighbours leave no trace, a scorer changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from edge_vlm.model.images import encode_images
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.pixels.stills import ImageConfig, ImageCrops, join_images, prepare_image
from edge_vlm.presets import tiny

CFG = tiny()
CUT = ImageConfig(max_crops=4, overlap=(2, 3))


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> VideoLM:
    return VideoLM(CFG).init_weights(torch.Generator().manual_seed(1)).eval()


def image(height: int, width: int) -> ImageCrops:
    rgb = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return prepare_image(rgb, CFG.vision, CUT)


def encode(model: VideoLM, *images: ImageCrops) -> Tensor:
    pixels, windows = join_images(images)
    return encode_images(model, torch.from_numpy(pixels), torch.from_numpy(windows))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_images_together_are_each_as_if_alone(model: VideoLM) -> None:
    images = [image(40, 120), image(11, 15)]
    assert any((one.windows < 0).any() for one in images)
    close(encode(model, *images), torch.cat([encode(model, one) for one in images]))


def test_padding_has_no_part_in_a_token(model: VideoLM) -> None:
    """A padded window is the mean-query pooling of its real patches alone."""
    width = CFG.vision.width * len(CFG.vision.feature_layers)
    patches = torch.randn(5, 4, width, generator=torch.Generator().manual_seed(2))
    valid = torch.ones(5, 4, dtype=torch.bool)
    close(model.connector(patches, valid), model.connector(patches))
    valid[:, 1::2] = False
    close(model.connector(patches, valid), model.connector(patches[:, ::2]))
    nobody = torch.zeros_like(valid)
    assert model.connector(patches, nobody).isfinite().all()


def test_windows_of_cells_are_a_frame(model: VideoLM) -> None:
    """Without a scorer a whole frame is an image whose windows are its cells."""
    cfg = dataclasses.replace(CFG, scorer=None)
    plain = VideoLM(cfg).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "scorer" not in k})
    pixels = torch.from_numpy(image(40, 60).pixels[:1])
    cells = torch.arange(cfg.vision.num_cells)
    frame = plain.vit_trunk(plain.vit.embed(pixels), cells, torch.zeros_like(cells))
    close(encode_images(plain, pixels, plain.vit.cell_patches_C9), frame)
    close(encode_images(model, pixels, plain.vit.cell_patches_C9), frame)


def test_images_export_with_any_number_of_crops_and_tokens(model: VideoLM) -> None:
    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: Tensor, windows: Tensor) -> Tensor:
            return encode_images(self.model, pixels, windows)

    big, small = ([torch.from_numpy(x) for x in join_images([image(*size)])]
                  for size in ((90, 50), (11, 15)))  # fmt: skip
    crops, tokens = torch.export.Dim("crops", min=2, max=25), torch.export.Dim("tokens", min=2)
    program = torch.export.export(
        Encoder(), tuple(big), dynamic_shapes=({0: crops}, {0: tokens}), strict=False
    ).module()
    for pixels, windows in (big, small):
        close(program(pixels, windows), encode_images(model, pixels, windows))
