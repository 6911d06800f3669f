"""Settings of every test."""

from __future__ import annotations

from hypothesis import settings

# How long an example takes depends on what else the machine does; that is no failure.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
