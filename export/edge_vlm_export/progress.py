"""Who watches an export, and nobody."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from edge_vlm_export.preflight import Estimate
from edge_vlm_export.verify.verify import Report


class Progress(Protocol):
    """Whoever watches an export."""

    def estimated(self, needed: Estimate) -> None:
        """Before anything is written."""

    def stage(self, text: str) -> None:
        """Something that takes a while begins."""

    def calibrated(self, notes: Sequence[str]) -> None:
        """What is taken of the calibration and what is left out, before anything is written."""

    def planned(self, exceptions: Sequence[str]) -> None:
        """Which nodes do not have the format that was asked for, and why."""

    def compared(self, report: Report) -> None:
        """All comparisons, also when some of them failed."""


class Silent:
    """Progress that nobody watches."""

    def estimated(self, needed: Estimate) -> None: ...

    def stage(self, text: str) -> None: ...

    def calibrated(self, notes: Sequence[str]) -> None: ...

    def planned(self, exceptions: Sequence[str]) -> None: ...

    def compared(self, report: Report) -> None: ...
