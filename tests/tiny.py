"""Small real things for tests: a random-weight model, its checkpoint and its exported bundle.

The bundle is made by the real exporter. That takes about fifteen seconds, so it is kept in the test
cache under a key of everything it depends on, and made anew when any of that changes. Processes
that test at the same time share it: one makes it, the others wait. Read-only: tests that damage a
bundle copy it first.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from edge_vlm.config import ModelConfig
from edge_vlm.presets import tiny

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".pytest_cache" / "edge-vlm-tiny"
SOURCES = (
    "edge_vlm/config.py",
    "edge_vlm/presets.py",
    "edge_vlm/formats/**/*.py",
    "edge_vlm/model/**/*.py",
    "edge_vlm/pixels/**/*.py",
    "edge_vlm/text/**/*.py",
    "export/edge_vlm_export/**/*.py",
    "training/edge_vlm_training/world/vocabulary.py",
    "tests/export/parity/test_image_encoder.py",
    "tests/export/parity/test_scorerless.py",
    "tests/export/parity/test_change_scorer.py",
    "tests/export/parity/test_reuse.py",
    "tests/runtime/engines/test_clip_policy.py",
    "tests/published_folder.py",
    "tests/tiny.py",
)
WORDS = (
    "is there a red ball ? yes . no . what colour is the cube ? it is blue . how many cars are "
    "there now ? two . which way does the dog move ? to the left . right . describe the video ."
)
TINY_LIMITS = {"max_frames": 3, "opt_tokens": 16, "max_tokens": 96, "max_past": 512}


def tiny_checkpoint() -> Path:
    """Folder with config.json, model.safetensors and tokenizer.json: random weights, seed 0."""
    return kept("tiny-checkpoint", _make_checkpoint)


def tiny_bundle() -> Path:
    """Folder of the exported bundle of `tiny_checkpoint()`: 9 cells a frame, 2 layers, width 48."""
    return kept("tiny-bundle", partial(_export, {}))


VARIANTS: dict[str, dict[str, Any]] = {
    "both": {"kv_form": "both"},
    "ort-int4": {"variant": "ort", "precision": "int4"},
    "int4": {"precision": "int4", "kv_form": "both"},
    "edge": {"precision": "edge", "kv_form": "both"},
    "ort-fp16": {"variant": "ort", "precision": "fp16"},
    "ort-int8": {"variant": "ort", "precision": "int8"},
    "cache": {"precision": "cache=float16", "kv_form": "both"},
    "ort-cache": {"variant": "ort", "precision": "int4,cache=float16"},
}
"""Other exports of `tiny_checkpoint()`, by name: what differs from the plain one."""


def tiny_variant(name: str) -> Path:
    """Folder of the exported bundle of `tiny_checkpoint()` with the options of VARIANTS."""
    return kept(f"tiny-{name}", partial(_export, VARIANTS[name]))


def tiny_reuse_bundle() -> Path:
    """As `tiny_bundle()`, with the graph that computes changed cells only."""
    return kept("tiny-reuse", partial(_export, {"reuse": True}))


def tiny_footage() -> Path:
    """A video of three seconds, 64x48, of a square that moves."""
    return kept("footage.mp4", _make_footage)


@lru_cache(maxsize=1)
def tiny_config() -> ModelConfig:
    """`edge_vlm.presets.tiny` with the vocabulary of WORDS."""
    from edge_vlm.formats.bundle import EngineBundle

    return EngineBundle.open(tiny_bundle()).config


def kept(name: str, make: Callable[[Path], object]) -> Path:
    """What `make` writes to the path it is given: once, for all processes and later runs."""

    def made(path: Path) -> None:
        with traced_once():
            make(path)

    return _once(name, made)


def _once(name: str, make: Callable[[Path], object]) -> Path:
    target = CACHE / _key() / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_name(f"{name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                partly = target.with_name(f"partly-{name}")
                if partly.is_dir():  # left by a process that was stopped
                    shutil.rmtree(partly)
                make(partly)
                partly.rename(target)
    return target


@lru_cache(maxsize=1)
def _key() -> str:
    made_with = metadata.version("torch"), metadata.version("onnxscript")
    digest = hashlib.sha256(repr(made_with).encode())
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def _make_checkpoint(folder: Path) -> None:
    import torch

    from edge_vlm.model.checkpoint import save_checkpoint
    from edge_vlm.model.video_lm import VideoLM
    from edge_vlm_training.world.vocabulary import build_tokenizer

    words = folder.with_name("words.json")
    config = tiny(*build_tokenizer([WORDS], words))
    model = VideoLM(config).init_weights(torch.Generator().manual_seed(0))
    save_checkpoint(folder, config, model.state_dict(), words)


def _export(wanted: dict[str, Any], target: Path) -> None:
    from edge_vlm.formats.precision import Precision, Variant
    from edge_vlm_export.graphs.graphs import GraphLimits, KVForm
    from edge_vlm_export.to_onnx import ExportOptions, export_bundle

    precision = Precision.parse(wanted.get("precision", "fp32"))
    options = ExportOptions(
        limits=GraphLimits(**TINY_LIMITS),
        precision=precision,
        variant=Variant(wanted.get("variant", "portable")),
        kv_form=KVForm(wanted.get("kv_form", "concat")),
        reuse=wanted.get("reuse", False),
        footage=(tiny_footage(),) if precision.needs_ranges else (),
    )
    export_bundle(tiny_checkpoint(), target, options)


@contextmanager
def traced_once() -> Iterator[None]:
    """Exports in here share, also with other processes, what takes nearly all of their time: what
    torch makes of a graph of the same shapes. Weights are no part of that."""
    import onnx_ir as ir

    trace_all, capture = _originals()
    exports: list[Any] = []

    def trace(export: Any) -> Any:
        exports.append(export)
        try:
            return trace_all(export)
        finally:
            exports.pop()

    def captured(module: Any, spec: Any, *rest: Any) -> ir.Model:
        tensors = [(t.name, t.shape, t.dtype) for t in spec.tensors]
        facts = _computed_by(module, exports[-1].source.cfg), tensors
        name = f"trace-{hashlib.sha256(repr(facts).encode()).hexdigest()[:20]}.onnx"

        def make(path: Path) -> None:
            # Whoever measures coverage would watch all of torch's tracing.
            watcher = sys.gettrace()
            sys.settrace(None)
            try:
                ir.save(capture(module, spec, *rest), path)
            finally:
                sys.settrace(watcher)

        return ir.load(_once(name, make))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edge_vlm_export.to_onnx._Export._trace", trace)
        patch.setattr("edge_vlm_export.trace.trace._capture", captured)
        yield


def _computed_by(module: Any, cfg: ModelConfig) -> tuple[object, ...]:
    """What decides about the nodes of a graph: variants differ in few of their graphs.

    Language graphs hold nothing of the vision side, which knows of the language side its width.
    """
    kind = type(module).__name__
    if kind == "LlmGraph":
        return kind, module.attention.__name__, cfg.language
    vision = kind, cfg.vision, cfg.connector, cfg.language.width
    if kind == "ImageEncoderGraph":
        return vision
    if kind == "VitTrunkGraph":
        return *vision, cfg.whole_blocks
    return *vision, cfg.scorer, cfg.change


def demo_of_short_times(folder: Path) -> Path:
    """The demo bundle with stamps of at most eight seconds: they are counted anew soon."""
    from edge_vlm_runtime.demo.paths import DEMO_BUNDLE

    made = folder / "demo-8s"
    shutil.copytree(DEMO_BUNDLE, made)
    manifest = json.loads((made / "manifest.json").read_text())
    manifest["defaults"]["max_time_s"] = 8
    (made / "manifest.json").write_text(json.dumps(manifest))
    return made


@lru_cache(maxsize=1)
def _originals() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from edge_vlm_export import to_onnx
    from edge_vlm_export.trace import trace

    return to_onnx._Export._trace, trace._capture


def _make_footage(path: Path) -> None:
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(12):
            rgb = np.full((48, 64, 3), (40, 90, 160), np.uint8)
            rgb[10:26, 4 * i : 4 * i + 16] = (240, 60, 30)
            for packet in stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")):
                container.mux(packet)
        container.mux(stream.encode(None))
