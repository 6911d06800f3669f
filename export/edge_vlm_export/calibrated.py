"""What an export takes of a calibration: ranges, a plan of precisions, settings of sessions."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_vlm.errors import ConfigError
from edge_vlm.formats.calibrated import (
    BudgetSection,
    ChangeSection,
    ReuseSection,
    reuse_left_out,
    session_settings,
    with_settings,
)
from edge_vlm.formats.calibrated.precision import REMEDY, PlannedArrays, PrecisionSection
from edge_vlm.formats.calibration import Calibration, CalibrationTable, ModelIdentity
from edge_vlm.formats.precision import Precision, weight_format
from edge_vlm.model.published.mapping import shapes
from edge_vlm_export.graphs.weights import WeightSource
from edge_vlm_export.quantize.convert import Calibrated

log = logging.getLogger(__name__)
PLANNED = Precision(vit="int8", llm="int4", head="int4")
"""What a plan of products is for."""


class CalibrationOf:
    """One file, of the weights that are exported."""

    def __init__(self, path: Path, source: WeightSource) -> None:
        """Raises ConfigError for one of other weights, or with nothing for an export."""
        self._path = path
        self._file = Calibration.read(path)
        self._cfg = cfg = source.cfg
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
            *(BudgetSection.SECTION, ChangeSection.SECTION, ReuseSection.SECTION),
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
        """Raises ConfigError, also for one of other products than the model has: what is in neither
        would be rounded plainly, without a word."""
        section = self._file.find(PrecisionSection, self._path)
        if section is None:
            return None
        planned = section.by_module().keys()
        names = shapes(self._cfg)
        modules = {name.removesuffix(".weight") for name in names}
        rounded = {
            name.removesuffix(".weight")
            for name in names
            if weight_format(name, PLANNED) in ("int8", "int4")
        }
        strangers, missing = sorted(planned - modules), sorted(rounded - planned)
        if strangers or missing:
            what = f"does not plan {missing[0]}" if missing else ""
            if strangers:
                what = f"plans {strangers[0]}, which the model does not have"
            raise ConfigError(
                f"the section 'precision' is not of this model's products: it {what} "
                f"({len(strangers)} such, {len(missing)} missing)",
                where=self._path,
                remedy=REMEDY,
            )
        return Calibrated(section.by_module(), PlannedArrays.of(section, self._path))

    def notes(self, precision: Precision, *, measures: bool, reuse: bool) -> list[str]:
        """What becomes of plan, ranges and reuse in an export of this precision, a line each.
        `measures`: footage of its own is looked at. Raises ConfigError."""
        note = None if reuse else reuse_left_out(self._file, self._path)
        lines = [] if note is None else [note]
        if PrecisionSection.SECTION in self._file.sections:
            if follow := _followed_by(precision):
                lines.append(f"the calibration's plan is followed by {', '.join(follow)}")
            else:
                lines.append(
                    "the calibration's plan is left out: it is for int8 vision products and int4 "
                    f"language products, and precision {precision.label} has neither"
                )
        if CalibrationTable.SECTION in self._file.sections and not measures:
            lines.append(
                "the calibration's ranges are left out: they are added to those of --footage, and "
                "none is measured here"
            )
        return lines

    def footage(self, precision: Precision) -> tuple[str, ...]:
        """Names of the clips that the plan comes from, where it is followed."""
        section = self._file.sections.get(PrecisionSection.SECTION)
        if section is None or not _followed_by(precision):
            return ()
        return tuple(clip.name for clip in section.provenance.clips)

    def over(self, defaults: Mapping[str, Any], *, reuse: bool) -> Mapping[str, Any]:
        """`defaults` with the calibrated settings in their place. Raises ConfigError."""
        settings = session_settings(self._file, self._path, can_reuse=reuse)
        if not self._file.model.is_same(self._identity):
            if settings:
                log.warning(
                    "the calibration's settings of sessions are left out: they are for scorer %r, "
                    "this bundle's is %r; calibrate the bundle for its own",
                    self._file.model.scorer,
                    self._identity.scorer,
                )
            return defaults
        return with_settings(defaults, settings)


def _followed_by(precision: Precision) -> list[str]:
    """Which products a plan decides on."""
    wanted = {
        f"{PLANNED.vit} vision products": precision.vit == PLANNED.vit,
        f"{PLANNED.llm} language products": precision.llm == PLANNED.llm,
        f"the {PLANNED.head} language head": precision.head == PLANNED.head,
    }
    return [name for name, is_wanted in wanted.items() if is_wanted]
