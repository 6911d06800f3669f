"""The section `budget`: settings that hold a share of cells, or a rate of them, on the footage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from edge_vlm.formats.calibrated.checks import SettingValue, count, number, numbers, settings

BUDGET_SETTINGS = frozenset(
    [
        *("policy", "keep_ratio", "vision_tokens_per_s", "change_threshold", "min_cells"),
        *("max_cells", "payback_frames", "bank_frames", "fps_cap"),
    ]
)


@dataclass(frozen=True, kw_only=True)
class ClipShare:
    """What one clip costs with the settings of the section."""

    name: str
    frames: int
    duplicates: int
    """Frames that a live session would drop before the model looks at them."""
    seconds: float
    predicted_share: float
    """Of the cells of all encoded frames, by the scores that were taken down."""
    predicted_per_s: float
    """Cells kept per second of the clip."""
    measured_share: float | None = None
    """As a real session kept them over the first `measured_frames`; None: not measured."""
    measured_frames: int = 0
    expected_share: float | None = None
    """The prediction for these frames."""

    @classmethod
    def from_data(cls, data: Any) -> ClipShare:
        for name in ("frames", "duplicates", "measured_frames"):
            count(data[name])
        for name in ("seconds", "predicted_share", "predicted_per_s"):
            number(data[name])
        for name in ("measured_share", "expected_share"):
            if data[name] is not None:
                number(data[name])
        return cls(**{**data, "name": str(data["name"])})


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Cells that score `threshold` or more are `share` of all cells, first frames left out."""

    threshold: float
    share: float


@dataclass(frozen=True, kw_only=True)
class RatioPoint:
    """What to expect at another share: of the same footage, with the same policy."""

    keep_ratio: float
    share: float
    """Really kept, whole first frames included."""
    per_s: float
    score_share: float
    """Of all scores of encoded frames, what the kept cells have."""


@dataclass(frozen=True, kw_only=True)
class AccuracyPoint:
    """Questions with known answers at a share: mean of kinds, in shares of 1, and its interval."""

    keep_ratio: float
    share: float
    accuracy: float
    low: float
    high: float
    asked: int


@dataclass(frozen=True, kw_only=True)
class BudgetSection:
    """Raises ValueError or TypeError when made from numbers that are none."""

    SECTION: ClassVar[str] = "budget"
    VERSION: ClassVar[int] = 1

    wanted: Mapping[str, float]
    """`keep_ratio` or `vision_tokens_per_s`, as it was asked for."""
    fps: float
    """Frames a second that the footage was looked at with."""
    settings: Mapping[str, SettingValue]
    """Of a session; BUDGET_SETTINGS."""
    share: float
    """Of all clips together, predicted."""
    per_s: float
    clips: tuple[ClipShare, ...]
    score_mean: float
    score_std: float
    curve: tuple[CurvePoint, ...]
    """Falling in share; empty where there are no scores."""
    ratios: tuple[RatioPoint, ...]
    accuracy: tuple[AccuracyPoint, ...] = ()
    kept_map: tuple[float, ...] = ()
    """Share of encoded frames in which each cell was kept, row by row."""
    score_map: tuple[float, ...] = ()
    """Mean score of each cell."""

    def __post_init__(self) -> None:
        settings(self.settings, BUDGET_SETTINGS)
        for value in (self.fps, self.share, self.per_s, self.score_mean, self.score_std):
            number(value)
        numbers(self.wanted.values())
        numbers(self.kept_map)
        numbers(self.score_map)

    def to_data(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_data(cls, data: Any) -> BudgetSection:
        points = {
            "clips": tuple(ClipShare.from_data(each) for each in data["clips"]),
            "curve": _points(CurvePoint, data["curve"]),
            "ratios": _points(RatioPoint, data["ratios"]),
            "accuracy": _points(AccuracyPoint, data["accuracy"]),
            "kept_map": tuple(data["kept_map"]),
            "score_map": tuple(data["score_map"]),
        }
        return cls(**{**data, **points})


def _points(kind: Any, given: Any) -> tuple[Any, ...]:
    names = [field.name for field in fields(kind)]
    for each in given:
        numbers(each[name] for name in names)
    return tuple(kind(**each) for each in given)
