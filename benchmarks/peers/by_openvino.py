"""The part `openvino`: as benchmarks/runtime/cpu_backends.py, on the demo bundle."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from benchmarks.peers.missing import NotInstalled
from benchmarks.runtime.cpu_backends import measured, sizes_of
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.engines.openvino import (
    BFLOAT16,
    FLOAT32,
    OpenVinoEngine,
    multiplies_bfloat16,
    openvino_version,
)
from edge_vlm_runtime.engines.ort import OrtEngine, ort_library


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Each graph. Raises NotInstalled."""
    if importlib.util.find_spec("openvino") is None:
        raise NotInstalled("openvino is missing: pip install 'edge-vlm[openvino]'")
    bundle = EngineBundle.open(DEMO_BUNDLE)
    cells = bundle.config.vision.num_cells
    graphs = {}
    for name, spec in bundle.specs.items():
        ours = OrtEngine(bundle, name, threads=args.threads)
        engines: dict[str, OrtEngine | OpenVinoEngine] = {"ort": ours}
        for numbers in (FLOAT32, BFLOAT16) if multiplies_bfloat16() else (FLOAT32,):
            engines[f"openvino {numbers}"] = OpenVinoEngine(
                bundle, name, threads=args.threads, precision=numbers
            )
        graphs[name] = [
            measured(engines, spec, sizes, cells, args.rounds) for sizes in sizes_of(spec, cells)
        ]
        for engine in engines.values():
            engine.close()
    versions = {"onnxruntime": ort_library()[0], "openvino": openvino_version()}
    return {"versions": versions, "bundle": bundle.name, "graphs": graphs}
