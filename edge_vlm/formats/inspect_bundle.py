"""What `edge-vlm inspect` says of a bundle. Opening it has checked every file's hash."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from edge_vlm.formats.bundle import PRECISION_PLAN, EngineBundle
from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm.formats.report import Report


def describe_bundle(folder: Path) -> Report:
    """Raises BundleError and its leaves, as opening it does."""
    bundle = EngineBundle.open(folder)
    files = {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    facts = {
        "schema": f"version {bundle.schema_version}, every file has its recorded hash",
        "source": _source(bundle),
        "made with": ", ".join(f"{k} {v}" for k, v in bundle.source.get("made_with", {}).items()),
        "precision": _precision(bundle),
        "variant": f"{bundle.variant.value}, cache {bundle.kv_layout.value}",
        "scorer": "yes" if bundle.config.scorer is not None else "none: every cell is kept",
        "still pictures": _pictures(bundle),
        "prompt": f"begins with {bundle.style.begin}, answers end at "
        f"{' or '.join(bundle.style.ends)}",
        "defaults": ", ".join(f"{k}={v}" for k, v in bundle.defaults.items()) or "none",
    }
    facts |= {f"graph {name}": _ranges(spec) for name, spec in bundle.specs.items()}
    tables = {"files": {name: (size, "bytes") for name, size in files.items()}}
    tables["files"]["all"] = (sum(files.values()), "bytes")
    plan = _plan(bundle)
    notes = () if plan is None else tuple(_formats(plan))
    return Report(
        title=f"{folder}: bundle {bundle.name!r}",
        facts=facts,
        tables=tables,
        notes=notes,
        data={
            "name": bundle.name,
            "model": bundle.config.to_dict(),
            "precision": bundle.precision.to_dict(),
            "variant": bundle.variant.value,
            "source": dict(bundle.source),
            "graphs": {name: spec.to_dict() for name, spec in bundle.specs.items()},
        },
    )


def _source(bundle: EngineBundle) -> str:
    source = bundle.source
    if "random_weights" in source:
        return f"random weights of the shape {source['random_weights']}, seed {source['seed']}"
    hashes = source.get("sha256", {})
    weights = [f"{k} sha256 {v[:12]}" for k, v in hashes.items() if k.endswith(".safetensors")]
    return ", ".join([f"checkpoint {source.get('checkpoint', 'unknown')}", *weights])


def _precision(bundle: EngineBundle) -> str:
    parts = ", ".join(f"{part} {kind}" for part, kind in bundle.precision.to_dict().items())
    return f"{bundle.precision.label} ({parts})"


def _pictures(bundle: EngineBundle) -> str:
    images = bundle.images
    if images is None:
        return "none: the model reads video only"
    return f"up to {images.max_crops} crops, {images.pool}x{images.pool} patches a token"


def _ranges(spec: GraphSpec) -> str:
    dims = " ".join(f"{name}={d.min}..{d.max}" for name, d in spec.dims.items())
    return f"{len(spec.inputs)} inputs, {len(spec.outputs)} outputs, {dims}"


def _plan(bundle: EngineBundle) -> dict[str, Any] | None:
    path = bundle.path / PRECISION_PLAN
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _formats(plan: dict[str, Any]) -> list[str]:
    """One line a graph: how many nodes compute in which format."""
    lines = []
    for name, nodes in plan["graphs"].items():
        formats = Counter(node["dtype"] for node in nodes if node["dtype"] != "as input")
        weights = Counter(node["weights"] for node in nodes if "weights" in node)
        counted = [f"{count} nodes {kind}" for kind, count in sorted(formats.items())]
        counted += [f"{count} with {kind} weights" for kind, count in sorted(weights.items())]
        lines.append(f"{name}: {', '.join(counted)}")
    return lines
