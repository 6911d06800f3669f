"""The vision blocks' products as int8, inputs and weights: which stand it, smoothed how far.

Shape letters: K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from edge_vlm.formats.calibrated.precision import ArraysWriter, ProductPlan
from edge_vlm.formats.calibration import FP16_LIMIT
from edge_vlm.model.video_lm import VideoLM
from edge_vlm_calibration.precision.plans import product_plan
from edge_vlm_calibration.precision.smoothing import Smoothed, choose, output_error
from edge_vlm_calibration.precision.states import States

LIMIT_INT8 = 0.02
"""Largest share of a product's variance that int8 may lose; past it, it stays float."""
SAMPLE = 256
"""States of each product to choose by, and as many to judge by."""
GROUPS = {
    ("attn.q", "attn.k", "attn.v"): "norm1",
    ("attn.o",): None,
    ("fc1",): "norm2",
    ("fc2",): None,
}
"""Products of a block that share an input, and the norm that could take up their smoothing."""


def watched_products(model: VideoLM) -> dict[str, nn.Module]:
    """The modules whose inputs are to be seen: the first of each group, and all of the
    connector's products."""
    found: dict[str, nn.Module] = {}
    for number, block in enumerate(model.vit.blocks):
        for group in GROUPS:
            found[f"vit.blocks.{number}.{group[0]}"] = block.get_submodule(group[0])
    connector = model.connector.named_modules(prefix="connector")
    return found | {name: module for name, module in connector if isinstance(module, nn.Linear)}


def new_states(modules: Mapping[str, nn.Module]) -> dict[str, States]:
    return {name: States(SAMPLE) for name in modules}


@torch.inference_mode()
def plan_vision(
    model: VideoLM, states: Mapping[str, States], arrays: ArraysWriter
) -> Iterator[ProductPlan]:
    """Of states that passed through `watched_products`; writes the smoothing factors."""
    for number, block in enumerate(model.vit.blocks):
        for group, norm in GROUPS.items():
            prefix = f"vit.blocks.{number}"
            seen = states[f"{prefix}.{group[0]}"]
            weights = [_weight(block.get_submodule(leaf)) for leaf in group]
            assert seen.channels is not None
            how = choose(seen.chosen_by, seen.channels, weights, foldable=norm is not None)
            errors = [_errors(seen, weight, how) for weight in weights]
            # A norm can be scaled only if all of its products take the scaled weights.
            stands = max(error for error, _ in errors) <= LIMIT_INT8
            if norm is not None and stands and how.factor_K is not None:
                arrays.smoothing(f"{prefix}.{norm}", how.factor_K.numpy())
            for leaf, (error, plain) in zip(group, errors, strict=True):
                yield _int8(f"{prefix}.{leaf}", seen, how, error, plain, stands)
    for name, seen in states.items():
        if name.startswith("connector."):
            past = ", and it is past what float16 is trusted with" * (seen.max_abs > FP16_LIMIT)
            why = f"the connector is computed once a cell, at little cost{past}"
            yield product_plan(name, seen, why)


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module, nn.Linear)
    return module.weight.detach().float().T


def _errors(seen: States, weight_KN: Tensor, how: Smoothed) -> tuple[float, float]:
    """As chosen, and plainly rounded over the whole range."""
    judged = seen.judged_by
    planned = output_error(judged, weight_KN, how.factor_K, how.range)
    return planned, output_error(judged, weight_KN, None, seen.max_abs)


def _int8(
    name: str, seen: States, how: Smoothed, error: float, plain: float, stands: bool
) -> ProductPlan:
    lost = f"int8 loses {error:.2%} of what it computes, plainly rounded {plain:.2%}"
    if not stands:
        why = f"{lost}; more than {LIMIT_INT8:.0%} in it or in what shares its input"
        return product_plan(name, seen, why, error_nearest=plain)
    parts = [lost, f"smoothed by {how.strength:g}"] if how.strength else [lost]
    assert seen.channels is not None
    whole = float((seen.channels if how.factor_K is None else seen.channels / how.factor_K).amax())
    if how.range < 0.99 * whole:
        parts.append(f"cut at {how.range / whole:.0%} of its range")
    return product_plan(
        name,
        seen,
        "; ".join(parts),
        weights="int8",
        activations="int8",
        method="smoothed" if how.strength else "nearest",
        reach=how.range,
        error_nearest=plain,
        error=error,
    )
