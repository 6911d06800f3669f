"""How much of the picture that an alert rests on its receivers get. Light to import."""

from __future__ import annotations

from enum import Enum


class EvidenceSize(str, Enum):
    NONE = "none"
    """It is not kept in the queue either."""
    SMALL = "small"
    """At most 16 kB."""
    FULL = "full"
