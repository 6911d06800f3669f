"""What a cache of float16 costs a CPU in time for the half of its memory that it saves.

    python -m benchmarks.export.cache_format

Two layers of Molmo2-4B's language model in int4, weights made up, with few words so that the layers
are what is measured. Either cache, exported for ONNX Runtime (`--variant ort`: one buffer, added to
in place) and in standard operators (portable, the graph for one token). One token behind pasts of
several lengths, the forms in turn.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.export.full_size_export import TOKENIZER
from benchmarks.harness import (
    RESULTS,
    in_turn,
    made_folder,
    progress,
    result_head,
    script_parser,
    summary,
    write_result,
)
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.precision import Precision, Variant
from edge_vlm.memory import row_bytes
from edge_vlm.presets import molmo2_4b, tiny
from edge_vlm_export.graphs.graphs import KVForm
from edge_vlm_export.graphs.weights import made_up_weights
from edge_vlm_export.to_onnx import ExportOptions, export_source
from edge_vlm_runtime.engines.ort import OrtEngine
from edge_vlm_runtime.planning.check import bind_noise

CACHES = {"float32": "int4", "float16": "int4,cache=float16"}
GRAPHS = {Variant.ORT: "llm", Variant.PORTABLE: "llm_decode"}
DEVICE = torch.device("cpu")


def exported(folder: Path, variant: Variant, precision: str, *, is_tiny: bool) -> EngineBundle:
    cfg = tiny(179, 3)
    if not is_tiny:
        small = cfg.language
        layers = replace(molmo2_4b().language, num_layers=2)
        cfg = replace(
            cfg,
            language=replace(layers, base_vocab=small.base_vocab, extra_vocab=small.extra_vocab),
        )
    options = ExportOptions(
        precision=Precision.parse(precision),
        variant=variant,
        kv_form=KVForm.BOTH if variant is Variant.PORTABLE else KVForm.CONCAT,
        thorough=False,
        threads=2,
    )
    return export_source(made_up_weights(cfg, 0, TOKENIZER, "cache"), folder, options)


def measured(scratch: Path, variant: Variant, args: Any) -> dict[str, Any]:
    """By cache: bytes a token in all layers; by length of the past: seconds of one token."""
    bundles = {
        cache: exported(scratch / f"{variant.value}-{cache}", variant, text, is_tiny=args.tiny)
        for cache, text in CACHES.items()
    }
    name = GRAPHS[variant]
    found: dict[str, Any] = {
        "bytes_a_token": {
            cache: row_bytes(bundle.config.language, bundle.specs[name])
            for cache, bundle in bundles.items()
        },
        "past": {},
    }
    with ExitStack() as stack:
        engines = {
            cache: stack.enter_context(closing(OrtEngine(bundle, name, threads=args.threads)))
            for cache, bundle in bundles.items()
        }
        for past in args.past:
            sizes = {"s": 1, "p": past, "n": 1, "C": past + 1}
            for cache, engine in engines.items():
                dims = bundles[cache].specs[name].dims
                bind_noise(engine, {axis: size for axis, size in sizes.items() if axis in dims})
            seconds = in_turn(
                {cache: engine.run for cache, engine in engines.items()},
                rounds=args.rounds,
                warmups=3,
                device=DEVICE,
                say=lambda line: None,
                clock=time.perf_counter,
            )
            row: dict[str, Any] = {cache: summary(taken) for cache, taken in seconds.items()}
            row["times"] = round(row["float16"]["median_s"] / row["float32"]["median_s"], 3)
            found["past"][str(past)] = row
            progress(f"{variant.value}, behind {past}: {row['times']} times as long in float16")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "cache_format.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--past", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--tiny", action="store_true", help="the test model instead")
    parser.add_argument("--scratch", type=made_folder, help="folder with room for the bundles")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        found = {
            variant.value: measured(Path(scratch), variant, args)
            for variant in (Variant.ORT, Variant.PORTABLE)
        }
    result = {**result_head(__file__, argv, DEVICE), "clock": "wall", "threads": args.threads}
    write_result(args.out, {**result, "variants": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
