"""Engines of full-width layers: are they parsed and built, how large do they and their builder get.

    python -m benchmarks.export.wide_engines                           # fp32
    python -m benchmarks.export.wide_engines --precision int4

Molmo2-4B with two language layers, six vision blocks and a small vocabulary, weights made up, is
exported and built by TensorRT for RTX for SM89 and SM120, every graph in every profile. No GPU is
needed, and none is used: nothing is run.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.export.full_size_export import TOKENIZER
from benchmarks.harness import (
    RESULTS,
    made_folder,
    progress,
    result_head,
    script_parser,
    write_result,
)
from edge_vlm.config import ModelConfig
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.precision import Precision
from edge_vlm.presets import molmo2_4b, tiny
from edge_vlm_export.graphs.graphs import KVForm
from edge_vlm_export.graphs.weights import made_up_weights
from edge_vlm_export.to_onnx import ExportOptions, export_source
from edge_vlm_runtime.engines.build import BuildOptions, build_engines
from edge_vlm_runtime.engines.store import graph_bytes

TARGETS = ("sm_89", "sm_120")


def shallow() -> ModelConfig:
    """Full width and few layers; the vocabulary is not what is tried here."""
    cfg = molmo2_4b()
    return replace(
        cfg,
        vision=replace(cfg.vision, num_layers=6, feature_layers=(5, 4)),
        language=replace(cfg.language, num_layers=2, base_vocab=1024, extra_vocab=128),
    )


def export(is_tiny: bool, precision: str, folder: Path) -> None:
    source = made_up_weights(tiny(179, 3) if is_tiny else shallow(), 0, TOKENIZER, "wide")
    options = ExportOptions(
        precision=Precision.parse(precision), kv_form=KVForm.BOTH, thorough=False, threads=2
    )
    export_source(source, folder, options)


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--precision", default="fp32", help="one that needs no footage")
    parser.add_argument("--tiny", action="store_true", help="the test model instead")
    parser.add_argument("--scratch", type=made_folder, help="folder with room for all of it")
    args = parser.parse_args(argv)
    out = args.out or RESULTS / f"engines_wide_{args.precision}.json"
    graphs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="engines-", dir=args.scratch) as scratch:
        progress("exporting ...")
        # In a process of its own: a builder's peak memory counts what its parent held.
        job = multiprocessing.get_context("spawn").Process(
            target=export, args=(args.tiny, args.precision, Path(scratch) / "bundle")
        )
        job.start()
        job.join()
        if job.exitcode != 0:
            return 1
        bundle = EngineBundle.open(Path(scratch) / "bundle")
        for name in bundle.specs:
            built = build_engines(
                bundle,
                Path(scratch) / "engines",
                BuildOptions(library="tensorrt_rtx", targets=TARGETS),
                graphs=[name],
            )
            entry = built[name].entry
            graphs[name] = {
                "weights_mb": round(graph_bytes(bundle, name) / 1e6, 1),
                "engine_mb": round(entry.path.stat().st_size / 1e6, 1),
                "build_s": entry.build["seconds"],
                "peak_memory_gb": round(entry.build["peak_bytes"] / 1e9, 2),
                "warnings": entry.build["warnings"],
            }
            print(f"{name}: {graphs[name]}", flush=True)
            version = entry.fingerprint.library_version
    result = {
        **result_head(__file__, argv, torch.device("cpu")),
        "tensorrt_rtx": version,
        "targets": TARGETS,
        "precision": args.precision,
        "graphs": graphs,
    }
    write_result(out, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
