"""Sections that were made with other settings than their file has by now.

They are made and merged one by one, and a session takes the settings of all of them together.
"""

from __future__ import annotations

from edge_vlm.formats.calibrated import session_settings
from edge_vlm.formats.calibrated.budget import BUDGET_SETTINGS
from edge_vlm.formats.calibrated.change import CHANGE_SETTINGS
from edge_vlm.formats.calibration import Calibration
from edge_vlm_calibration.simulate import DEFAULTS

DEPENDS_ON = {
    "budget": CHANGE_SETTINGS,
    "reuse": CHANGE_SETTINGS,
    "alerts": BUDGET_SETTINGS | CHANGE_SETTINGS,
}


def disagreements(made: Calibration) -> list[str]:
    """What to say of it, a line each. Of files that do not say what they were made with, nothing.

    Raises ConfigError as `Calibration.find`."""
    now = {**DEFAULTS, **session_settings(made)}
    found = []
    for name, depends_on in DEPENDS_ON.items():
        if name not in made.sections:
            continue
        recorded = made.sections[name].provenance.settings
        if "duplicate_threshold" not in recorded:
            continue
        before = {**DEFAULTS, **recorded}
        others = [
            f"{key} {before[key]} (now {now[key]})"
            for key in sorted(depends_on & before.keys() & now.keys())
            if before[key] != now[key]
        ]
        if others:
            found.append(
                f"{name} was made with other settings than the file has: {', '.join(others)}; its "
                f"figures are not what sessions come to: make it again (--sections {name})"
            )
    return found
