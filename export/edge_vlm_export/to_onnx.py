"""A checkpoint becomes a bundle: graphs, embedding table, tokenizer, reference tensors, manifest.

Each graph is traced without its weights, given the number formats of the precision plan, written
weight by weight, read back from disk (names, types and dimensions must be what its GraphSpec says)
and compared with torch. The bundle appears by one rename, when everything agreed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import edge_vlm
from edge_vlm.errors import ConfigError
from edge_vlm.formats.bundle import (
    BORROWED,
    IMAGE_ENCODER,
    VIT_STEM_REUSE,
    BundleWriter,
    EngineBundle,
    write_bundle,
)
from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm.formats.precision import FP32, Precision, Variant
from edge_vlm.model.published.mapping import shapes
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.pixels.stills import ImageConfig, prepare_image
from edge_vlm_export.calibrated import CalibrationOf
from edge_vlm_export.graphs.graphs import (
    GraphLimits,
    KVForm,
    default_limits,
    graph_specs,
    kv_layout,
)
from edge_vlm_export.graphs.modules import graph_module
from edge_vlm_export.graphs.weights import (
    WeightSource,
    open_weights,
    prompt_of,
    streamed_model,
)
from edge_vlm_export.preflight import Estimate, estimate, require_room
from edge_vlm_export.progress import Progress, Silent
from edge_vlm_export.quantize.convert import Ranges, convert
from edge_vlm_export.quantize.plan import NodePlan, PrecisionPlan, exceptions, plan_graph
from edge_vlm_export.quantize.ranges import Observer, measure, with_table
from edge_vlm_export.trace.chunks import expand_chunks
from edge_vlm_export.trace.graph_files import check_graph, out_of_space, save_graph, versions
from edge_vlm_export.trace.trace import hollow_model, trace
from edge_vlm_export.verify.check_inputs import (
    RealInputs,
    real_inputs,
    reference_sizes,
    sample_inputs,
)
from edge_vlm_export.verify.compare_pipelines import (
    CLIP_REFERENCE,
    compare_pipelines,
    reduced,
    reference_arrays,
)
from edge_vlm_export.verify.footage import footage_clips
from edge_vlm_export.verify.ort_runner import Graphs, ort_run, run_module, torch_run
from edge_vlm_export.verify.pipeline import (
    Arrays,
    Clip,
    Pipeline,
    RunGraph,
    drawn_clip,
    whole_frame,
)
from edge_vlm_export.verify.verify import Report, compare_with_torch

LARGE_MODEL = 1_000_000_000
"""From so many weights on a model is compared at its smallest and usual sizes only, and not on a
clip, unless that is asked for: torch reads every weight for every comparison."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What an export may be told besides its source and destination."""

    name: str | None = None
    """Of the model; by default that of the checkpoint's folder."""
    defaults: Mapping[str, Any] | None = None
    limits: GraphLimits | None = None
    """By default `default_limits` of `frames`."""
    frames: int | None = None
    """Whole frames that one question is to be shown."""
    precision: Precision = FP32
    variant: Variant = Variant.PORTABLE
    kv_form: KVForm = KVForm.CONCAT
    reuse: bool = False
    """With the graph that computes changed cells only, for sessions with `reuse`."""
    footage: tuple[Path, ...] = ()
    """Videos or question sets on which ranges are measured."""
    max_frames: int = 16
    """Of each footage."""
    calibration: Path | None = None
    """`calibration.json` of the same checkpoint: its plan is followed, its ranges are added to the
    measured ones."""
    thorough: bool | None = None
    """Compare at the largest sizes and on a clip; by default unless the model is large."""
    overwrite: bool = False
    threads: int = 1


