"""The section `reuse`: from which change on a cell is computed anew in front of the scorer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from edge_vlm.formats.calibrated.change import StillStretch
from edge_vlm.formats.calibrated.checks import SettingValue, count, number, settings

REUSE_SETTINGS = frozenset(["reuse"])


@dataclass(frozen=True, kw_only=True)
class LevelShare:
    """What a session with `reuse` at `level` computes of the footage."""

    level: float
    share: float
    """Of all cells of frames that are no duplicates, neighbours and refreshed ones included."""


@dataclass(frozen=True, kw_only=True)
class ReuseSection:
    """Raises ValueError or TypeError when made from numbers that are none."""

    SECTION: ClassVar[str] = "reuse"
    VERSION: ClassVar[int] = 1

    settings: Mapping[str, SettingValue]
    """Of a session; REUSE_SETTINGS. Empty where noise is not known, or too large."""
    still: StillStretch | None
    patch_floor: float | None
    """Mean change (0..255) of a patch's pixels that noise alone reaches in one of a thousand,
    between pictures of the still stretch as far apart as a cell may be kept."""
    frames: int
    """That were looked at, without duplicates."""
    shares: tuple[LevelShare, ...]

    def __post_init__(self) -> None:
        settings(self.settings, REUSE_SETTINGS)
        count(self.frames)
        if self.patch_floor is not None:
            number(self.patch_floor)
        for each in self.shares:
            number(each.level), number(each.share)

    def to_data(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_data(cls, data: Any) -> ReuseSection:
        shares = tuple(LevelShare(**each) for each in data["shares"])
        still = StillStretch.from_data(data["still"])
        return cls(**{**data, "still": still, "shares": shares})
