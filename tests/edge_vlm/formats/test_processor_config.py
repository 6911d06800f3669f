"""Processor files of published folders: what they say is read, what is not computed is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edge_vlm.errors import CheckpointError, ConfigError
from edge_vlm.formats.usage import FrameRule, Usage
from edge_vlm.model.published.processor import read_processors
from edge_vlm.pixels.stills import ImageConfig
from edge_vlm.presets import molmo2_4b
from edge_vlm.text.prompt import RELEASED
from tests.preprocessing_record import PUBLISHED_4B

VISION = molmo2_4b().vision
PICTURES = {
    "size": {"height": 378, "width": 378},
    "patch_size": 14,
    "resample": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
IMAGES = {**PICTURES, "max_crops": 24, "overlap_margins": [3, 5], "pooling_size": [2, 2]}
VIDEOS = {**PICTURES, "pooling_size": [3, 3]}
FLAGS = {
    "image_use_col_tokens": True,
    "use_single_crop_col_tokens": False,
    "use_single_crop_start_token": True,
    "video_use_col_tokens": False,
    "use_frame_special_tokens": False,
}
CUT = ImageConfig(max_crops=24, overlap=(3, 5))
AS_RELEASED = Usage(images=ImageConfig(), style=RELEASED, frames=FrameRule())


def folder(path: Path, **files: Any) -> Path:
    for name, data in files.items():
        (path / f"{name}.json").write_text(json.dumps(data))
    return path


def test_both_generations_of_files_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "new").mkdir()
    hub = folder(
        tmp_path / "hub",
        preprocessor_config=IMAGES,
        video_preprocessor_config=VIDEOS,
        processor_config=FLAGS,
    )
    nested = {**FLAGS, "image_processor": IMAGES, "video_processor": VIDEOS}
    new = folder(tmp_path / "new", processor_config=nested)
    assert read_processors(hub, VISION) == read_processors(new, VISION)
    assert read_processors(new, VISION) == Usage(images=CUT, style=RELEASED, frames=FrameRule())


def test_without_files_it_is_the_released_way(tmp_path: Path) -> None:
    assert read_processors(tmp_path, VISION) == AS_RELEASED


@pytest.mark.parametrize(
    ("files", "style"),
    [
        ({"config": {"use_frame_special_tokens": True}}, (True, False)),
        ({"config": {"use_frame_special_tokens": False}}, (False, False)),
        ({"processor_config": {}}, (True, True)),
        ({"processor_config": {**FLAGS, "use_single_crop_col_tokens": None}}, (False, True)),
        ({"processor_config": {**FLAGS, "use_frame_special_tokens": True}}, (True, False)),
    ],
)
def test_the_style_is_that_of_the_published_class(
    tmp_path: Path, files: dict[str, Any], style: tuple[bool, bool]
) -> None:
    found = read_processors(folder(tmp_path, **files), VISION).style
    assert (found.own_frame_markers, found.low_res_columns) == style
    assert found.space_before_answers


def test_the_frame_rule_is_read(tmp_path: Path) -> None:
    """MolmoWeb-4B also begins the low-resolution view as any other."""
    video = {**VIDEOS, "num_frames": 8, "max_fps": 1, "frame_sample_mode": "uniform_last_frame"}
    flags = {**FLAGS, "use_single_crop_start_token": False}
    folder(tmp_path, video_preprocessor_config=video, processor_config=flags)
    usage = read_processors(tmp_path, VISION)
    assert usage.frames == FrameRule(num_frames=8, max_fps=1.0)
    assert not usage.style.low_res_start


def test_all_that_is_not_computed_here_is_listed(tmp_path: Path) -> None:
    folder(
        tmp_path,
        preprocessor_config={
            **IMAGES,
            "resample": 3,
            "image_std": [0.2, 0.2, 0.2],
            "size": {"height": 384, "width": 384},
            "pooling_size": [2, 3],
            "overlap_margins": [4],
            "max_crops": 0,
            "crop_mode": "resize",
        },
        video_preprocessor_config={**VIDEOS, "pooling_size": [2, 2], "frame_sample_mode": "fps"},
        processor_config={**FLAGS, "video_use_col_tokens": True},
    )
    with pytest.raises(ConfigError) as caught:
        read_processors(tmp_path, VISION)
    for field in (
        *("image_processor.resample", "image_processor.image_std", "image_processor.size"),
        *("image_processor.pooling_size", "image_processor.overlap_margins"),
        *("image_processor.max_crops", "video_processor.pooling_size"),
        *("image_processor.crop_mode", "video_processor.frame_sample_mode"),
        *("processor.video_use_col_tokens", str(tmp_path)),
    ):
        assert field in str(caught.value)


def test_margins_as_wide_as_a_crop_are_refused(tmp_path: Path) -> None:
    folder(tmp_path, preprocessor_config={**IMAGES, "overlap_margins": [20, 7]})
    with pytest.raises(ConfigError, match="only 27 patches"):
        read_processors(tmp_path, VISION)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_file_is_a_typed_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="JSON"):
        read_processors(tmp_path, VISION)


@pytest.mark.skipif(
    not PUBLISHED_4B.is_dir(), reason="needs the published 4B folder beside the clone"
)
def test_the_published_4b_folder_is_read() -> None:
    assert read_processors(PUBLISHED_4B, VISION) == AS_RELEASED
