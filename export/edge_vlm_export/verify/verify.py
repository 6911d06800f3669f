"""A bundle against torch, or against what torch gave when the bundle was made.

Every graph is compared at its smallest, usual and largest sizes, then the whole model on a clip:
kept cells, features and the first words of an answer, and the frames one by one against all at
once. Without a checkpoint the reference tensors in the bundle stand in for torch, at their own
sizes: that shows that a copy, or another version of a runtime, still computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edge_vlm.errors import CheckpointError
from edge_vlm.errors.export import ParityError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm.formats.precision import FP32
from edge_vlm_export.verify.check_inputs import RealInputs, check_sizes, sample_inputs
from edge_vlm_export.verify.compare import Comparison, compare, format_table, require_parity
from edge_vlm_export.verify.compare_pipelines import (
    CLIP_REFERENCE,
    PipelineComparison,
    bundle_pipeline,
    compare_pipelines,
    read_clip,
)
from edge_vlm_export.verify.footage import FootageCheck, check_footage
from edge_vlm_export.verify.ort_runner import (
    Graphs,
    ort_run,
    run_module,
    torch_module,
    torch_run,
)
from edge_vlm_export.verify.pipeline import Arrays, PipelineResult, drawn_clip

if TYPE_CHECKING:
    from edge_vlm.model.video_lm import VideoLM
    from edge_vlm_export.graphs.weights import WeightSource


@dataclass
class Report:
    """What was compared, in order; what went wrong stops nothing but is required later."""

    against: str
    by: str = "ONNX Runtime"
    graphs: list[Comparison] = field(default_factory=list)
    pipelines: list[PipelineComparison] = field(default_factory=list)
    footage: list[FootageCheck] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.by} against {self.against}:", format_table(self.graphs)]
        return "\n".join([*lines, *map(str, self.pipelines), *map(str, self.footage)])

    def require(self) -> None:
        """Raises NonFinite or ParityError naming the first tensor that differs."""
        require_parity(self.graphs)
        compared = [clip for check in self.footage for clip in check.compared]
        for result in [*self.pipelines, *compared]:
            if not result.ok:
                raise ParityError(f"the whole model differs: {result}")


def verify_bundle(
    bundle: EngineBundle,
    source: WeightSource | None = None,
    *,
    threads: int = 1,
    thorough: bool = True,
    footage: Sequence[Path] = (),
    max_frames: int = 16,
    by: tuple[str, Graphs] | None = None,
) -> Report:
    """Compares with torch on `source`'s weights, else with the reference tensors.

    `thorough`: also at the largest sizes, which takes the most memory and time, and on a clip.
    `by`: another library than ONNX Runtime, what it is called and its graphs.
    `footage`: videos of which the first `max_frames` frames are streamed too. Raises NonFinite,
    VideoError.
    """
    called, graphs = by or (Report.by, Graphs.of(bundle, threads))
    has_clip = thorough and bundle.has_reference(CLIP_REFERENCE)
    reference = bundle.reference(CLIP_REFERENCE) if has_clip else {}
    clip = read_clip(reference) if has_clip else None
    keep_ratio = float(reference["keep_ratio"]) if has_clip else _keep_ratio(bundle)
    torch_pipeline = None
    if source is None:
        report = Report("the bundle's reference tensors", called)
        for name, spec in bundle.specs.items():
            arrays = bundle.reference(name)
            report.graphs.append(_compare_reference(graphs, spec, arrays))
        expected = PipelineResult.from_arrays(reference) if has_clip else None
    else:
        from edge_vlm_export.graphs.weights import streamed_model
        from edge_vlm_export.verify.check_inputs import real_inputs

        model = streamed_model(source)
        report = Report("torch", called)
        run = torch_run(model, graphs)
        torch_pipeline = bundle_pipeline(run, bundle, keep_ratio)
        pictures = clip or drawn_clip(bundle.config.vision.image_size)
        real = real_inputs(
            *(model, pictures, run),
            lambda recorded: bundle_pipeline(recorded, bundle, keep_ratio),
            graphs.precision,
        )
        report.graphs += compare_with_torch(graphs, model, real, largest=thorough)
        expected = torch_pipeline.stream(clip) if clip is not None else None
    pipeline = bundle_pipeline(ort_run(graphs), bundle, keep_ratio)
    if clip is not None and expected is not None:
        report.pipelines += compare_pipelines(
            pipeline, clip, expected, report.against, graphs.precision
        )
    exact = graphs.precision == FP32
    for path in footage:
        report.footage.append(
            check_footage(path, max_frames, pipeline, torch_pipeline, exact=exact)
        )
    return report


def _keep_ratio(bundle: EngineBundle) -> float:
    return float(bundle.defaults.get("keep_ratio", 0.5))


def compare_with_torch(
    graphs: Graphs,
    model: VideoLM,
    real: RealInputs,
    *,
    largest: bool = True,
    on_compared: Callable[[Comparison], None] = lambda result: None,
) -> list[Comparison]:
    """Each graph at `check_sizes`; `real` is what quantised graphs are given."""
    vision_too = graphs.precision.vit == "int8"
    real = real if vision_too else RealInputs(language=real.language)
    results = []
    for name, spec in graphs.specs.items():
        module, runner = torch_module(name, model, graphs.variant), graphs.open(name)
        for i, sizes in enumerate(check_sizes(spec, largest=largest)):
            inputs = sample_inputs(spec, sizes, model.cfg, seed=i + 1, real=real)
            expected = run_module(module, spec, inputs)
            result = compare(spec, sizes, runner.run(inputs), expected, graphs.precision)
            on_compared(result)
            results.append(result)
    return results


def _compare_reference(graphs: Graphs, spec: GraphSpec, arrays: Arrays) -> Comparison:
    inputs = {t.name: arrays[f"inputs/{t.name}"] for t in spec.inputs}
    expected = {t.name: arrays[f"outputs/{t.name}"] for t in spec.outputs}
    sizes = sizes_of(spec, inputs)
    got = graphs.open(spec.name).run(inputs)
    return compare(spec, sizes, got, expected, graphs.precision)


def sizes_of(spec: GraphSpec, inputs: Arrays) -> dict[str, int]:
    """The free dimensions of these inputs."""
    found: dict[str, int] = {}
    sums: list[tuple[str, int]] = []
    for t in spec.inputs:
        for axis, size in zip(t.shape, inputs[t.name].shape, strict=True):
            if isinstance(axis, str) and axis in spec.dims:
                found[axis] = size
            elif isinstance(axis, str):
                sums.append((axis, size))
    for axis, size in sums:
        unknown = [name for name in axis.split("+") if name not in found]
        if len(unknown) == 1:
            found[unknown[0]] = size - sum(found.get(name, 0) for name in axis.split("+"))
    return {name: found[name] for name in spec.dims}


def require_source(bundle: EngineBundle, source: WeightSource, checkpoint: Path) -> None:
    """Raises CheckpointError unless the bundle was made from exactly these files."""
    found = source.identity.get("sha256", {})
    for name, digest in bundle.source.get("sha256", {}).items():
        if found.get(name) != digest:
            raise CheckpointError(
                f"the bundle was not made from this checkpoint: {name} is not the same",
                where=checkpoint,
                remedy="name the checkpoint it was made from, or export again",
            )
