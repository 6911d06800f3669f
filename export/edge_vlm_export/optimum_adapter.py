"""Optional: Hugging Face Optimum next to our own int8 path: its calibration, a registered config.

`quantize_vision` lets Optimum's `ORTQuantizer` choose the ranges of a float32 bundle's vision
products, by the smallest and largest value, by entropy or by percentile (our own path takes the
largest value and smooths outliers), and writes the result as a bundle of the same kind.
`register_export_config` makes the model type `edge_vlm` known to Optimum's task manager.

Optimum's ONNX side, `optimum-onnx` 0.1, wants transformers below 4.58, so it lives in an
environment of its own: `pip install 'edge-vlm[optimum]'`. Nothing else imports this module, no
command needs it, and its tests run only where Optimum is installed.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from optimum.exporters.onnx.config import OnnxConfig
from optimum.exporters.tasks import TasksManager
from optimum.onnxruntime import ORTQuantizer
from optimum.onnxruntime.configuration import AutoCalibrationConfig, AutoQuantizationConfig
from optimum.utils import DummyVisionInputGenerator, NormalizedConfig

from edge_vlm.errors import ConfigError
from edge_vlm.formats.bundle import EngineBundle, write_bundle
from edge_vlm.formats.precision import FP32, Precision, Variant
from edge_vlm_export.quantize.plan import PrecisionPlan, plan_graph
from edge_vlm_export.trace.graph_files import load_graph, save_graph
from edge_vlm_export.verify.compare_pipelines import bundle_pipeline
from edge_vlm_export.verify.footage import footage_clips
from edge_vlm_export.verify.ort_runner import Graphs, ort_run
from edge_vlm_export.verify.pipeline import Arrays
from edge_vlm_export.verify.verify import Report, verify_bundle

VISION_GRAPHS = ("vit_stem", "vit_trunk")
METHODS = ("minmax", "entropy", "percentiles")
MODEL_TYPE = "edge_vlm"
TASK = "feature-extraction"
PRECISION = Precision(vit="int8")


def quantize_vision(
    bundle_dir: Path,
    out_dir: Path,
    footage: tuple[Path, ...],
    *,
    method: str = "minmax",
    max_frames: int = 16,
) -> tuple[EngineBundle, Report]:
    """A float32 portable bundle with its vision products in int8, compared with its own references.

    Raises ConfigError for another bundle or an unknown method, ParityError, VideoError, BundleError
    if `out_dir` is taken.
    """
    source = EngineBundle.open(bundle_dir)
    if source.precision != FP32 or source.variant is not Variant.PORTABLE:
        raise ConfigError("only a float32 portable bundle can be quantised", where=bundle_dir)
    if method not in METHODS:
        raise ConfigError(f"no calibration method {method!r}", remedy=f"one of {METHODS}")
    samples = _samples(source, footage, max_frames)
    with write_bundle(out_dir) as writer:
        plans = {}
        for name, spec in source.specs.items():
            path = writer.graph_file(spec)
            model = load_graph(source.graph_path(name))
            seen = {str(n.inputs[0].name): 0.0 for n in model.graph if n.inputs and n.inputs[0]}
            # Stills are left as they are: the footage has none to measure.
            precision = PRECISION if name in VISION_GRAPHS else FP32
            plans[name] = plan_graph(model.graph, spec, precision, seen)
            wanted = [node.node for node in plans[name] if node.activations]
            if wanted:
                _quantize_graph(source.graph_path(name), path, wanted, samples[name], method)
            else:
                save_graph(model, path)
        _copy_rest(source, writer.folder)
        names = tuple(f"{path.resolve().name} ({method})" for path in footage)
        plan = PrecisionPlan(precision=PRECISION, footage=names, graphs=plans)
        writer.precision_plan(plan.to_json())
        writer.finish(
            name=source.name,
            config=source.config,
            defaults=source.defaults,
            source={**source.source, "quantised_by": f"optimum ORTQuantizer, {method}"},
            precision=PRECISION,
            style=source.style,
            images=source.images,
        )
        done = dataclasses.replace(source, path=writer.folder, precision=PRECISION)
        report = verify_bundle(done)
        report.require()
    return EngineBundle.open(out_dir), report


def _samples(
    bundle: EngineBundle, footage: tuple[Path, ...], max_frames: int
) -> dict[str, list[Arrays]]:
    """What the vision graphs are given while the footage is streamed through the bundle."""
    seen: dict[str, list[Arrays]] = {name: [] for name in VISION_GRAPHS}
    run = ort_run(Graphs.of(bundle, threads=1))

    def recorded(name: str, inputs: Arrays) -> Arrays:
        if name in seen:
            seen[name].append({key: value.copy() for key, value in inputs.items()})
        return run(name, inputs)

    pipeline = bundle_pipeline(recorded, bundle, float(bundle.defaults.get("keep_ratio", 0.5)))
    for clip in footage_clips(footage, max_frames):
        pipeline.stream(clip, num_tokens=1)
    return seen


class _Reader:
    """As onnxruntime's CalibrationDataReader, with one sample: that, then None."""

    def __init__(self, sample: Arrays) -> None:
        self._samples: Iterator[Arrays] = iter([sample])

    def get_next(self) -> Arrays | None:
        return next(self._samples, None)


