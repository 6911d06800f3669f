"""The part `llama.cpp`: the language model of one shape in four bits, by it and by our graphs.

Ours: the `llm` graph for prefill, `llm_decode` for a token, ONNX Runtime, weights and cache as the
int4 bundle has them; the prefill by OpenVINO besides, if it is installed. Its: a GGUF of
architecture `qwen3`, every matrix Q4_0 but for the head, which is Q8_0 as ours is int8, cache fp16.
A step of its includes the choice of the likeliest token; a prefill of ours the head of the last
token.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.export.full_size_export import TOKENIZER
from benchmarks.harness import CHECKPOINT, progress, speed_up, summary
from benchmarks.peers.missing import NotInstalled
from benchmarks.runtime.cpu_backends import inputs_of
from edge_vlm.config import LanguageConfig, ModelConfig
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.precision import Precision
from edge_vlm.model.checkpoint import read_config
from edge_vlm.presets import molmo2_4b, tiny
from edge_vlm_export.graphs.graphs import GraphLimits, KVForm
from edge_vlm_export.graphs.weights import made_up_weights
from edge_vlm_export.to_onnx import ExportOptions, export_source
from edge_vlm_runtime.engines import huge_pages
from edge_vlm_runtime.engines.base import Engine
from edge_vlm_runtime.engines.openvino import OpenVinoEngine, openvino_version
from edge_vlm_runtime.engines.ort import OrtEngine, ort_library

SCRIPT = Path(__file__).with_name("llama_cpp.mjs")
PACKAGE = "node-llama-cpp"
STEPS = 16
"""Tokens of one timed piece of decoding."""
ROWS = 256
"""Made-up rows of a matrix, repeated: what is in them costs no time."""


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Raises NotInstalled."""
    folder = _require(args.node_modules)
    bundle = EngineBundle.open(_bundle(args, scratch))
    language = bundle.config.language
    model = scratch / f"{bundle.path.name}.gguf"
    if not model.exists():
        write_gguf(model, language)
    spec = bundle.specs["llm"]
    prefill = min(args.prefill, spec.dims["s"].max)
    pasts = [past for past in args.past if past + STEPS < spec.dims["p"].max]
    positions = max([prefill, *pasts]) + 2 * STEPS
    with _llama(folder, model, args.threads, positions) as llama:
        rows = {}
        versions = {"onnxruntime": ort_library()[0]}
        if has_openvino := importlib.util.find_spec("openvino") is not None:
            versions["openvino"] = openvino_version()
        for by_openvino in (False, True)[: 1 + has_openvino]:
            told_as = " by OpenVINO" if by_openvino else ""
            engine = _engine(bundle, "llm", args, by_openvino=by_openvino)
            piece = _Piece(engine, _sizes(engine, {"s": prefill}), 1, {"prefill": prefill})
            rows[f"prefill {prefill}{told_as}"] = _turns(args, piece, llama)
        for past in pasts:
            rows[f"decode behind {past}"] = _turns(args, _decode(bundle, past, args), llama)
        told = llama.told
    return {
        "versions": versions | {PACKAGE: _version(folder)},
        "llama.cpp": told["release"],
        "instructions": told["system"],
        "shape": f"width {language.width}, {language.num_layers} layers, "
        f"{language.base_vocab} words",
        "steps": STEPS,
        "rows": rows,
    }


def _require(node_modules: Path | None) -> Path:
    """The folder npm installed into."""
    if shutil.which("node") is None:
        raise NotInstalled("node is missing: https://nodejs.org")
    folder = node_modules or Path()
    if not (folder / "node_modules" / PACKAGE).is_dir():
        raise NotInstalled(
            f"{PACKAGE} is missing: npm install {PACKAGE}@3.21.1 in a folder, then --node-modules"
        )
    if importlib.util.find_spec("gguf") is None:
        raise NotInstalled("gguf is missing: pip install 'gguf>=0.17,<1'")
    return folder


def _version(folder: Path) -> str:
    package = folder / "node_modules" / PACKAGE / "package.json"
    return str(json.loads(package.read_text())["version"])


def _bundle(args: argparse.Namespace, scratch: Path) -> Path:
    """int4, exported unless it lies there already; its ViT is tiny, only the language counts."""
    folder = scratch / ("llama-tiny" if args.tiny else f"llama-{args.layers}-layers")
    if folder.is_dir():
        return folder
    words = read_config(CHECKPOINT).language
    cfg: ModelConfig = replace(tiny(words.base_vocab, words.extra_vocab), scorer=None)
    tokenizer = CHECKPOINT / "tokenizer.json"
    if args.tiny:  # four bits come in groups of 32 and 128
        language = replace(cfg.language, width=128, num_heads=4, head_dim=32, mlp_width=256)
    else:
        language = replace(molmo2_4b().language, num_layers=args.layers)
        tokenizer = TOKENIZER
    cfg = replace(cfg, language=language)
    limits = GraphLimits(max_tokens=256 if args.tiny else 1024, max_past=512 if args.tiny else 4096)
    progress("exporting ...")
    options = ExportOptions(
        precision=Precision.parse("int4"), kv_form=KVForm.BOTH, limits=limits, thorough=False
    )
    export_source(made_up_weights(cfg, 0, tokenizer, "peers"), folder, options)
    return folder


