"""Each graph of a bundle by ONNX Runtime and by OpenVINO, in turn: which is faster on this CPU.

    python -m benchmarks.runtime.cpu_backends                              # the demo bundle
    python -m benchmarks.runtime.cpu_backends BUNDLE --graphs vit_trunk
    python -m benchmarks.runtime.cpu_backends --full-width int4 --threads 2

Processor seconds of all threads, of made-up inputs of usual sizes, and the cosine of the outputs
with those of ONNX Runtime. `--full-width`: Molmo2-4B with made-up weights, two blocks in each of
trunk and language model, its whole head. `--backend auto` follows from it, see docs/serving.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
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
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm.formats.precision import Precision
from edge_vlm.presets import molmo2_4b
from edge_vlm_export.graphs.graphs import KVForm
from edge_vlm_export.graphs.weights import made_up_weights
from edge_vlm_export.to_onnx import ExportOptions, export_source
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.engines.base import Engine
from edge_vlm_runtime.engines.openvino import BFLOAT16, FLOAT32, OpenVinoEngine, openvino_version
from edge_vlm_runtime.engines.ort import OrtEngine, ort_library

PASTS = (0, 512, 2048)


def sizes_of(spec: GraphSpec, cells: int) -> list[dict[str, int]]:
    """What a stream asks of the graph: a frame at several budgets, its tokens, one token."""
    wanted: Mapping[str, list[dict[str, int]]] = {
        "vit_trunk": [{"G": count} for count in (cells, (cells + 1) // 2, max(1, cells // 5))],
        "llm": [{"s": 48, "p": past} for past in PASTS[:2]],
        "llm_decode": [{"p": past} for past in PASTS],
    }
    found = []
    for sizes in wanted.get(spec.name, [{}]):
        full = {name: sizes.get(name, limits.min) for name, limits in spec.dims.items()}
        found.append({name: min(size, spec.dims[name].max) for name, size in full.items()})
    return found


def inputs_of(spec: GraphSpec, sizes: Mapping[str, int], cells: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for tensor in spec.inputs:
        array = spec.zeros(tensor, sizes)
        if np.issubdtype(array.dtype, np.floating) and tensor.name != "attn_bias":
            array[...] = rng.standard_normal(array.shape) * 0.5
        if tensor.name == "cell_idx":
            array[...] = np.sort(rng.permutation(cells)[: len(array)])
        arrays[tensor.name] = array
    return arrays


def measured(
    engines: Mapping[str, Engine], spec: GraphSpec, sizes: dict[str, int], cells: int, rounds: int
) -> dict[str, Any]:
    inputs = inputs_of(spec, sizes, cells)
    outputs: dict[str, np.ndarray] = {}
    runs: dict[str, Callable[[], object]] = {}
    for name, engine in engines.items():
        for tensor in spec.inputs:
            engine.bind_array(tensor.name, inputs[tensor.name])
        for tensor in spec.outputs:
            array = spec.zeros(tensor, sizes)
            engine.bind_array(tensor.name, array)
            if tensor.name in ("hidden", "features", "logits"):
                outputs[name] = array
        runs[name] = engine.run
    seconds = in_turn(
        runs,
        rounds=rounds,
        warmups=2,
        device=torch.device("cpu"),
        say=lambda line: None,
        clock=time.process_time,
    )
    exact = outputs["ort"].ravel().astype(np.float64)
    cases = {}
    for name, found in seconds.items():
        got = outputs[name].ravel().astype(np.float64)
        cosine = float(got @ exact / np.linalg.norm(got) / np.linalg.norm(exact))
        ratio = round(speed_up(seconds["ort"], found), 2)
        cases[name] = summary(found) | {"ratio": ratio, "cosine": round(cosine, 6)}
    shown = {n: f"{c['median_s'] * 1e3:.2f} ms ({c['ratio']})" for n, c in cases.items()}
    progress(f"{spec.name} {sizes}: {shown}")
    return {"sizes": sizes, "cases": cases}


def full_width(precision: str, scratch: Path) -> Path:
    """The bundle, exported unless it lies there already."""
    folder = scratch / f"full-width-{precision}"
    if not folder.is_dir():
        cfg = molmo2_4b()
        cfg = replace(
            cfg,
            vision=replace(cfg.vision, num_layers=7, feature_layers=(6, 5)),
            language=replace(cfg.language, num_layers=2),
        )
        progress("exporting ...")
        options = ExportOptions(
            precision=Precision.parse(precision), kv_form=KVForm.BOTH, thorough=False
        )
        export_source(made_up_weights(cfg, 0, TOKENIZER, "full-width"), folder, options)
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "cpu_backends.json")
    parser.add_argument("bundle", nargs="?", type=Path, default=DEMO_BUNDLE)
    parser.add_argument("--full-width", metavar="PRECISION", help="instead of a bundle")
    parser.add_argument("--scratch", type=made_folder, help="folder with room for such a bundle")
    parser.add_argument("--graphs", nargs="+", help="only these")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args(argv)
    with ExitStack() as stack:
        folder = args.bundle
        if args.full_width is not None:
            scratch = args.scratch or stack.enter_context(tempfile.TemporaryDirectory())
            folder = full_width(args.full_width, Path(scratch))
        return measure(args, argv, EngineBundle.open(folder))


def measure(args: argparse.Namespace, argv: list[str] | None, bundle: EngineBundle) -> int:
    cells = bundle.config.vision.num_cells
    graphs: dict[str, Any] = {}
    for name in args.graphs or bundle.specs:
        engines: dict[str, Engine] = {"ort": OrtEngine(bundle, name, threads=args.threads)}
        for numbers in (FLOAT32, BFLOAT16):
            engines[f"openvino {numbers}"] = OpenVinoEngine(
                bundle, name, threads=args.threads, precision=numbers
            )
        spec = bundle.specs[name]
        graphs[name] = [
            measured(engines, spec, sizes, cells, args.rounds) for sizes in sizes_of(spec, cells)
        ]
        for engine in engines.values():
            engine.close()
    result = {
        **result_head(__file__, argv, torch.device("cpu")),
        "bundle": bundle.name,
        "threads": args.threads,
        "onnxruntime": ort_library()[0],
        "openvino": openvino_version(),
        "unit": "processor s",
        "graphs": graphs,
    }
    write_result(args.out, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
