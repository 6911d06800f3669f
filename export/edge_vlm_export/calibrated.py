"""What an export takes of a calibration: ranges, a plan of precisions, settings of sessions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_vlm.errors import ConfigError
from edge_vlm.formats.calibrated import (
    BudgetSection,
    ChangeSection,
    session_settings,
    with_settings,
)
from edge_vlm.formats.calibrated.precision import PlannedArrays, PrecisionSection
from edge_vlm.formats.calibration import Calibration, CalibrationTable, ModelIdentity
from edge_vlm_export.graphs.weights import WeightSource
from edge_vlm_export.quantize.convert import Calibrated


class CalibrationOf:
    """One file, of the weights that are exported."""

    def __init__(self, path: Path, source: WeightSource) -> None:
        """Raises ConfigError for one of other weights, or with nothing for an export."""
        self._path = path
        self._file = Calibration.read(path)
        cfg = source.cfg
        self._identity = ModelIdentity.from_source(
            source.identity,
            scorer=cfg.scorer_kind,
            image_size=cfg.vision.image_size,
            num_cells=cfg.vision.num_cells,
        )
        # Weights and ranges are the same whatever cells are chosen by; settings are not.
        self._file.require_model(self._identity, path, any_scorer=True)
        wanted = (
            *(CalibrationTable.SECTION, PrecisionSection.SECTION),
            *(BudgetSection.SECTION, ChangeSection.SECTION),
        )
        if not any(name in self._file.sections for name in wanted):
            raise ConfigError(
                f"the calibration has none of {', '.join(wanted)}: nothing that an export reads",
                where=path,
                remedy=f"add them: `edge-vlm calibrate --sections {','.join(wanted)}`",
            )

    @property
    def table(self) -> CalibrationTable | None:
        """Raises ConfigError."""
        return self._file.find(CalibrationTable, self._path)

    def plan(self) -> Calibrated | None:
        """Raises ConfigError."""
        section = self._file.find(PrecisionSection, self._path)
        if section is None:
            return None
        return Calibrated(section.by_module(), PlannedArrays.of(section, self._path))

    def over(self, defaults: Mapping[str, Any]) -> Mapping[str, Any]:
        """`defaults` with the calibrated settings in their place. Raises ConfigError."""
        if not self._file.model.is_same(self._identity):
            return defaults
        return with_settings(defaults, session_settings(self._file, self._path))
