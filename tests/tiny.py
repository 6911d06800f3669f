"""Small real things for tests: a random-weight model, its checkpoint and its exported bundle.

The bundle is made by the real exporter. That takes about ten seconds, so it is kept in the test
cache under a key of everything it depends on, and made anew when any of that changes. Shared and
read-only: tests that damage a bundle copy it first.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from edge_vlm.config import ModelConfig, tiny

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".pytest_cache" / "edge-vlm-tiny"
SOURCES = (
    "edge_vlm/formats/bundle.py",
    "edge_vlm/config.py",
    "edge_vlm/formats/precision.py",
    "edge_vlm/text/prompt.py",
    "edge_vlm/formats/graph_spec.py",
    "edge_vlm/model/*.py",
    "export/edge_vlm_export/*.py",
    "training/edge_vlm_training/world/vocabulary.py",
    "tests/tiny.py",
)
WORDS = (
    "is there a red ball ? yes . no . what colour is the cube ? it is blue . how many cars are "
    "there now ? two . which way does the dog move ? to the left . right . describe the video ."
)
TINY_LIMITS = {"max_frames": 3, "opt_tokens": 16, "max_tokens": 96, "max_past": 512}


def tiny_checkpoint() -> Path:
    """Folder with config.json, model.safetensors and tokenizer.json: random weights, seed 0."""
    return _made() / "tiny-checkpoint"


def tiny_bundle() -> Path:
    """Folder of the exported bundle of `tiny_checkpoint()`: 9 cells a frame, 2 layers, width 48."""
    return _made() / "tiny-bundle"


VARIANTS: dict[str, dict[str, Any]] = {
    "both": {"kv_form": "both"},
    "ort-int4": {"variant": "ort", "precision": "int4"},
    "edge": {"precision": "edge", "kv_form": "both"},
    "ort-fp16": {"variant": "ort", "precision": "fp16"},
    "ort-int8": {"variant": "ort", "precision": "int8"},
}
"""Other exports of `tiny_checkpoint()`, by name: what differs from the plain one."""


@lru_cache
def tiny_variant(name: str) -> Path:
    """Folder of the exported bundle of `tiny_checkpoint()` with the options of VARIANTS."""
    from edge_vlm.formats.precision import Precision, Variant
    from edge_vlm_export.graphs.graphs import GraphLimits, KVForm
    from edge_vlm_export.to_onnx import ExportOptions, export_bundle

    wanted = VARIANTS[name]
    precision = Precision.parse(wanted.get("precision", "fp32"))
    target = _made() / f"tiny-{name}"
    if not target.exists():
        options = ExportOptions(
            limits=GraphLimits(**TINY_LIMITS),
            precision=precision,
            variant=Variant(wanted.get("variant", "portable")),
            kv_form=KVForm(wanted.get("kv_form", "concat")),
            footage=(tiny_footage(),) if precision.needs_ranges else (),
        )
        export_bundle(tiny_checkpoint(), target, options)
    return target


def tiny_footage() -> Path:
    """A video of three seconds, 64x48, of a square that moves."""
    import av
    import numpy as np

    path = _made() / "footage.mp4"
    if not path.exists():
        partial = path.with_suffix(".partial.mp4")
        with av.open(str(partial), "w") as container:
            stream = container.add_stream("mpeg4", rate=4)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for i in range(12):
                rgb = np.full((48, 64, 3), (40, 90, 160), np.uint8)
                rgb[10:26, 4 * i : 4 * i + 16] = (240, 60, 30)
                for packet in stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")):
                    container.mux(packet)
            container.mux(stream.encode(None))
        partial.rename(path)
    return path


@lru_cache(maxsize=1)
def tiny_config() -> ModelConfig:
    """`edge_vlm.config.tiny` with the vocabulary of WORDS."""
    from edge_vlm.formats.bundle import EngineBundle

    return EngineBundle.open(tiny_bundle()).config


@lru_cache(maxsize=1)
def _made() -> Path:
    target = CACHE / _key()
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="making-", dir=CACHE))
    _make(folder)
    try:
        folder.rename(target)
    except OSError:  # another test run was faster
        shutil.rmtree(folder)
    return target


def _key() -> str:
    digest = hashlib.sha256(metadata.version("torch").encode())
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def _make(folder: Path) -> None:
    import torch

    from edge_vlm.model.checkpoint import save_checkpoint
    from edge_vlm.model.video_lm import VideoLM
    from edge_vlm_export.graphs.graphs import GraphLimits
    from edge_vlm_export.to_onnx import ExportOptions, export_bundle
    from edge_vlm_training.world.vocabulary import build_tokenizer

    words = folder / "words.json"
    config = tiny(*build_tokenizer([WORDS], words))
    model = VideoLM(config).init_weights(torch.Generator().manual_seed(0))
    checkpoint = folder / "tiny-checkpoint"
    save_checkpoint(checkpoint, config, model.state_dict(), words)
    options = ExportOptions(limits=GraphLimits(**TINY_LIMITS))
    export_bundle(checkpoint, folder / "tiny-bundle", options)
