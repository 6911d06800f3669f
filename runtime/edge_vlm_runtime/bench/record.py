"""The result file: what every one of them says, and the schema that holds it.

`schema.json` beside this module is that schema (JSON Schema 2020-12).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_vlm.errors import ConfigError
from edge_vlm.formats.bundle import MANIFEST, EngineBundle, sha256_of_file
from edge_vlm.json_text import parse_json

FORMAT = "edge-vlm-bench/1"
SCHEMA = Path(__file__).with_name("schema.json")
SECTIONS = ("frames", "answers", "stream", "memory", "energy", "start", "roofline", "layers")
"""In the order in which they are printed; each is null until it was measured."""


@dataclass
class BenchRecord:
    """One measurement, filled section by section."""

    command: str
    device: dict[str, Any]
    model: dict[str, Any]
    workload: dict[str, Any]
    sections: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    ended_by: str | None = None
    """Why it is not complete."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "command": self.command,
            "complete": self.ended_by is None,
            "ended_by": self.ended_by,
            "device": self.device,
            "run": self.run,
            "model": self.model,
            "workload": self.workload,
            **{name: self.sections.get(name) for name in SECTIONS},
            "notes": self.notes,
        }


def model_record(bundle: EngineBundle, backend: str, threads: int) -> dict[str, Any]:
    """What was run, and by what."""
    cfg = bundle.config
    return {
        "name": bundle.name,
        "sha256": sha256_of_file(bundle.path / MANIFEST),
        "precision": bundle.precision.label,
        "variant": bundle.variant.value,
        "kv_layout": bundle.kv_layout.value,
        "attention": cfg.attention.value,
        "backend": backend,
        "threads": threads,
        "shape": {
            "cells": cfg.vision.num_cells,
            "image_size": cfg.vision.image_size,
            "vision_width": cfg.vision.width,
            "vision_blocks": cfg.vision.num_layers,
            "whole_blocks": cfg.whole_blocks,
            "language_width": cfg.language.width,
            "language_blocks": cfg.language.num_layers,
            "vocab": cfg.language.vocab,
        },
    }


def read_record(path: Path) -> dict[str, Any]:
    """Raises ConfigError for what is not a result of `bench`."""
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read as JSON: {error}", where=path) from error
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise ConfigError(
            f"not a result of this bench: format {found!r}",
            where=path,
            remedy=f"need {FORMAT!r}, as `edge-vlm bench --json FILE` writes it",
        )
    checked: dict[str, Any] = data
    return checked


def as_json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1, allow_nan=False) + "\n"
