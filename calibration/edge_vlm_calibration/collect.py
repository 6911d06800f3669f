"""Runs a checkpoint over footage and takes down its scores and the range of every module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edge_vlm.console.progress import Progress, told
from edge_vlm.errors import ConfigError, NonFinite
from edge_vlm.formats.bundle import sha256_of_file
from edge_vlm.formats.calibration import CalibrationTable, Threshold
from edge_vlm.formats.footage import Shot
from edge_vlm.model.published.folder import open_folder
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.pixels.patches import to_pixel_values
from edge_vlm_calibration.footage import Looked, shots

KEEP_RATIOS = (0.7, 0.5, 0.3, 0.2)
PERCENTS = range(5, 100, 5)
VISION_PARTS = ("vit", "scorer", "connector")


@dataclass
class Observed:
    """What passed so far: ranges by module name, scores [C] of each frame with a predecessor."""

    inputs: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, float] = field(default_factory=dict)
    scores: list[np.ndarray] = field(default_factory=list)
    num_frames: int = 0


def calibrate(
    checkpoint: Path,
    footage: Sequence[Path],
    fps: float = 2.0,
    max_frames: int = 64,
    looked: Looked | None = None,
) -> CalibrationTable:
    """Reads at most `max_frames` of each footage. One of several that cannot be read is skipped,
    which `looked`, of this footage, knows afterwards.

    A model without a token scorer has ranges and no scores. Raises as `open_folder`, the errors of
    `shots`, ConfigError when fewer than half can be read, nothing is to be seen or a scorer sees no
    frame with a predecessor, NonFinite.
    """
    found = open_folder(checkpoint)
    model, observed = found.load(), Observed()
    looked = looked or Looked(footage)
    with Progress("calibrate: frames at most", len(footage) * max_frames) as progress:
        for number, path in enumerate(footage):
            with looked.clip(path):
                seen = looked.seen(shots(path, fps, max_frames))
                observe(model, told(seen, progress), observed)
            progress.at((number + 1) * max_frames, note=path.name)
    looked.require_enough()
    if model.scorer is not None and not observed.scores:
        raise ConfigError(
            "no frame has a predecessor in its clip",
            where=", ".join(map(str, footage)),
            remedy="give longer footage, or raise --fps",
        )
    scores = np.concatenate([np.zeros(0), *observed.scores]).astype(np.float64)
    quantiles = [percent / 100 for percent in PERCENTS]
    return CalibrationTable(
        checkpoint_sha256=sha256_of_file(found.weight_files[0]),
        footage=tuple(path.resolve().name for path in footage if path not in looked.skipped),
        num_frames=observed.num_frames,
        image_size=model.cfg.vision.image_size,
        num_scores=scores.size,
        score_mean=float(scores.mean()) if scores.size else 0.0,
        score_std=float(scores.std()) if scores.size else 0.0,
        score_quantiles=dict(
            zip(PERCENTS, np.quantile(scores, quantiles).tolist(), strict=True)
            if scores.size
            else ()
        ),
        thresholds=tuple(threshold(scores, ratio) for ratio in KEEP_RATIOS if scores.size),
        input_ranges=observed.inputs,
        output_ranges=observed.outputs,
    )


def threshold(scores: np.ndarray, keep_ratio: float) -> Threshold:
    """The highest score at or above which lie at least `keep_ratio` of `scores` [n]."""
    # A share such as 0.7 of 10 cells comes out as 7.000000000000001 in some orders of rounding.
    count = max(1, int(np.ceil(keep_ratio * scores.size - 1e-6)))
    score = np.sort(scores)[-count]
    share = float((scores >= score).mean())
    return Threshold(keep_ratio=keep_ratio, score=float(score), kept_share=share)


def observe(model: VideoLM, shots: Iterable[Shot], observed: Observed) -> None:
    """Runs the vision side, every cell kept, frame by frame as a stream would."""
    vision = model.cfg.vision
    cell_idx = torch.arange(vision.num_cells)
    prev = torch.zeros(1, vision.num_cells, vision.width)
    with torch.inference_mode(), _hooks(model, observed):
        for is_first, rgb in shots:
            pixels = torch.from_numpy(to_pixel_values(rgb, vision))[None]
            observed.num_frames += 1
            if model.scorer is None:
                model.vit_trunk(model.vit.embed(pixels), cell_idx, torch.zeros_like(cell_idx))
                continue
            hidden, prev, scores = model.vit_stem(pixels, prev, torch.tensor([is_first]))
            model.vit_trunk(hidden, cell_idx, torch.zeros_like(cell_idx))
            if not is_first:
                observed.scores.append(scores[0].numpy())


@contextmanager
def _hooks(model: VideoLM, observed: Observed) -> Iterator[None]:
    def watch(name: str, leaf: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            _note(observed.inputs, name, inputs[0])
            _note(observed.outputs, name, output)

        return leaf.register_forward_hook(hook)

    handles = [
        watch(name, module)
        for part in VISION_PARTS
        if getattr(model, part) is not None
        for name, module in getattr(model, part).named_modules(prefix=part)
        if next(module.children(), None) is None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note(ranges: dict[str, float], name: str, x: Tensor) -> None:
    largest = float(x.abs().amax())
    if not np.isfinite(largest):
        raise NonFinite("NaN or infinity on calibration footage", where=name)
    ranges[name] = max(largest, ranges.get(name, 0.0))
