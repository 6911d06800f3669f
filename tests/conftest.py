"""Settings of every test."""

from __future__ import annotations

from hypothesis import settings

# How long an example takes depends on what else the machine does; that is no failure. The examples
# are the same each time, so that a red run is red for whoever repeats it; new ones are drawn by
# `pytest --hypothesis-profile explore`.
settings.register_profile("explore", deadline=None)
settings.register_profile("repeatable", settings.get_profile("explore"), derandomize=True)
settings.load_profile("repeatable")