def write_gguf(path: Path, cfg: LanguageConfig) -> None:
    """A language model of this shape with made-up weights in Q4_0 and a head in Q8_0."""
    import gguf

    progress("writing the GGUF ...")
    types, rng = gguf.GGMLQuantizationType, np.random.default_rng(0)
    partly = path.with_suffix(".part")
    writer = gguf.GGUFWriter(str(partly), "qwen3")
    writer.add_name("made up")
    writer.add_block_count(cfg.num_layers)
    writer.add_context_length(cfg.max_positions)
    writer.add_embedding_length(cfg.width)
    writer.add_feed_forward_length(cfg.mlp_width)
    writer.add_head_count(cfg.num_heads)
    writer.add_head_count_kv(cfg.num_kv_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_rope_freq_base(cfg.rope_theta)
    writer.add_vocab_size(cfg.base_vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{index}" for index in range(cfg.base_vocab)])
    writer.add_token_types([gguf.TokenType.NORMAL] * cfg.base_vocab)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)

    def matrix(name: str, rows: int, columns: int, form: Any = types.Q4_0) -> None:
        some = rng.standard_normal((min(rows, ROWS), columns), dtype=np.float32) * 0.02
        packed = gguf.quants.quantize(some, form)
        whole = np.resize(packed, (rows, packed.shape[1]))
        writer.add_tensor(f"{name}.weight", whole, raw_dtype=form)

    def norm(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    matrix("token_embd", cfg.base_vocab, cfg.width)
    matrix("output", cfg.base_vocab, cfg.width, types.Q8_0)
    norm("output_norm", cfg.width)
    queries, keys = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    for index in range(cfg.num_layers):
        block = f"blk.{index}."
        norm(f"{block}attn_norm", cfg.width)
        norm(f"{block}ffn_norm", cfg.width)
        norm(f"{block}attn_q_norm", cfg.head_dim)
        norm(f"{block}attn_k_norm", cfg.head_dim)
        matrix(f"{block}attn_q", queries, cfg.width)
        matrix(f"{block}attn_k", keys, cfg.width)
        matrix(f"{block}attn_v", keys, cfg.width)
        matrix(f"{block}attn_output", cfg.width, queries)
        matrix(f"{block}ffn_gate", cfg.mlp_width, cfg.width)
        matrix(f"{block}ffn_up", cfg.mlp_width, cfg.width)
        matrix(f"{block}ffn_down", cfg.width, cfg.mlp_width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partly.rename(path)


class _Llama:
    """The other process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.told: dict[str, Any] = self._answer()

    def ask(self, command: dict[str, int]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"node ended with {self._process.wait()}: see what it said above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def _llama(folder: Path, model: Path, threads: int, positions: int) -> Iterator[_Llama]:
    command = ["node", str(SCRIPT), str(folder), str(model), str(threads), str(positions)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield _Llama(process)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


class _Piece:
    """What ours runs, and what is asked of the other for the same."""

    def __init__(
        self, engine: Engine, sizes: dict[str, int], times: int, asked: dict[str, int]
    ) -> None:
        spec = engine.spec
        self.asked, self.times, self._engine = asked, times, engine
        self._kept = [inputs_of(spec, sizes, 1)]  # bound memory has to stay
        for tensor in spec.inputs:
            engine.bind_array(tensor.name, self._kept[0][tensor.name])
        for tensor in spec.outputs:
            self._kept.append({tensor.name: spec.zeros(tensor, sizes)})
            engine.bind_array(tensor.name, self._kept[-1][tensor.name])

    def run(self) -> tuple[float, float]:
        """Wall and processor seconds."""
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(self.times):
            self._engine.run()
        return time.perf_counter() - wall, time.process_time() - processor

    def close(self) -> None:
        self._engine.close()


def _decode(bundle: EngineBundle, past: int, args: argparse.Namespace) -> _Piece:
    name = "llm_decode" if "llm_decode" in bundle.specs else "llm"
    engine = _engine(bundle, name, args)
    sizes = _sizes(engine, {"s": 1, "p": past + STEPS // 2})  # its past grows by STEPS
    return _Piece(engine, sizes, STEPS, {"decode": past, "steps": STEPS})


def _engine(
    bundle: EngineBundle, name: str, args: argparse.Namespace, *, by_openvino: bool = False
) -> Engine:
    """As a session has it."""
    if by_openvino:
        return OpenVinoEngine(bundle, name, threads=args.threads)
    engine = OrtEngine(bundle, name, threads=args.threads)
    huge_pages.gather()
    return engine


def _sizes(engine: Engine, wanted: dict[str, int]) -> dict[str, int]:
    dims = engine.spec.dims
    return {name: wanted.get(name, limits.min) for name, limits in dims.items()}


def _turns(args: argparse.Namespace, piece: _Piece, llama: _Llama) -> dict[str, Any]:
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    for turn in range(-1, args.rounds):
        mine, answer = piece.run(), llama.ask(piece.asked)
        if turn >= 0:
            ours.append(mine)
            theirs.append((answer["wall_s"], answer["processor_s"]))
    piece.close()
    row: dict[str, Any] = {}
    for place, clock in enumerate(("wall", "processor")):
        mine_s = [pair[place] / piece.times for pair in ours]
        its_s = [pair[place] / piece.times for pair in theirs]
        row[clock] = {
            "ours": summary(mine_s),
            "llama.cpp": summary(its_s),
            "times_its_time": round(speed_up(mine_s, its_s), 2),
        }
    shown = row["processor"]
    progress(
        f"{piece.asked}: ours {shown['ours']['median_s'] * 1e3:.1f} ms, llama.cpp "
        f"{shown['llama.cpp']['median_s'] * 1e3:.1f} ms: {shown['times_its_time']} times its time"
    )
    return row
