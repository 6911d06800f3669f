"""What a model was trained to be given and asked, beyond its shapes.

It travels with the weights: in a checkpoint's `config.json` beside the model's shapes, in a
bundle's manifest, and in a hub folder's `config.json` under the key `edge_vlm`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from edge_vlm.pixels.sampling import FrameRule as FrameRule
from edge_vlm.pixels.stills import ImageConfig
from edge_vlm.text.prompt import PLAIN, PromptStyle

SECTIONS = ("prompt", "images", "frames", "defaults", "card")

DEFAULTS = frozenset(
    [
        "attention",
        "bank_frames",
        "change_threshold",
        "delivery",
        "drop_duplicates",
        "duplicate_threshold",
        "fps",
        "fps_cap",
        "heartbeat_s",
        "history_turns",
        "instructions",
        "keep_ratio",
        "last_n",
        "max_answer_tokens",
        "max_cells",
        "max_frame_age_s",
        "max_positions",
        "max_time_s",
        "min_cells",
        "payback_frames",
        "policy",
        "policy_seed",
        "raw_frames",
        "reuse",
        "reuse_refresh",
        "seed",
        "subtitles",
        "temperature",
        "top_p",
        "vision_tokens_per_s",
        "window_tokens",
    ]
)
"""What a runtime reads of `defaults`; a test holds it to the settings of a session."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What whoever meets the model should know of it, in plain words. Raises ValueError."""

    summary: str
    """What it knows, and what it does not."""
    is_toy: bool = False
    """It knows a small world only, and its answers about anything else mean nothing."""
    questions: tuple[str, ...] = ()
    """Examples of what it can answer."""
    alerts: tuple[str, ...] = ()
    """Examples of what it can watch for."""

    def __post_init__(self) -> None:
        if not isinstance(self.summary, str) or not self.summary.strip():
            raise ValueError("card: summary must be text")
        if not isinstance(self.is_toy, bool):
            raise ValueError(f"card: is_toy must be true or false, got {self.is_toy!r}")
        for name in ("questions", "alerts"):
            texts = getattr(self, name)
            listed = isinstance(texts, (list, tuple))
            if not listed or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"card: {name} must be a list of texts")
            object.__setattr__(self, name, tuple(texts))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    style: PromptStyle = PLAIN
    images: ImageConfig | None = None
    """How still pictures are cut; None for a model that knows video only."""
    frames: FrameRule | None = None
    """None where nothing is known."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of a session, such as `keep_ratio`, `temperature` and `max_answer_tokens`."""
    card: ModelCard | None = None
    """None where nobody wrote one."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types under the names of SECTIONS; `from_dict` is the inverse."""
        sections = {
            "prompt": dataclasses.asdict(self.style),
            "images": None if self.images is None else dataclasses.asdict(self.images),
            "frames": None if self.frames is None else dataclasses.asdict(self.frames),
            "defaults": dict(self.defaults),
        }
        if self.card is not None:
            sections["card"] = dataclasses.asdict(self.card)
        return sections

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Usage:
        """Absent sections have their defaults. Raises ValueError that names what is wrong."""
        try:
            images, frames = data.get("images"), data.get("frames")
            card = data.get("card")
            return cls(
                style=PromptStyle(**data.get("prompt", {})),
                images=None if images is None else ImageConfig(**images),
                frames=None if frames is None else FrameRule(**frames),
                defaults=dict(data.get("defaults", {})),
                card=None if card is None else ModelCard(**card),
            )
        except TypeError as error:
            raise ValueError(f"what the model was trained for: {error}") from error
