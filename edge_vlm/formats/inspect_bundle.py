"""What `edge-vlm inspect` says of a bundle. Opening it has checked every file's hash."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from edge_vlm.config import ModelConfig, VisionAttention
from edge_vlm.errors import BundleSchemaError
from edge_vlm.formats.bundle import PRECISION_PLAN, VIT_STEM_REUSE, EngineBundle
from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm.formats.report import Report
from edge_vlm.json_text import MALFORMED, fault_of, read_json_object
from edge_vlm.pruning.clip_budget import Variant, variant_of


def describe_bundle(folder: Path) -> Report:
    """Raises BundleError and its leaves, as opening it does."""
    bundle = EngineBundle.open(folder)
    try:
        return _described(folder, bundle)
    except (OSError, *MALFORMED) as error:
        raise BundleSchemaError(
            f"its notes about itself are malformed: {fault_of(error)}",
            where=folder,
            remedy="export the checkpoint again",
        ) from error


def _described(folder: Path, bundle: EngineBundle) -> Report:
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
        **serving_facts(bundle),
        "still pictures": _pictures(bundle),
        "prompt": f"begins with {bundle.style.begin}, answers end at "
        f"{' or '.join(bundle.style.ends)}",
        "defaults": ", ".join(f"{k}={v}" for k, v in bundle.defaults.items()) or "none",
    }
    if bundle.card is not None:
        facts["what it knows"] = bundle.card.summary
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


def serving_facts(bundle: EngineBundle) -> dict[str, str]:
    """What whoever asks the model should know: what chooses cells, who sees whom, how much video
    is looked at, and how long answers get."""
    cfg, dims = bundle.config, bundle.specs["llm"].dims
    answers = bundle.defaults.get("max_answer_tokens")
    at_once = cfg.attention is VisionAttention.ALL
    room = min(dims["s" if at_once else "p"].max, cfg.language.max_positions)
    return {
        "scorer": scorer_text(cfg),
        "reuse": "changed cells only, where a session sets reuse"
        if VIT_STEM_REUSE in bundle.specs
        else "none: every cell of a frame is computed in front of the scorer (export --reuse)",
        "attention": ATTENTIONS[cfg.attention],
        "room for video": f"{room:,} tokens {'in one run' if at_once else 'of cache'}, less what "
        f"question and answer take: {room // (cfg.vision.num_cells + MARKERS)} frames at most, if "
        "every cell is kept",
        "answers": "cut where the session says (max_answer_tokens)"
        if answers is None
        else f"cut after {answers} tokens (max_answer_tokens)",
    }


MARKERS = 7
"""Tokens of a frame's time and markers, about."""
ATTENTIONS = {
    VisionAttention.ALL: "all: frames see each other both ways and are read anew when one has come",
    VisionAttention.FRAME: "frame: each frame sees itself and what came before, and stays cached",
}


def scorer_text(cfg: ModelConfig) -> str:
    if cfg.change is not None:
        block = cfg.change.after_block
        return f"change since a cell was last kept, behind block {block}; no weights, no training"
    if cfg.scorer is None:
        return (
            "none: every cell is kept, unless by pixels (policy difference); "
            "export --scorer change adds one"
        )
    return f"learned, behind block {cfg.scorer.prune_at}; {BUDGETS[variant_of(cfg)]}"


BUDGETS: dict[Variant, str] = {
    "published": "published STTS: a file's cells are chosen over all of it (policy clip), a "
    "stream's as they come",
    "first_whole": "cells are chosen as frames come",
}


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
    return read_json_object(path) if path.is_file() else None


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
