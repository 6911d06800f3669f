"""The section `change`: what the camera's own noise looks like, and what is nothing but noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from edge_vlm.formats.calibrated.checks import SettingValue, count, number, settings

CHANGE_SETTINGS = frozenset(["drop_duplicates", "duplicate_threshold"])


@dataclass(frozen=True, kw_only=True)
class StillStretch:
    """Where the footage stands still: what changes there is noise."""

    clip: str
    begin_s: float
    end_s: float
    frames: int

    @classmethod
    def from_data(cls, data: Any) -> StillStretch | None:
        """Raises KeyError, TypeError, ValueError."""
        if data is None:
            return None
        number(data["begin_s"]), number(data["end_s"]), count(data["frames"])
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class ChangeSection:
    """Raises ValueError or TypeError when made from numbers that are none."""

    SECTION: ClassVar[str] = "change"
    VERSION: ClassVar[int] = 1

    settings: Mapping[str, SettingValue]
    """Of a session; CHANGE_SETTINGS. Empty where the footage has no still stretch."""
    still: StillStretch | None
    noise: float | None
    """Largest change (0..255) of a point of the thumbnail between pictures of the still stretch
    that are up to a heartbeat apart."""
    duplicate_share: float
    """Of the footage's frames, what a live session drops with these settings."""
    duplicate_share_before: float
    """With the usual threshold."""
    pixel_floor: float | None
    """Mean change (0..255) of a cell's pixels that noise alone reaches in one of a thousand."""
    score_floor: float | None
    """Score that 99.9 of 100 cells stay below while nothing happens; None without scores."""
    scorer: str
    """What these scores are: learned or change."""
    moving_share: float
    """Of all cells after first frames, those that change by clearly more, half as much again; by
    anything at all if there is no floor."""

    def __post_init__(self) -> None:
        settings(self.settings, CHANGE_SETTINGS)
        for value in (self.noise, self.pixel_floor, self.score_floor):
            if value is not None:
                number(value)
        for value in (self.duplicate_share, self.duplicate_share_before, self.moving_share):
            number(value)

    def to_data(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_data(cls, data: Any) -> ChangeSection:
        return cls(**{**data, "still": StillStretch.from_data(data["still"])})
