"""What a model was trained to be given and asked, beyond its shapes.

It travels with the weights: in a checkpoint's `config.json` beside the model's shapes, in a
bundle's manifest, and in a hub folder's `config.json` under the key `edge_vlm`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from edge_vlm.pixels.stills import ImageConfig
from edge_vlm.text.prompt import PLAIN, PromptStyle

SECTIONS = ("prompt", "images", "frames", "defaults")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameRule:
    """Which frames of a whole clip a model was trained on; the defaults are Molmo2's."""

    num_frames: int = 384
    """Most frames of a clip (`num_frames`, `max_frames`)."""
    max_fps: float = 2.0
    """Frames per second of a clip that is short enough."""
    mode: str = "uniform_last_frame"
    """`frame_sample_mode`: `uniform_last_frame` takes the last frame in any case, and past
    `num_frames` spreads evenly over the whole clip."""

    def __post_init__(self) -> None:
        if self.num_frames < 1:
            raise ValueError(f"FrameRule.num_frames = {self.num_frames!r}: must be positive")
        if not 0 < self.max_fps < float("inf"):
            raise ValueError(f"FrameRule.max_fps = {self.max_fps!r}: must be positive")
        if not self.mode or not isinstance(self.mode, str):
            raise ValueError(f"FrameRule.mode = {self.mode!r}: must be a name")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    style: PromptStyle = PLAIN
    images: ImageConfig | None = None
    """How still pictures are cut; None for a model that knows video only."""
    frames: FrameRule | None = None
    """None where nothing is known."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of a session, such as `keep_ratio`, `temperature` and `max_answer_tokens`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types under the names of SECTIONS; `from_dict` is the inverse."""
        return {
            "prompt": dataclasses.asdict(self.style),
            "images": None if self.images is None else dataclasses.asdict(self.images),
            "frames": None if self.frames is None else dataclasses.asdict(self.frames),
            "defaults": dict(self.defaults),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Usage:
        """Absent sections have their defaults. Raises ValueError that names what is wrong."""
        try:
            images, frames = data.get("images"), data.get("frames")
            return cls(
                style=PromptStyle(**data.get("prompt", {})),
                images=None if images is None else ImageConfig(**images),
                frames=None if frames is None else FrameRule(**frames),
                defaults=dict(data.get("defaults", {})),
            )
        except TypeError as error:
            raise ValueError(f"what the model was trained for: {error}") from error
