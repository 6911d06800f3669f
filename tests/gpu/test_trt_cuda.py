"""A built engine gives what ONNX Runtime gives. Needs an NVIDIA GPU and one of the libraries."""

from __future__ import annotations

import numpy as np
import pytest

from edge_vlm.errors import GpuMissing, TrtMissing
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm_runtime.engines.base import Engine
from edge_vlm_runtime.engines.build import BuildOptions, build_engines
from edge_vlm_runtime.engines.cuda import Cuda
from edge_vlm_runtime.engines.ort import OrtEngine
from edge_vlm_runtime.engines.store import EngineStore
from edge_vlm_runtime.engines.trt import TrtEngine
from edge_vlm_runtime.engines.trt_library import TrtLibrary, load_library
from tests.tiny import tiny_bundle


@pytest.fixture(scope="module")
def library() -> TrtLibrary:
    try:
        return load_library()
    except TrtMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def cuda() -> Cuda:
    try:
        return Cuda()
    except GpuMissing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def bundle() -> EngineBundle:
    return EngineBundle.open(tiny_bundle())


@pytest.fixture(scope="module")
def store(
    library: TrtLibrary, cuda: Cuda, bundle: EngineBundle, tmp_path_factory: pytest.TempPathFactory
) -> EngineStore:
    folder = tmp_path_factory.mktemp("engines")
    build_engines(bundle, folder, BuildOptions(library=library.name))
    return EngineStore(folder, library.name)


def _run(engine: Engine, inputs: dict[str, np.ndarray], sizes: dict[str, int]) -> list[np.ndarray]:
    outputs = [engine.spec.zeros(tensor, sizes) for tensor in engine.spec.outputs]
    for name, array in inputs.items():
        engine.bind_array(name, array)
    for tensor, array in zip(engine.spec.outputs, outputs, strict=True):
        engine.bind_array(tensor.name, array)
    engine.run()
    return outputs


@pytest.mark.parametrize("which", ["min", "opt", "max"])
@pytest.mark.parametrize("graph", ["vit_stem", "vit_trunk", "llm"])
def test_an_engine_equals_onnx_runtime(
    graph: str,
    which: str,
    library: TrtLibrary,
    cuda: Cuda,
    bundle: EngineBundle,
    store: EngineStore,
) -> None:
    entry = store.checked(bundle, graph, library.version, cuda.gpu)
    spec = bundle.specs[graph]
    sizes = spec.sizes(which)
    rng = np.random.default_rng(1)
    inputs = {}
    for tensor in spec.inputs:
        shape = tensor.resolve(sizes)
        if tensor.dtype == "float32":
            inputs[tensor.name] = rng.standard_normal(shape, dtype=np.float32)
        else:
            inputs[tensor.name] = np.zeros(shape, tensor.dtype)
    expected = _run(OrtEngine(bundle, graph, threads=2), inputs, sizes)
    engine = TrtEngine(spec, entry.path, library, cuda)
    for actual, wanted in zip(_run(engine, inputs, sizes), expected, strict=True):
        # Tensor cores may round float32 products to TF32: 10 bits.
        np.testing.assert_allclose(actual, wanted, rtol=2e-2, atol=2e-2)
    engine.close()
