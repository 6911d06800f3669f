"""All formats."""

from __future__ import annotations

from tests.fuzz import files, weights

FORMATS = (*files.FORMATS, *weights.FORMATS)
