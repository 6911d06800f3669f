"""The two ways of running a bundle's graphs that are compared: ONNX Runtime and torch.

The only module of the exporter that imports onnxruntime. It takes and gives arrays; the runtime
proper binds buffers instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edge_vlm.errors import MissingExtraError
from edge_vlm.errors.export import ExportError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm.formats.precision import FP32, KVLayout, Precision, Variant
from edge_vlm.telemetry import refuse_telemetry
from edge_vlm_export.verify.pipeline import Arrays, RunGraph

if TYPE_CHECKING:
    from torch import nn

    from edge_vlm.model.video_lm import VideoLM


class OrtRunner:
    """One graph file.

    With `as_written` nothing is rearranged, so that every float16 tensor really is rounded to
    float16; otherwise a provider without float16 kernels may keep float32 between two nodes.
    """

    def __init__(
        self, path: Path, spec: GraphSpec, *, threads: int = 1, as_written: bool = False
    ) -> None:
        refuse_telemetry()
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise MissingExtraError.for_library("onnxruntime", "export") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Weights stay mapped files instead of being copied into another layout.
        options.add_session_config_entry("session.disable_prepacking", "1")
        if as_written:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.spec = spec
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the library's exceptions share no public base
            raise ExportError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load graph {spec.name}: {error}",
                where=path,
            ) from error

    def run(self, inputs: Arrays, more: Sequence[str] = ()) -> Arrays:
        """Outputs of the spec, and `more` besides. An in-place cache is copied first."""
        in_place = [t.name for t in self.spec.outputs if t.name.startswith("present_")]
        try:
            if not in_place:
                names = [*(t.name for t in self.spec.outputs), *more]
                return dict(zip(names, self._session.run(names, inputs), strict=True))
            return self._run_in_place(inputs, in_place, more)
        except Exception as error:
            raise ExportError(f"graph {self.spec.name} failed: {error}") from error

    def _run_in_place(self, inputs: Arrays, in_place: Sequence[str], more: Sequence[str]) -> Arrays:
        binding = self._session.io_binding()
        buffers = {name: inputs[name.replace("present_", "past_")].copy() for name in in_place}
        for name, array in inputs.items():
            bound = buffers.get(name.replace("past_", "present_"), np.ascontiguousarray(array))
            binding.bind_input(name, "cpu", 0, bound.dtype.type, bound.shape, bound.ctypes.data)
        rest = [t.name for t in self.spec.outputs if t.name not in buffers] + list(more)
        for name in rest:
            binding.bind_output(name)
        for name, buffer in buffers.items():
            binding.bind_output(name, "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data)
        self._session.run_with_iobinding(binding)
        # Outputs come in the order in which they were bound.
        values = dict(zip([*rest, *buffers], binding.get_outputs(), strict=True))
        return {name: values[name].numpy() for name in rest} | buffers


class Runner(Protocol):
    """One graph, as `OrtRunner`."""

    def run(self, inputs: Arrays, more: Sequence[str] = ()) -> Arrays: ...


@dataclass(frozen=True, kw_only=True)
class Graphs:
    """Graph files and how to read them."""

    paths: Mapping[str, Path]
    specs: Mapping[str, GraphSpec]
    precision: Precision = FP32
    variant: Variant = Variant.PORTABLE
    layout: KVLayout = KVLayout.TOKEN_MAJOR
    threads: int = 1
    opener: Callable[[str], Runner] | None = None
    """Another library than ONNX Runtime, by a graph's name."""

    @classmethod
    def of(cls, bundle: EngineBundle, threads: int) -> Graphs:
        return cls(
            paths={name: bundle.graph_path(name) for name in bundle.specs},
            specs=bundle.specs,
            precision=bundle.precision,
            variant=bundle.variant,
            layout=bundle.kv_layout,
            threads=threads,
        )

    def open(self, name: str) -> Runner:
        if self.opener is not None:
            return self.opener(name)
        half = self.precision.base == "float16"
        return OrtRunner(self.paths[name], self.specs[name], threads=self.threads, as_written=half)


def ort_run(graphs: Graphs) -> RunGraph:
    """Opens each graph once, when it is first run."""
    runners: dict[str, Runner] = {}

    def run(name: str, inputs: Arrays) -> Arrays:
        if name not in runners:
            runners[name] = graphs.open(name)
        return runners[name].run(inputs)

    return run


def torch_run(model: VideoLM, graphs: Graphs) -> RunGraph:
    modules = {name: torch_module(name, model, graphs.variant) for name in graphs.specs}
    return lambda name, inputs: run_module(modules[name], graphs.specs[name], inputs)


def torch_module(name: str, model: VideoLM, variant: Variant = Variant.PORTABLE) -> nn.Module:
    from edge_vlm_export.graphs.modules import graph_module

    return graph_module(name, model, variant=variant)


def run_module(module: nn.Module, spec: GraphSpec, inputs: Arrays) -> Arrays:
    """The outputs of the torch module that the graph was made from, computed in float32."""
    import torch

    args = [torch.from_numpy(inputs[t.name]) for t in spec.inputs]
    with torch.no_grad():
        result = module(*(x.float() if x.dtype == torch.float16 else x for x in args))
    tensors = result if isinstance(result, tuple) else (result,)
    with np.errstate(over="ignore"):  # what becomes infinite is named by whoever looks at it
        return {
            t.name: out.numpy().astype(t.dtype, copy=False)
            for t, out in zip(spec.outputs, tensors, strict=True)
        }
