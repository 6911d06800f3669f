"""edge-vlm: a video language model that follows a live feed on small devices.

This package holds what every stage shares: configuration, file formats, errors, pruning policies
and the model. Importing it does no work and needs numpy at most.
"""

from __future__ import annotations

__version__ = "0.1.0"
