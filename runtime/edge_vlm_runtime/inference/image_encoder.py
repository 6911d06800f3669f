"""A picture at full detail in, the features of its tokens out: the graph `image_encoder`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_vlm.config import ModelConfig
from edge_vlm.errors import NonFinite
from edge_vlm.formats.bundle import IMAGE_ENCODER
from edge_vlm.pixels.stills import ImageConfig, ImageGrid, prepare_image
from edge_vlm_runtime.engines.base import Engine


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageTokens:
    """A picture as the language model sees it. Nothing of it is pruned."""

    embeds: np.ndarray
    """Features f32 [tokens, width]; added to the patch token's embedding."""
    grid: ImageGrid
    crops: int
    """Of the tiled view; the low-resolution view comes on top."""


class ImageVision:
    """Stateless. One thread."""

    def __init__(self, engine: Engine, cfg: ModelConfig, images: ImageConfig) -> None:
        self._engine, self._cfg = engine, cfg
        self.images = images
        """How a picture is cut at most."""

    def encode(self, rgb: np.ndarray, cut: ImageConfig) -> ImageTokens:
        """`rgb` u8 [H, W, 3] of any size, cut by `cut`, which may have fewer crops than `images`.

        Raises NonFinite when the graph gave NaN or infinity.
        """
        still = prepare_image(rgb, self._cfg.vision, cut)
        engine = self._engine
        embeds = np.empty((len(still.windows), self._cfg.language.width), np.float32)
        engine.bind_array("pixels", still.pixels)
        engine.bind_array("windows", np.ascontiguousarray(still.windows))
        engine.bind_array("features", embeds)
        engine.run()
        if not np.isfinite(embeds).all():
            raise NonFinite("the features of a picture are not finite", where=IMAGE_ENCODER)
        return ImageTokens(embeds=embeds, grid=still.grid, crops=len(still.pixels) - 1)