def _quantize_graph(
    source: Path, target: Path, nodes: list[str], samples: list[Arrays], method: str
) -> None:
    quantizer = ORTQuantizer(source, config=SimpleNamespace(save_pretrained=lambda folder: None))
    dataset = SimpleNamespace(
        info=SimpleNamespace(builder_name="footage", config_name=""),
        split="",
        num_rows=len(samples),
    )
    make: Callable[..., Any] = getattr(AutoCalibrationConfig, method)
    scratch = target.parent / "scratch"
    scratch.mkdir()
    # Optimum's own reader adds a batch axis to every array; ours have theirs already.
    quantizer._calibrator = make(dataset).create_calibrator(
        onnx_model_path=source.as_posix(),
        operators_to_quantize=["MatMul"],
        force_symmetric_range=True,
        augmented_model_name=str(scratch / "augmented.onnx"),
    )
    for sample in samples:  # one at a time: histograms are made of arrays of one shape
        quantizer._calibrator.collect_data(_Reader(sample))
    config = AutoQuantizationConfig.tensorrt(
        per_channel=True, nodes_to_quantize=nodes, operators_to_quantize=["MatMul"]
    )
    # Integers are stored, instead of floats that every runtime would have to round again.
    config.qdq_add_pair_to_weight = False
    quantizer.quantize(
        config,
        scratch,
        file_suffix="int8",
        calibration_tensors_range=quantizer.compute_ranges(),
    )
    model = load_graph(scratch / f"{source.stem}_int8.onnx")
    save_graph(model, target)
    shutil.rmtree(scratch)


def _copy_rest(bundle: EngineBundle, folder: Path) -> None:
    for name in ("embed_table.npy", "tokenizer.json"):
        shutil.copyfile(bundle.path / name, folder / name)
    shutil.copytree(bundle.path / "reference", folder / "reference", dirs_exist_ok=True)


# ---- the registered config -----------------------------------------------------------------------


class EdgeVlmOnnxConfig(OnnxConfig):
    """The stem of the vision side, pixels in and hidden states out, as Optimum describes models."""

    NORMALIZED_CONFIG_CLASS = NormalizedConfig.with_args(
        image_size="image_size", num_channels="num_patches", allow_new=True
    )
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyVisionInputGenerator,)
    DEFAULT_ONNX_OPSET = 18

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return {"pixels": {0: "F"}}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return {"hidden": {0: "F"}}

    def generate_dummy_inputs(self, framework: str = "pt", **kwargs: Any) -> Mapping[str, Any]:
        import torch

        shape = (2, self._config.num_patches, self._config.patch_dim)
        return {"pixels": torch.zeros(shape)}


def register_export_config() -> None:
    """Makes `edge_vlm` a model type that Optimum's task manager can find."""
    register = TasksManager.create_register("onnx", overwrite_existing=True)
    register(MODEL_TYPE, TASK)(EdgeVlmOnnxConfig)
