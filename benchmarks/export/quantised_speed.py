"""Integers against float32 on this CPU, at full width, in turn in one run.

    python -m benchmarks.export.quantised_speed

Molmo2-4B with made-up weights: two vision blocks and the connector on one frame's kept cells, two
language blocks and the head for one token after a past. Each float32 graph is traced once and
converted by the exporter's own code: int8 with standard operators (Q/DQ), with ONNX Runtime's, and
the first of these by OpenVINO; int4 with both. Processor seconds of all threads; ranges are made
up, too, so that only speed is to be read from it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import openvino
import torch

from benchmarks.export.full_size_export import TOKENIZER
from benchmarks.harness import (
    RESULTS,
    in_turn,
    made_folder,
    progress,
    result_head,
    script_parser,
    speed_up,
    summary,
    write_result,
)
from benchmarks.runtime.cpu_backends import inputs_of
from edge_vlm.config import VisionAttention
from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm.formats.precision import Precision, Variant
from edge_vlm.presets import molmo2_4b
from edge_vlm_export.graphs.graphs import graph_specs
from edge_vlm_export.graphs.modules import graph_module
from edge_vlm_export.graphs.weights import made_up_weights
from edge_vlm_export.quantize.convert import Ranges, convert
from edge_vlm_export.quantize.plan import plan_graph
from edge_vlm_export.trace.graph_files import load_graph, save_graph
from edge_vlm_export.trace.trace import hollow_model, trace

RANGE = 4.0
"""Of every tensor; speed does not depend on it."""
CASES: Mapping[str, tuple[tuple[str, Precision, Variant], ...]] = {
    "vit_trunk": (
        ("int8 standard", Precision(vit="int8"), Variant.PORTABLE),
        ("int8 ort", Precision(vit="int8"), Variant.ORT),
    ),
    "llm": (
        ("int4 standard", Precision(llm="int4", head="int8"), Variant.PORTABLE),
        ("int4 ort", Precision(llm="int4", head="int8"), Variant.ORT),
        ("int4 ort, int4 head", Precision(llm="int4", head="int4"), Variant.ORT),
    ),
}
SIZES: Mapping[str, tuple[dict[str, int], ...]] = {
    "vit_trunk": ({"F": 1, "G": 81}, {"F": 1, "G": 41}, {"F": 1, "G": 16}),
    "llm": ({"s": 1, "p": 512, "n": 1}, {"s": 1, "p": 2048, "n": 1}),
}
OPENVINO_OF = "int8 standard"


def written(folder: Path, graph: str) -> tuple[GraphSpec, dict[str, Path]]:
    """The graph in float32 and in its other forms."""
    cfg = molmo2_4b()
    cfg = replace(
        cfg,
        attention=VisionAttention.FRAME,
        scorer=None,
        vision=replace(cfg.vision, num_layers=2, feature_layers=(1, 0)),
        language=replace(cfg.language, num_layers=2),
    )
    source = made_up_weights(cfg, 0, TOKENIZER, "full-width")
    spec = graph_specs(cfg)[graph]
    plain = folder / f"{graph}-fp32.onnx"
    save_graph(trace(graph_module(graph, hollow_model(cfg)), spec, source.read), plain)
    paths = {"fp32": plain}
    for name, precision, variant in CASES[graph]:
        model = load_graph(plain)
        values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
        seen = {str(value.name): RANGE for value in values}
        plan = plan_graph(model.graph, spec, precision, seen)
        convert(model, spec, plan, Ranges(seen, {}), variant)
        paths[name] = folder / f"{graph}-{name.replace(' ', '-').replace(',', '')}.onnx"
        save_graph(model, paths[name])
        progress(f"{graph}: {name} written")
    return spec, paths


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """With the runtime's options."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.qdq_matmulnbits_block_size", "128")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def compiled(path: Path, threads: int) -> Any:
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(str(path), "CPU", options)


def size_mb(path: Path) -> float:
    weights = path.with_suffix(".weights")
    return round(sum(p.stat().st_size for p in (path, weights) if p.is_file()) / 1e6, 1)


def measured(graph: str, folder: Path, threads: int, rounds: int) -> dict[str, Any]:
    spec, paths = written(folder, graph)
    cells = molmo2_4b().vision.num_cells
    sessions = {name: session(path, threads) for name, path in paths.items()}
    other = compiled(paths[OPENVINO_OF], threads) if OPENVINO_OF in paths else None
    found = []
    for sizes in SIZES[graph]:
        inputs = inputs_of(spec, sizes, cells)
        runs: dict[str, Callable[[], object]] = {
            name: partial(opened.run, None, inputs) for name, opened in sessions.items()
        }
        if other is not None:
            runs[f"{OPENVINO_OF}, by OpenVINO"] = partial(other, inputs)
        seconds = in_turn(
            runs,
            rounds=rounds,
            warmups=2,
            device=torch.device("cpu"),
            say=lambda line: None,
            clock=time.process_time,
        )
        cases = {
            name: summary(taken) | {"times_faster": round(speed_up(seconds["fp32"], taken), 2)}
            for name, taken in seconds.items()
        }
        shown = {n: f"{c['median_s'] * 1e3:.1f} ms, {c['times_faster']}x" for n, c in cases.items()}
        progress(f"{graph} {sizes}: {shown}")
        found.append({"sizes": sizes, "cases": cases})
    return {"size_mb": {name: size_mb(path) for name, path in paths.items()}, "runs": found}


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "quantised_speed.json")
    parser.add_argument("--graphs", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--scratch", type=made_folder, help="folder with room for 6 GB")
    args: argparse.Namespace = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {
        **result_head(__file__, argv, torch.device("cpu")),
        "onnxruntime": onnxruntime.__version__,
        "openvino": openvino.__version__,
        "engine_threads": args.threads,
        "unit": "processor s",
    }
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for graph in args.graphs:
            result[graph] = measured(graph, Path(scratch), args.threads, args.rounds)
            write_result(args.out, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