def export_bundle(
    checkpoint: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> EngineBundle:
    """Exports a folder of weights (`open_weights`). Raises as `export_source`, and CheckpointError
    and ConfigError for what is wrong with the folder."""
    return export_source(open_weights(Path(checkpoint)), out_dir, options, progress)


def export_source(
    source: WeightSource,
    out_dir: str | os.PathLike[str],
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> EngineBundle:
    """Nothing appears at `out_dir` unless everything agreed with torch.

    Raises ConfigError (options that do not fit each other), NoSpaceLeft, NotEnoughMemory,
    ExportError, Specialised, RangeFp16, ParityError, NonFinite, VideoError (footage), BundleError
    if `out_dir` is taken.
    """
    options, target = options or ExportOptions(), Path(out_dir)
    export = _Export(source, options, progress or Silent())
    needed = export.estimate(target)
    export.progress.estimated(needed)
    require_room(needed, target)
    try:
        with write_bundle(target, overwrite=options.overwrite) as writer:
            export.write(writer)
    except OSError as error:
        raise out_of_space(error, target) from error
    return EngineBundle.open(target)


class _Export:
    def __init__(self, source: WeightSource, options: ExportOptions, progress: Progress) -> None:
        self.source, self.options, self.progress = source, options, progress
        path = options.calibration
        self.calibration = None if path is None else CalibrationOf(path, source)
        self.calibrated = None if self.calibration is None else self.calibration.plan()
        self._require_footage()
        if self.calibration is not None:
            notes = self.calibration.notes(
                options.precision, measures=self.measures, reuse=options.reuse
            )
            progress.calibrated(notes)
        self.prompt = prompt_of(source)
        self.limits = self._limits()
        if options.reuse and not source.cfg.has_scores:
            raise ConfigError(
                "reuse is about the blocks in front of the scorer, and the weights have none",
                remedy="add --scorer change, or leave --reuse out",
            )
        self._defaults()  # raises before anything is written
        self.specs = self._specs(options.precision)
        count = sum(int(np.prod(shape)) for shape in shapes(source.cfg).values())
        small = count < LARGE_MODEL
        self.thorough = small if options.thorough is None else options.thorough

    @property
    def measures(self) -> bool:
        """Whether all graphs see footage, as float32, before they get their formats."""
        return self.options.precision.uses_ranges and bool(self.options.footage)

    def _require_footage(self) -> None:
        """Raises ConfigError where ranges are needed that nobody has measured."""
        precision = self.options.precision
        if not precision.needs_ranges or self.options.footage:
            return
        what, remedy = "is decided by what real pictures do", "name some with --footage"
        if self.calibrated is not None:
            if precision.base == "float32" and self.source.images is None:
                return
            what = "needs more than the calibration knows"
            remedy = (
                "name footage too (--footage): float16 is decided node by node"
                if precision.base != "float32"
                else "name footage too (--footage): of still pictures a calibration knows nothing"
            )
        elif precision.base == "float32":
            remedy += ", or --calibration FILE with the section `precision`"
        raise ConfigError(f"precision {precision.label} {what}", remedy=remedy)

    def _limits(self) -> GraphLimits:
        source, options = self.source, self.options
        if options.limits is not None:
            return options.limits
        trained = None if source.frames is None else source.frames.num_frames
        try:
            return default_limits(
                source.cfg,
                frames=options.frames,
                trained=trained,
                images=source.images,
                style=source.style,
            )
        except ValueError as error:
            raise ConfigError(str(error), remedy="lower --frames") from error

    def _specs(self, precision: Precision) -> dict[str, GraphSpec]:
        options = self.options
        return graph_specs(
            self.source.cfg,
            self.limits,
            precision=precision,
            variant=options.variant,
            kv_form=options.kv_form,
            images=self.source.images,
            reuse=options.reuse,
        )

    def estimate(self, target: Path) -> Estimate:
        return estimate(
            self.source.cfg,
            shapes(self.source.cfg),
            self.specs,
            self.options.precision,
            target,
            largest_check=self.thorough,
            measured=self.measures,
            made_up="random_weights" in self.source.identity,
        )

    def write(self, writer: BundleWriter) -> None:
        source, options = self.source, self.options
        writer.tokenizer(source.tokenizer)
        traced = self._trace()
        ranges: dict[str, Ranges] = {}
        scratch = writer.folder / "scratch"
        if self.measures:
            scratch.mkdir()
            ranges = self._measure(traced, scratch)
        paths = self._write_graphs(traced, ranges, writer)
        shutil.rmtree(scratch, ignore_errors=True)
        self.progress.stage("writing the embedding table")
        table = source.float32("llm.embed.weight").numpy()
        writer.embed_table(table, options.precision.embed)
        del table
        self._compare(writer, paths)
        writer.finish(
            name=options.name or source.name,
            config=source.cfg,
            defaults=self._defaults(),
            source={
                **source.identity,
                "kv_form": options.kv_form.value,
                "made_with": {"edge-vlm": edge_vlm.__version__, **versions()},
            },
            precision=options.precision,
            variant=options.variant,
            kv_layout=kv_layout(options.variant, self.source.cfg),
            style=source.style,
            images=source.images,
            frames=source.frames,
            card=source.card,
        )

    def _defaults(self) -> dict[str, Any]:
        made_for = self.source.defaults
        if self.calibration is not None:
            made_for = self.calibration.over(made_for, reuse=self.options.reuse)
        given = {**made_for, **(self.options.defaults or {})}
        ratio = given.get("keep_ratio", 1.0)
        if type(ratio) not in (int, float) or not 0 < ratio <= 1:
            raise ConfigError(f"keep_ratio={ratio}: must be in (0, 1]", where="defaults")
        if given.get("change_threshold") and self.source.cfg.change is None:
            raise ConfigError(
                "change_threshold is about changes, and the weights have no scorer of these",
                where="defaults",
                remedy="add --scorer change",
            )
        if given.get("reuse") and not self.options.reuse:
            raise ConfigError(
                "reuse needs a graph of its own", where="defaults", remedy="add --reuse"
            )
        if self.source.cfg.has_scores:
            return given
        defaults = {"policy": "keep_all", "keep_ratio": 1.0, **given}
        if defaults["policy"] in ("stream", "frame_topk", "clip"):
            raise ConfigError(
                f"policy={defaults['policy']} chooses by scores, and the weights have no scorer",
                where="defaults",
                remedy="add --scorer change, or --default policy=difference (by pixels)",
            )
        budget = [
            f"{name}={defaults[name]}"
            for name, none in (("keep_ratio", 1.0), ("vision_tokens_per_s", 0.0))
            if defaults.get(name, none) != none
        ]
        if budget and defaults["policy"] == "keep_all":
            raise ConfigError(
                f"{budget[0]} would be ignored: the weights have no token scorer to choose by",
                where="defaults",
                remedy="add --scorer change, or --default policy=difference (by pixels)",
            )
        return defaults

    # ---- graphs ----------------------------------------------------------------------------------

    def _trace(self) -> dict[str, ir.Model]:
        options, hollow = self.options, hollow_model(self.source.cfg)
        traced = {}
        for name, spec in self._specs(FP32).items():
            self.progress.stage(f"tracing {name}")
            module = graph_module(name, hollow, variant=options.variant, kv_form=options.kv_form)
            traced[name] = trace(module, spec, self.source.read)
        return traced

    def _measure(self, traced: Mapping[str, ir.Model], scratch: Path) -> dict[str, Ranges]:
        """Writes the float32 graphs and runs them on the footage."""
        options, specs = self.options, self._specs(FP32)
        observers: dict[str, Observer] = {}
        for name, model in traced.items():
            self.progress.stage(f"writing {name} in float32 to be measured")
            path = scratch / f"{name}.onnx"
            model = model.clone()
            expand_chunks(model)
            save_graph(model, path)
            observers[name] = Observer.open(path, specs[name], options.threads)
        self.progress.stage("measuring ranges on the footage")
        # What one form of the language graph is given, the other must stand too.
        forms = [name for name in observers if name.startswith("llm")]

        def run(name: str, inputs: Arrays) -> Arrays:
            for other in forms if name in forms else []:
                if other != name:
                    observers[other].run(inputs)
            if name == "vit_stem" and VIT_STEM_REUSE in observers:
                observers[VIT_STEM_REUSE].run(whole_frame(specs[VIT_STEM_REUSE], inputs))
            return observers[name].run(inputs)

        footage = tuple(path.resolve().name for path in options.footage)
        clips = footage_clips(options.footage, options.max_frames)
        if self.source.images is not None:
            clips = self._with_stills(clips, self.source.images, observers[IMAGE_ENCODER])
        ranges = measure(observers, self._pipeline(run, specs), clips, footage)
        table = None if self.calibration is None else self.calibration.table
        if table is not None:
            ranges = {
                name: with_table(found, traced[name].graph, table) for name, found in ranges.items()
            }
        return ranges

    def _with_stills(
        self, clips: Iterable[Clip], images: ImageConfig, observer: Observer
    ) -> Iterator[Clip]:
        """The clips; the first picture of each is also looked at as a still."""
        for clip in clips:
            still = prepare_image(clip.pictures[0], self.source.cfg.vision, images)
            observer.run({"pixels": still.pixels, "windows": still.windows})
            yield clip

    def _write_graphs(
        self, traced: Mapping[str, ir.Model], ranges: Mapping[str, Ranges], writer: BundleWriter
    ) -> dict[str, Path]:
        options = self.options
        plans: dict[str, tuple[NodePlan, ...]] = {}
        paths: dict[str, Path] = {}
        written: dict[str, dict[str, ir.ExternalTensor]] = {}
        for name, spec in self.specs.items():
            model, seen = traced[name], ranges.get(name)
            tensors = seen.tensors if seen is not None else None
            products = None if self.calibrated is None else self.calibrated.products
            plans[name] = plan_graph(model.graph, spec, options.precision, tensors, products)
            convert(model, spec, plans[name], seen, options.variant, self.calibrated)
            expand_chunks(model)
            self.progress.stage(f"writing {name}")
            paths[name] = writer.graph_file(spec)
            written[name] = save_graph(model, paths[name], self._shared(name, written))
            check_graph(paths[name], spec, options.variant)
        self.progress.planned(exceptions(plans, options.precision))
        footage = tuple(path.resolve().name for path in options.footage) if ranges else ()
        if self.calibration is not None:
            footage += self.calibration.footage(options.precision)
        plan = PrecisionPlan(precision=options.precision, footage=footage, graphs=plans)
        writer.precision_plan(plan.to_json())
        return paths

    def _shared(
        self, name: str, written: Mapping[str, Mapping[str, ir.ExternalTensor]]
    ) -> Mapping[str, ir.ExternalTensor]:
        """What a graph need not write again. Quantised vision weights are each graph's own: they
        are scaled by what the graph itself has seen."""
        if name == "llm_decode":  # the same nodes, so constants are the same too
            return written["llm"]
        if name not in (IMAGE_ENCODER, VIT_STEM_REUSE) or self.options.precision.vit != "base":
            return {}
        weights = shapes(self.source.cfg)
        return {
            tensor: place
            for graph in BORROWED[name]
            for tensor, place in written[graph].items()
            if tensor.removesuffix(".float16") in weights
        }

    # ---- comparison ------------------------------------------------------------------------------

    def _compare(self, writer: BundleWriter, paths: Mapping[str, Path]) -> None:
        options = self.options
        graphs = Graphs(
            paths=paths,
            specs=self.specs,
            precision=options.precision,
            variant=options.variant,
            layout=kv_layout(options.variant, self.source.cfg),
            threads=options.threads,
        )
        model, clip = streamed_model(self.source), self._clip()
        self.progress.stage("comparing with torch")
        report, run = Report("torch"), torch_run(model, graphs)
        real = real_inputs(
            *(model, clip, run),
            lambda recorded: self._pipeline(recorded, self.specs),
            options.precision,
        )
        report.graphs += compare_with_torch(graphs, model, real, largest=self.thorough)
        self._write_references(writer, graphs, model, real)
        if self.thorough:
            keep_ratio = self._defaults().get("keep_ratio", 0.5)
            expected = self._pipeline(run, self.specs).stream(clip)
            pipeline = self._pipeline(ort_run(graphs), self.specs)
            report.pipelines += compare_pipelines(
                pipeline, clip, expected, "torch", options.precision
            )
            writer.reference(CLIP_REFERENCE, reference_arrays(clip, keep_ratio, expected))
        self.progress.compared(report)
        report.require()

    def _write_references(
        self, writer: BundleWriter, graphs: Graphs, model: VideoLM, real: RealInputs
    ) -> None:
        for name, spec in self.specs.items():
            inputs = sample_inputs(spec, reference_sizes(spec), model.cfg, seed=0, real=real)
            module = graph_module(name, model, variant=self.options.variant)
            outputs = run_module(module, spec, inputs)
            arrays = {f"inputs/{key}": value for key, value in inputs.items()}
            arrays |= {f"outputs/{key}": value for key, value in outputs.items()}
            writer.reference(name, arrays)

    def _clip(self) -> Clip:
        """Three pictures: of the footage if there is any, else drawn."""
        footage = self.options.footage
        if not footage:
            return drawn_clip(self.source.cfg.vision.image_size)
        clip = next(footage_clips(footage[:1], 3))
        return replace(clip, pictures=[reduced(picture) for picture in clip.pictures])

    def _pipeline(self, run: RunGraph, specs: Mapping[str, GraphSpec]) -> Pipeline:
        weight: list[np.ndarray] = []

        def embed(ids: np.ndarray) -> np.ndarray:
            if not weight:
                weight.append(self.source.float32("llm.embed.weight").numpy())
            return np.array(weight[0][ids], np.float32)

        return Pipeline(
            run,
            cfg=self.source.cfg,
            specs=specs,
            prompt=self.prompt,
            embed=embed,
            layout=kv_layout(self.options.variant, self.source.cfg),
            keep_ratio=float(self._defaults().get("keep_ratio", 0.5)),
        )
