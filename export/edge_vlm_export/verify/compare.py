"""Two results of one graph, side by side: how far apart, how parallel, and is that good enough.

A float32 graph must equal torch. One that was quantised cannot; its outputs must still point the
same way, which their cosine says without regard to scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_vlm.console.tables import columns
from edge_vlm.errors import NonFinite
from edge_vlm.errors.export import ParityError
from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm.formats.precision import Precision
from edge_vlm_export.verify.pipeline import Arrays

TOLERANCE = 1e-4
"""Largest |difference| allowed, in units of the largest |expected value| where that exceeds 1."""
COSINES = {"float32": 0.99999, "float16": 0.999, "int8": 0.98, "int4": 0.8}
"""Least cosine allowed with torch in float32, by the coarsest format in a graph.

It has to hold for every output alone, so that one token deep in an untrained model passes too: with
int4 that was seen to be 0.898, in a trained model 0.975. Weights in a wrong place are near 0."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One graph at one size: the first output that is out of tolerance, or the one nearest to it.

    "First" is the order in which a graph computes them.
    """

    graph: str
    sizes: Mapping[str, int]
    tensor: str
    difference: float
    """Largest |difference|; NaN if either side is not finite."""
    allowed: float | None
    """None where only the direction counts."""
    cosine: float
    least_cosine: float

    @property
    def ok(self) -> bool:
        near = self.allowed is None or self.difference <= self.allowed  # False for NaN
        return near and np.isfinite(self.difference) and self.cosine >= self.least_cosine


def coarsest(graph: str, precision: Precision) -> str:
    """The coarsest format among a graph's weights and activations."""
    used = [precision.base]
    language = [precision.llm, precision.head, precision.cache]
    used += language if graph.startswith("llm") else [precision.vit]
    return min(used, key=lambda kind: COSINES.get(kind, 1.0))


def compare(
    spec: GraphSpec,
    sizes: Mapping[str, int],
    got: Arrays,
    expected: Arrays,
    precision: Precision,
) -> Comparison:
    """Every output of the spec."""
    kind = coarsest(spec.name, precision)
    results = []
    for name in in_order(spec):
        a, b = got[name].astype(np.float64), expected[name].astype(np.float64)
        if name.startswith("present_"):  # the past was given, and what comes after is anybody's
            a, b = (x[:, :, sizes["p"] : sizes["p"] + sizes["s"]] for x in (a, b))
        allowed = TOLERANCE * max(1.0, float(np.abs(b).max())) if kind == "float32" else None
        results.append(
            Comparison(
                graph=spec.name,
                sizes=dict(sizes),
                tensor=name,
                difference=float(np.abs(a - b).max()),
                allowed=allowed,
                cosine=cosine(a, b),
                least_cosine=COSINES[kind],
            )
        )
    bad = [result for result in results if not result.ok]
    return bad[0] if bad else min(results, key=_margin)


def _margin(result: Comparison) -> float:
    if result.allowed is not None:
        return 1 - result.difference / result.allowed
    return result.cosine


def in_order(spec: GraphSpec) -> list[str]:
    """Output names, those that are computed last at the end."""
    return sorted((t.name for t in spec.outputs), key=lambda name: name in ("hidden", "logits"))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two arrays as vectors; 1 for two zero vectors, NaN if either is not finite."""
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    norm = float(np.sqrt((a @ a) * (b @ b)))
    if norm == 0:
        return 1.0 if a @ a == b @ b else 0.0
    return float(a @ b) / norm


def require_parity(results: Sequence[Comparison]) -> None:
    """Raises NonFinite or ParityError naming the first tensor that is not within tolerance."""
    bad = [result for result in results if not result.ok]
    if not bad:
        return
    first = bad[0]
    where = f"{first.tensor} of graph {first.graph} at {dict(first.sizes)}"
    if not np.isfinite(first.difference):
        raise NonFinite(f"{where} is not finite")
    limit = "" if first.allowed is None else f" (allowed {first.allowed:.2e})"
    raise ParityError(
        f"{len(bad)} of {len(results)} comparisons fail, the first is {where}: max |difference| "
        f"{first.difference:.2e}{limit}, cosine {first.cosine:.6f} (at least "
        f"{first.least_cosine})"
    )


def format_table(results: Sequence[Comparison]) -> str:
    """One line per comparison, columns aligned."""
    head = ("graph", "sizes", "output", "max |diff|", "allowed", "cosine", "")
    rows = [
        (
            r.graph,
            " ".join(f"{name}={size}" for name, size in r.sizes.items()),
            r.tensor,
            f"{r.difference:.2e}",
            "-" if r.allowed is None else f"{r.allowed:.2e}",
            f"{r.cosine:.6f}",
            "ok" if r.ok else "DIFFERS",
        )
        for r in results
    ]
    return "\n".join(columns([head, *rows]))
