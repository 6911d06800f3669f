"""Where the demo that comes with the package lies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

DEMO_FOLDER = Path(__file__).parent
DEMO_BUNDLE = DEMO_FOLDER / "bundle"
