"""Sections of `calibration.json` as classes, one module each, and what a session takes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge_vlm.formats.calibrated.alerts import AlertsSection
from edge_vlm.formats.calibrated.budget import BudgetSection
from edge_vlm.formats.calibrated.change import ChangeSection
from edge_vlm.formats.calibrated.reuse import ReuseSection
from edge_vlm.formats.calibration import Calibration


def session_settings(
    calibration: Calibration, where: object = None, *, can_reuse: bool = False
) -> dict[str, Any]:
    """Fields of a session's settings that the file has; `reuse` for a model that can only. Raises
    ConfigError."""
    settings: dict[str, Any] = {}
    for kind in (BudgetSection, ChangeSection, *((ReuseSection,) if can_reuse else ())):
        section: Any = calibration.find(kind, where)
        if section is not None:
            settings |= section.settings
    return settings


def reuse_left_out(calibration: Calibration, where: object = None) -> str | None:
    """What to say where the file has a setting `reuse` and the bundle no graph for it. Raises
    ConfigError."""
    section = calibration.find(ReuseSection, where)
    if section is None or not section.settings:
        return None
    return (
        f"the calibration's reuse {section.settings['reuse']} is left out: it needs a bundle that "
        "was exported with --reuse"
    )


BUDGETS = frozenset(["keep_ratio", "vision_tokens_per_s", "change_threshold"])
"""Of which a calibration sets one."""


def with_settings(defaults: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a model was made for, with calibrated settings in their place; of budgets there is
    one."""
    left = BUDGETS if BUDGETS & settings.keys() else frozenset()
    kept = {name: value for name, value in defaults.items() if name not in left}
    if "fps_cap" in settings:
        kept.pop("fps", None)
    return {**kept, **settings}


__all__ = [
    "AlertsSection",
    "BudgetSection",
    "ChangeSection",
    "ReuseSection",
    "reuse_left_out",
    "session_settings",
    "with_settings",
]
