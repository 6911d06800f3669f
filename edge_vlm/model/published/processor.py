"""How a published Molmo2 folder wants its pictures cut and its prompts written.

The hub's folders say it in `preprocessor_config.json`, `video_preprocessor_config.json` and
`processor_config.json`, newer ones (transformers 5 and later) in the last of these alone. Where
a file is missing, what holds is what all released checkpoints have in common.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from edge_vlm.config import CELL, VisionConfig
from edge_vlm.errors import CheckpointError, ConfigError
from edge_vlm.formats.usage import FrameRule, Usage
from edge_vlm.json_text import MALFORMED, parse_json
from edge_vlm.model.published.section import Section
from edge_vlm.pixels.stills import ImageConfig
from edge_vlm.text.prompt import RELEASED, PromptStyle

PROCESSOR = "processor_config.json"
IMAGES = "preprocessor_config.json"
VIDEOS = "video_preprocessor_config.json"
MODEL = "config.json"
BILINEAR = 2
"""Pillow's number of the filter."""


CROPS = "overlap-and-resize-c2"
"""The one way of cutting still pictures that is computed here (`crop_mode`)."""


def read_processors(folder: Path, vision: VisionConfig) -> Usage:
    """How a folder whose model has this vision side wants images, frames and prompts.

    Raises ConfigError that lists every field which asks for another preprocessing than the one
    computed here, CheckpointError for a file that is not a JSON object.
    """
    problems: list[str] = []
    processor = _read(folder / PROCESSOR)
    images = (processor or {}).get("image_processor", _read(folder / IMAGES))
    videos = (processor or {}).get("video_processor", _read(folder / VIDEOS))
    frames = FrameRule()
    if videos is not None:
        section = Section("video_processor", videos, problems)
        _expect_pictures(section, vision)
        section.expect([CELL, CELL], "pooling_size")
        frames = _frames(section)
    try:
        cfg = ImageConfig() if images is None else _images(images, vision, problems)
        cfg.window_patches(vision)
    except MALFORMED as error:
        problems.append(str(error))
    style = RELEASED
    if processor is not None:
        style = _style(Section("processor", processor, problems))
    elif (model := _read(folder / MODEL)) is not None:
        own = bool(model.get("use_frame_special_tokens", False))
        style = dataclasses.replace(RELEASED, own_frame_markers=own)
    if problems:
        raise ConfigError(
            f"pictures would have to be prepared in another way: {'; '.join(problems)}",
            where=folder,
            remedy="use the processor files that were published with the weights",
        )
    return Usage(style=style, images=cfg, frames=frames)


def _expect_pictures(section: Section, vision: VisionConfig) -> None:
    """What images and frames have in common: a square, bilinear, to [-1, 1]."""
    side = vision.image_size
    section.expect({"height": side, "width": side}, "size")
    section.expect(vision.patch_size, "patch_size")
    section.expect(BILINEAR, "resample")
    section.expect([0.5, 0.5, 0.5], "image_mean", "image_std")
    section.expect(True, "do_resize", "do_rescale", "do_normalize")


def _frames(section: Section) -> FrameRule:
    """Folders that transformers saved may say `fps` and no way of sampling: the released one."""
    released = FrameRule()
    fps = section.number("max_fps", "fps", default=released.max_fps)
    if section.has("frame_sample_mode"):
        section.expect(released.mode, "frame_sample_mode")
    return FrameRule(
        num_frames=section.whole("num_frames", "max_frames", default=released.num_frames),
        max_fps=float(fps) if math.isfinite(fps) else released.max_fps,
    )


def _images(data: object, vision: VisionConfig, problems: list[str]) -> ImageConfig:
    section, released = Section("image_processor", data, problems), ImageConfig()
    _expect_pictures(section, vision)
    section.expect(CROPS, "crop_mode")
    pool, overlap = [released.pool] * 2, list(released.overlap)
    if section.has("pooling_size"):
        pool = section.wholes("pooling_size")
        if len(pool) != 2 or pool[0] != pool[1]:
            section.fault("pooling_size", pool, "two equal numbers")
    if section.has("overlap_margins"):
        overlap = section.wholes("overlap_margins")
        if len(overlap) != 2:
            section.fault("overlap_margins", overlap, "two numbers")
            overlap = list(released.overlap)
    return ImageConfig(
        max_crops=section.whole("max_crops", default=released.max_crops),
        overlap=(overlap[0], overlap[1]),
        pool=pool[0],
    )


def _style(section: Section) -> PromptStyle:
    """What a processor file leaves out has the default of the published class."""
    section.expect(True, "image_use_col_tokens")
    section.expect(False, "video_use_col_tokens")
    low_res_columns: Any = section.data.get("use_single_crop_col_tokens")
    return dataclasses.replace(
        RELEASED,
        own_frame_markers=bool(section.data.get("use_frame_special_tokens", True)),
        low_res_columns=low_res_columns is None or bool(low_res_columns),
        low_res_start=section.data.get("use_single_crop_start_token") is not False,
    )


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file."""
    try:
        data = parse_json(path.read_text("utf-8-sig"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"not JSON: {error}", where=path) from error
    if not isinstance(data, dict):
        raise CheckpointError("not a JSON object", where=path)
    return data
