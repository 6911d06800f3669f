"""What an exact prefill of many frames takes: memory, time, and the second question after it.

    python -m benchmarks.runtime.exact_prefill  # two layers of Molmo2-4B's width, 1 GB of disk
    python -m benchmarks.runtime.exact_prefill --bundle BUNDLE --frames 64  # one that is there

Every number of frames runs in a process of its own. The language graph is given random embeddings,
all frames in one block, and then a question of 20 tokens, twice. Memory is what the process holds
above what it held before the prefill, cache and loaded weights not counted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.export.full_size_export import Memory
from benchmarks.harness import (
    CHECKPOINT,
    RESULTS,
    made_folder,
    result_head,
    script_parser,
    write_result,
)
from edge_vlm.config import VisionAttention
from edge_vlm.formats.precision import Precision, Variant
from edge_vlm.model.checkpoint import read_config
from edge_vlm.presets import molmo2_4b, tiny
from edge_vlm.text.masks import CAUSAL
from edge_vlm_export.graphs.weights import made_up_weights
from edge_vlm_export.to_onnx import ExportOptions, export_source
from edge_vlm_runtime.inference.bundle_model import LoadedBundle

TOKENS = 88
"""Of a frame of 81 cells with its stamp and markers."""
QUESTION = 20


def export_pair(layers: int, frames: int, precision: str, variant: str, out: Path) -> None:
    """The language model of Molmo2-4B in fewer layers, with the demo's words and a tiny ViT."""
    words = read_config(CHECKPOINT).language
    wide = molmo2_4b().language
    language = dataclasses.replace(
        wide, num_layers=layers, base_vocab=words.base_vocab, extra_vocab=words.extra_vocab
    )
    cfg = dataclasses.replace(tiny(), scorer=None, attention=VisionAttention.ALL, language=language)
    source = made_up_weights(cfg, 0, CHECKPOINT / "tokenizer.json", f"molmo2_4b in {layers}")
    cells = TOKENS // cfg.vision.num_cells + 1  # its frames are smaller
    options = ExportOptions(
        frames=frames * cells,
        precision=Precision.parse(precision),
        variant=Variant(variant),
        thorough=False,
    )
    export_source(source, out, options)


def measure(bundle: Path, frames: int, threads: int) -> dict[str, Any]:
    """In this process, of which nothing else is measured."""
    size = frames * TOKENS
    with LoadedBundle.open(bundle, threads=threads) as engines:
        language = engines.language
        rng = np.random.default_rng(0)
        embeds = rng.standard_normal((size, language.cfg.width), np.float32)
        question = rng.standard_normal((QUESTION, language.cfg.width), np.float32)
        blocks = np.where(np.arange(size) % TOKENS < TOKENS - 83, CAUSAL, 0)
        arena = language.new_arena(size + QUESTION)
        warm = language.new_arena(QUESTION)
        language.prefill(warm, question)
        before = _own_bytes()
        memory = Memory(os.getpid())
        begin = time.perf_counter()
        language.prefill(arena, embeds, blocks)
        mark = arena.mark()
        first = language.prefill(arena, question)
        first_s = time.perf_counter() - begin
        arena.truncate(mark)
        begin = time.perf_counter()
        second = language.prefill(arena, question)
        second_s = time.perf_counter() - begin
        own_gb = max(memory.stop()["own"], _own_bytes() / 1e9)
    assert (first == second).all()
    return {
        "frames": frames,
        "tokens": size,
        "cache_gb": round(arena.num_bytes / 1e9, 3),
        "prefill_gb": round(own_gb - (before + arena.num_bytes) / 1e9, 3),
        "scores_at_once_gb": round(language.cfg.num_heads * size**2 * 4 / 1e9, 3),
        "first_s": round(first_s, 2),
        "second_s": round(second_s, 3),
        "second_of_first": round(second_s / first_s, 4),
    }


def _own_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not say what a process holds")


def main(argv: list[str] | None = None) -> int:
    parser = script_parser(__doc__, RESULTS / "exact_prefill.json")
    parser.add_argument("--bundle", type=Path, help="measure this one")
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--variant", default="portable")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=made_folder, help="folder with room for the bundle")
    parser.add_argument("--one", type=int, help="measure this many frames here and print it")
    args = parser.parse_args(argv)
    if args.one is not None:
        print(json.dumps(measure(args.bundle, args.one, args.threads)))
        return 0
    with tempfile.TemporaryDirectory(prefix="exact-", dir=args.scratch) as scratch:
        bundle = args.bundle
        if bundle is None:
            bundle = Path(scratch) / "bundle"
            export_pair(args.layers, max(args.frames), args.precision, args.variant, bundle)
        rows = []
        for frames in args.frames:
            command = [sys.executable, "-m", "benchmarks.runtime.exact_prefill"]
            command += ["--bundle", str(bundle), "--one", str(frames)]
            command += ["--threads", str(args.threads)]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append(json.loads(told))
            print(told.strip(), flush=True)
    head = result_head(__file__, argv, torch.device("cpu"))
    layers, precision = args.layers, args.precision
    write_result(args.out, {**head, "layers": layers, "precision": precision, "frames": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
