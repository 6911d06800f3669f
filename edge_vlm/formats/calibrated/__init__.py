"""Sections of `calibration.json` as classes, one module each, and what a session takes of them."""

from __future__ import annotations

from typing import Any

from edge_vlm.formats.calibrated.alerts import AlertsSection
from edge_vlm.formats.calibrated.budget import BudgetSection
from edge_vlm.formats.calibrated.change import ChangeSection
from edge_vlm.formats.calibration import Calibration


def session_settings(calibration: Calibration, where: object = None) -> dict[str, Any]:
    """Fields of a session's settings that the file has. Raises ConfigError."""
    settings: dict[str, Any] = {}
    for section in (calibration.find(BudgetSection, where), calibration.find(ChangeSection, where)):
        if section is not None:
            settings |= section.settings
    return settings


__all__ = ["AlertsSection", "BudgetSection", "ChangeSection", "session_settings"]
