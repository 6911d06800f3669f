"""A bundle's graphs by OpenVINO, to be compared as ONNX Runtime's are. The only module of the
exporter that imports it.

In float32 the graphs must agree as exactly as with ONNX Runtime: that is whether OpenVINO reads
them rightly. In bfloat16, in which a CPU that has it serves a float32 bundle, as well as those of a
float16 bundle do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_vlm.errors import ConfigError, MissingExtraError
from edge_vlm.errors.export import ExportError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm.formats.precision import KVLayout
from edge_vlm_export.verify.ort_runner import Graphs
from edge_vlm_export.verify.pipeline import Arrays

NUMBERS = {"f32": "float32", "bf16": "bfloat16"}


class OpenVinoRunner:
    """One graph file, as `OrtRunner`."""

    def __init__(self, path: Path, spec: GraphSpec, *, threads: int, numbers: str) -> None:
        openvino, self.spec = _library(), spec
        options = {"INFERENCE_PRECISION_HINT": numbers, "INFERENCE_NUM_THREADS": threads}
        try:
            self._compiled: Any = openvino.compile_model(str(path), "CPU", options)
        except RuntimeError as error:
            raise ExportError(
                f"OpenVINO {openvino.__version__} cannot load graph {spec.name}: {error}",
                where=path,
            ) from error

    def run(self, inputs: Arrays, more: Sequence[str] = ()) -> Arrays:
        """Outputs of the spec."""
        assert not more, "it shows no tensors within a graph"
        try:
            found = self._compiled(inputs)
        except RuntimeError as error:
            raise ExportError(f"graph {self.spec.name} failed: {error}") from error
        return {tensor.name: np.array(found[tensor.name]) for tensor in self.spec.outputs}


def openvino_graphs(bundle: EngineBundle, threads: int) -> Iterator[tuple[str, Graphs]]:
    """What is to be compared, and what it is called.

    Raises MissingExtraError, and ConfigError for a bundle that OpenVINO would run wrongly."""
    if bundle.kv_layout is not KVLayout.TOKEN_MAJOR:
        raise ConfigError(
            f"OpenVINO cannot run a bundle of variant {bundle.variant.value}",
            where=bundle.path,
            remedy="export it with --variant portable",
        )
    openvino, graphs = _library(), Graphs.of(bundle, threads)
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    serves_bfloat16 = "BF16" in capabilities and bundle.precision.base == "float32"
    for numbers, called in NUMBERS.items():
        judged = graphs.precision
        if numbers == "bf16":
            if not serves_bfloat16:
                continue
            judged = replace(judged, base="float16")

        def opened(name: str, numbers: str = numbers) -> OpenVinoRunner:
            path, spec = graphs.paths[name], graphs.specs[name]
            return OpenVinoRunner(path, spec, threads=threads, numbers=numbers)

        yield f"OpenVINO in {called}", replace(graphs, precision=judged, opener=opened)


def _library() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError.for_library("openvino", "openvino") from error
    return openvino
