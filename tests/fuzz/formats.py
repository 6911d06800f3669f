"""All formats, by name."""

from __future__ import annotations

from tests.fuzz import files

FORMATS = (*files.FORMATS,)
