"""A checkpoint or published folder that looks at footage: `edge_vlm.watching.Watcher` in torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_vlm.errors import ConfigError, NonFinite
from edge_vlm.model.published.folder import open_folder
from edge_vlm.pixels.duplicates import THUMBNAIL, DuplicateFilter
from edge_vlm.pixels.frames import Rgb, thumbnail
from edge_vlm.pixels.patches import to_pixel_values
from edge_vlm.watching import Look, Sent
from edge_vlm_calibration.provenance import identity_of_folder
from edge_vlm_calibration.simulate import DEFAULTS, BudgetedStream

EXPORT_FIRST = "export the checkpoint and name the bundle"


class CheckpointWatcher:
    """Only the blocks before the scorer run: what is scored depends on nothing else."""

    opened = "checkpoint"
    can_reuse = False

    def __init__(self, folder: Path) -> None:
        """Raises as `open_folder`."""
        found = open_folder(folder)
        self.model = identity_of_folder(found)
        self.config = found.config
        self.defaults: Mapping[str, Any] = found.usage.defaults
        self._model = found.load()
        self.begin()

    def begin(self) -> None:
        vision = self.config.vision
        self._prev = torch.zeros(1, vision.num_cells, vision.width)
        self._is_first = True

    def look(self, rgb: Rgb) -> Look:
        vision = self.config.vision
        if not self.config.has_scores:
            return Look(np.ones(vision.num_cells, np.float32))
        with torch.inference_mode():
            pixels = torch.from_numpy(to_pixel_values(rgb, vision))[None]
            is_first = torch.tensor([self._is_first])
            _, self._prev, scores = self._model.vit_stem(pixels, self._prev, is_first)
        self._is_first = False
        found = scores[0].numpy()
        if not np.isfinite(found).all():
            raise NonFinite("the token scores of a frame are not finite", where="vit_stem")
        return Look(found)

    @contextmanager
    def session(
        self, settings: Mapping[str, Any], questions: Sequence[str] = ()
    ) -> Iterator[CheckpointSession]:
        if questions:
            raise ConfigError(
                "alerts are calibrated as the runtime answers them, from a bundle",
                remedy=EXPORT_FIRST,
            )
        yield CheckpointSession(self, {**DEFAULTS, **settings})


class CheckpointSession:
    """The choice of cells with the model in the loop."""

    def __init__(self, watcher: CheckpointWatcher, settings: Mapping[str, Any]) -> None:
        self._watcher, self._settings = watcher, settings
        self._stream = BudgetedStream(settings, watcher.config.vision.num_cells)
        self._duplicates = DuplicateFilter()
        watcher.begin()

    def send(self, rgb: Rgb, time_s: float) -> Sent:
        settings = self._settings
        small, capture_us = thumbnail(rgb, THUMBNAIL), round(time_s * 1e6)
        if settings["drop_duplicates"] and self._duplicates.is_duplicate(
            small, capture_us, settings["duplicate_threshold"], settings["heartbeat_s"]
        ):
            return Sent()
        self._duplicates.on_encoded(small, capture_us)
        scores = self._watcher.look(rgb).scores
        assert scores is not None
        cells = self._stream.select(scores, time_s, rgb)
        return Sent(scores.size, cells.size, cells.tolist())
