"""Nothing about what runs here leaves the device, whatever the libraries would report."""

from __future__ import annotations

import os

SWITCHES = {"ORT_DISABLE_TELEMETRY": "1"}
"""Read by ONNX Runtime when it is imported. Newer ones else keep an identity of the machine and a
database of events in the user's home; `disable_telemetry_events` comes too late for both."""


def refuse_telemetry() -> None:
    """Called before such a library is imported. What the user has set stays."""
    for name, value in SWITCHES.items():
        os.environ.setdefault(name, value)
