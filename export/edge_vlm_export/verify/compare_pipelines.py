"""The whole model on a clip: two results side by side, and the record that travels in a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.precision import FP32, Precision
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm_export.verify.compare import cosine
from edge_vlm_export.verify.pipeline import Arrays, Clip, Pipeline, PipelineResult, RunGraph

CLIP_REFERENCE = "chain"
"""Name, fixed by the format of bundles, of the reference that holds a clip and what the whole model
made of it."""
LEAST_COSINE = 0.9999
"""Of features and logits where nothing was quantised."""


@dataclass(frozen=True, kw_only=True)
class PipelineComparison:
    """Two runs of the whole model on one clip."""

    name: str
    frames: int
    same_cells: int
    """Frames of which the same cells were kept."""
    features: float
    """Cosine, or NaN where other cells were kept."""
    logits: float
    """Cosine."""
    tokens: int
    same_tokens: int
    """Tokens of the greedy answer up to the first that differs."""
    required: bool
    """Everything must be the same: nothing was quantised."""

    @property
    def ok(self) -> bool:
        if not self.required:
            return True
        return (
            self.same_cells == self.frames
            and self.same_tokens == self.tokens
            and self.features >= LEAST_COSINE
            and self.logits >= LEAST_COSINE
        )

    def __str__(self) -> str:
        return (
            f"{self.name}: same cells kept in {self.same_cells} of {self.frames} frames, features "
            f"cosine {self.features:.6f}, logits cosine {self.logits:.6f}, first {self.tokens} "
            f"tokens: {self.same_tokens} the same"
            f"{'' if self.ok else '  DIFFERS'}"
        )


def compare_pipelines(
    pipeline: Pipeline, clip: Clip, expected: PipelineResult, against: str, precision: Precision
) -> list[PipelineComparison]:
    streamed = pipeline.stream(clip)
    whole = pipeline.whole(clip)
    exact = precision == FP32
    compared = [
        compare_results(f"clip against {against}", streamed, expected, exact),
        compare_results("frame by frame against the whole clip", streamed, whole, exact),
    ]
    if pipeline.reuses:
        anew = pipeline.stream(clip, anew=True)
        what = "every cell as a changed one against the plain stem"
        compared.append(compare_results(what, anew, streamed, exact))
    return compared


def compare_results(
    name: str, got: PipelineResult, expected: PipelineResult, required: bool
) -> PipelineComparison:
    same = [np.array_equal(a, b) for a, b in zip(got.kept, expected.kept, strict=True)]
    differ = [a != b for a, b in zip(got.tokens, expected.tokens, strict=True)]
    return PipelineComparison(
        name=name,
        frames=len(same),
        same_cells=sum(same),
        features=cosine(got.features, expected.features) if all(same) else float("nan"),
        logits=cosine(got.logits, expected.logits),
        tokens=len(expected.tokens),
        same_tokens=differ.index(True) if any(differ) else len(differ),
        required=required,
    )


def bundle_pipeline(run: RunGraph, bundle: EngineBundle, keep_ratio: float) -> Pipeline:
    table = bundle.embed_table
    return Pipeline(
        run,
        cfg=bundle.config,
        specs=bundle.specs,
        prompt=PromptFormat(Tokenizer.from_file(bundle.tokenizer_path), bundle.style),
        embed=lambda ids: np.array(table[ids], np.float32),
        layout=bundle.kv_layout,
        keep_ratio=keep_ratio,
    )


def reference_arrays(clip: Clip, keep_ratio: float, result: PipelineResult) -> Arrays:
    """The reference that `verify_bundle` reads."""
    sizes: Sequence[tuple[int, ...]] = [picture.shape for picture in clip.pictures]
    if len(set(sizes)) != 1:
        raise ValueError(f"pictures of one clip must have one size, got {sizes}")
    return {
        "pictures": np.stack(clip.pictures),
        "fps": np.array(clip.fps),
        "keep_ratio": np.array(keep_ratio),
        **result.to_arrays(),
    }


def read_clip(arrays: Mapping[str, np.ndarray]) -> Clip:
    return Clip(pictures=list(arrays["pictures"]), fps=float(arrays["fps"]))


REFERENCE_PIXELS = 400
"""Longer side of the pictures that travel in a bundle."""


def reduced(picture: np.ndarray) -> np.ndarray:
    step = -(-max(picture.shape[:2]) // REFERENCE_PIXELS)
    return np.ascontiguousarray(picture[::step, ::step])
