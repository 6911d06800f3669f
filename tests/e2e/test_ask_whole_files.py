"""`ask` shows a file as its model was trained on it: by Molmo2's rule, in what the memory holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.pixels.sampling import FrameRule
from edge_vlm_runtime.cli.ask import ask
from tests.published_folder import image_bundle
from tests.runtime.command_line import command_line
from tests.runtime.pictures import write_video
from tests.runtime.seen import seen_times

QUESTION = "is there a red ball ?"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "short.mp4", num_frames=12, fps=5)
    write_video(folder / "long.mp4", num_frames=100, fps=5)
    return folder
