"""What was seen of a product and what was decided about it, as the section has it."""

from __future__ import annotations

from edge_vlm.formats.calibrated.precision import KEPT, ProductPlan
from edge_vlm_calibration.precision.states import States


def product_plan(
    module: str,
    seen: States,
    reason: str,
    *,
    weights: str = KEPT,
    activations: str | None = None,
    method: str = "none",
    reach: float | None = None,
    error_nearest: float = 0.0,
    error: float = 0.0,
) -> ProductPlan:
    """`seen`: what went in. By default the product is kept as it is."""
    return ProductPlan(
        module=module,
        weights=weights,
        activations=activations,
        method=method,
        max_abs=seen.max_abs,
        typical=seen.typical,
        outliers=seen.outliers,
        range=reach,
        error_nearest=error_nearest,
        error=error,
        reason=reason if weights != KEPT else f"stays float: {reason}",
    )
