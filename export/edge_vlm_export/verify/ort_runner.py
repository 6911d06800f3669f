"""The two ways of running a bundle's graphs that are compared: ONNX Runtime and torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm.formats.precision import FP32, KVLayout, Precision, Variant
from edge_vlm_export.verify.pipeline import Arrays, Run
from edge_vlm_export.verify.sessions import GraphSession

if TYPE_CHECKING:
    from torch import nn

    from edge_vlm.model.video_lm import VideoLM


@dataclass(frozen=True, kw_only=True)
class Graphs:
    """Graph files and how to read them."""

    paths: Mapping[str, Path]
    specs: Mapping[str, GraphSpec]
    precision: Precision = FP32
    variant: Variant = Variant.PORTABLE
    layout: KVLayout = KVLayout.TOKEN_MAJOR
    threads: int = 1

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

    def open(self, name: str) -> GraphSession:
        half = self.precision.base == "float16"
        return GraphSession(
            self.paths[name], self.specs[name], threads=self.threads, as_written=half
        )


def session_run(graphs: Graphs) -> Run:
    """Opens each graph once, when it is first run."""
    sessions: dict[str, GraphSession] = {}

    def run(name: str, inputs: Arrays) -> Arrays:
        if name not in sessions:
            sessions[name] = graphs.open(name)
        return sessions[name].run(inputs)

    return run


def torch_run(model: VideoLM, graphs: Graphs) -> Run:
    modules = {name: torch_module(name, model, graphs.variant) for name in graphs.specs}
    return lambda name, inputs: run_torch(modules[name], graphs.specs[name], inputs)


def torch_module(name: str, model: VideoLM, variant: Variant = Variant.PORTABLE) -> nn.Module:
    from edge_vlm_export.graphs.modules import graph_module

    return graph_module(name, model, variant=variant)


def run_torch(module: nn.Module, spec: GraphSpec, inputs: Arrays) -> Arrays:
    """The outputs of the torch module that the graph was made from, computed in float32."""
    import torch

    args = [torch.from_numpy(inputs[t.name]) for t in spec.inputs]
    with torch.no_grad():
        result = module(*(x.float() if x.dtype == torch.float16 else x for x in args))
    tensors = result if isinstance(result, tuple) else (result,)
    return {
        t.name: out.numpy().astype(t.dtype, copy=False)
        for t, out in zip(spec.outputs, tensors, strict=True)
    }
