"""Small real things for tests: a random-weight model, its checkpoint and its exported bundle.

The bundle is made by the real exporter (about ten seconds) once per test run and shared read-only;
tests that damage a bundle copy it first.
"""

from __future__ import annotations

import os
import tempfile
from functools import lru_cache
from pathlib import Path

from edge_vlm.config import ModelConfig, tiny

WORDS = (
    "is there a red ball ? yes . no . what colour is the cube ? it is blue . how many cars are "
    "there now ? two . which way does the dog move ? to the left . right . describe the video ."
)
TINY_LIMITS = {"max_frames": 3, "opt_tokens": 16, "max_tokens": 96, "max_past": 512}


@lru_cache(maxsize=1)
def _shared_folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="edge-vlm-tests-")
    _KEEP.append(folder)  # removed when the interpreter ends
    return Path(folder.name)


_KEEP: list[tempfile.TemporaryDirectory[str]] = []


@lru_cache(maxsize=1)
def tiny_checkpoint() -> Path:
    """Folder with config.json, model.safetensors and tokenizer.json of `tiny_config()`."""
    import torch

    from edge_vlm.model.checkpoint import save_checkpoint
    from edge_vlm.model.video_lm import VideoLM

    folder = _shared_folder() / "tiny-checkpoint"
    folder.mkdir()
    config = tiny_config()
    model = VideoLM(config).init_weights(torch.Generator().manual_seed(0))
    save_checkpoint(folder, config, model.state_dict(), _tokenizer())
    return folder


@lru_cache(maxsize=1)
def tiny_config() -> ModelConfig:
    """`edge_vlm.config.tiny` with the vocabulary of WORDS: 9 cells a frame, width 48, 2 layers."""
    from edge_vlm_training.vocabulary import build_tokenizer

    return tiny(*build_tokenizer([WORDS], _tokenizer()))


def _tokenizer() -> Path:
    return _shared_folder() / "tokenizer.json"


@lru_cache(maxsize=1)
def tiny_bundle() -> Path:
    """Folder of the exported bundle of `tiny_checkpoint()`. Shared: never write into it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from edge_vlm_export.graphs import GraphLimits
    from edge_vlm_export.to_onnx import export_bundle

    folder = _shared_folder() / "tiny-bundle"
    export_bundle(tiny_checkpoint(), folder, limits=GraphLimits(**TINY_LIMITS))
    return folder
