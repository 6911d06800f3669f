"""Which library runs a bundle's graphs: chosen by name, never by what happens to be installed."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_vlm.errors import ConfigError, MissingExtraError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.precision import KVLayout
from edge_vlm_runtime.engines import huge_pages
from edge_vlm_runtime.engines.base import CacheMemory, Engine
from edge_vlm_runtime.engines.cuda import Cuda, Gpu
from edge_vlm_runtime.engines.names import Backend
from edge_vlm_runtime.engines.openvino import (
    BFLOAT16,
    FLOAT32,
    OpenVinoEngine,
    multiplies_bfloat16,
    openvino_version,
    precision_for,
    require_portable,
)
from edge_vlm_runtime.engines.ort import (
    CUDA,
    OrtDevice,
    OrtEngine,
    ort_library,
    require_provider,
)
from edge_vlm_runtime.engines.store import EngineStore
from edge_vlm_runtime.engines.trt import DeviceMemory, TrtEngine
from edge_vlm_runtime.engines.trt_library import LIBRARIES, TrtLibrary, load_library

log = logging.getLogger(__name__)

MANY_BYTES = 64 << 20
"""Smaller weights stay in a cache, or are soon read."""


class Device(DeviceMemory, Protocol):
    """A GPU: `engines.cuda.Cuda`."""

    gpu: Gpu


@dataclass(frozen=True)
class OpenGraphs:
    """Every graph of a bundle, and the device memory that caches belong in; None is the host."""

    graphs: dict[str, Engine]
    cache_memory: CacheMemory | None = None
    runs_on: str = ""
    """In words: which library runs which graphs, and where."""


def reads_many_bytes(bundle: EngineBundle) -> bool:
    """Whether its weights are put on huge pages."""
    files = (file for file in bundle.path.glob("graphs/*") if file.is_file())
    return sum(file.stat().st_size for file in files) >= MANY_BYTES


def open_graphs(
    bundle: EngineBundle,
    backend: Backend,
    *,
    threads: int,
    engines: str | os.PathLike[str] | None = None,
) -> OpenGraphs:
    """`engines`: folder that `edge-vlm build` wrote, BUNDLE/engines by default.

    Raises EngineError and its leaves (TrtMissing, GpuMissing, CudaError, OutOfDeviceMemory,
    EngineMissing, EngineStale), MissingExtraError, ConfigError for what a backend cannot run.
    """
    if backend is Backend.TRT:
        if bundle.kv_layout is not KVLayout.TOKEN_MAJOR:
            raise ConfigError(
                f"TensorRT cannot run a bundle of variant {bundle.variant.value}",
                where=bundle.path,
                remedy="export it with --variant portable",
            )
        folder = bundle.path / "engines" if engines is None else Path(engines)
        return open_engines(bundle, folder, load_library(_built_by(folder)), Cuda())
    if engines is not None:
        raise ConfigError(f"backend {backend.value} runs no engines", remedy="take --backend trt")
    if backend is Backend.CUDA:
        require_provider(CUDA)  # says more of what to install than a driver that is not there
        return open_by_ort(bundle, OrtDevice(Cuda()), threads=threads)
    by_openvino, why = _for_openvino(bundle, backend)
    if bundle.precision.vit == "int8" and not by_openvino:
        log.warning(
            "int8 pictures take ONNX Runtime longer than float32 ones on a CPU: take --backend "
            "openvino, or export with vit=base"
        )
    opened: dict[str, Engine] = {}
    try:
        for name in bundle.specs:
            if name in by_openvino:
                opened[name] = OpenVinoEngine(bundle, name, threads=threads)
            else:
                opened[name] = OrtEngine(bundle, name, threads=threads)
    except BaseException:
        _close(opened)
        raise
    runs_on = _in_words(bundle, by_openvino, why)
    if reads_many_bytes(bundle):
        gathered = huge_pages.gather()
        runs_on += f"; {gathered >> 20} MB on huge pages" if gathered else ""
    return OpenGraphs(opened, runs_on=runs_on)


def open_by_ort(
    bundle: EngineBundle, device: OrtDevice, *, threads: int, provider: str = CUDA
) -> OpenGraphs:
    """ONNX Runtime with the cache in the device's memory. Raises MissingExtraError, EngineError,
    CudaError."""
    opened: dict[str, Engine] = {}
    try:
        for name in bundle.specs:
            opened[name] = OrtEngine(
                bundle, name, threads=threads, provider=provider, device=device
            )
    except BaseException:
        _close(opened)
        raise
    runs_on = f"all graphs by ONNX Runtime {ort_library()[0]} on {device.memory.gpu.name}"
    return OpenGraphs(opened, device.memory, runs_on)


def _for_openvino(bundle: EngineBundle, backend: Backend) -> tuple[list[str], str]:
    """The graphs that OpenVINO runs, and why `auto` chose that.

    `auto`: those of pictures, where the CPU multiplies bfloat16 itself (2 to 4 times fewer
    milliseconds than ONNX Runtime) and the bundle may compute in it or has int8 pictures; there
    also frames and questions of an int4 language model that has a graph of its own for one more
    token, of which ONNX Runtime is faster. In float32 the two are equally fast.
    """
    if backend is Backend.OPENVINO:
        require_portable(bundle)
        return list(bundle.specs), ""
    if backend is not Backend.AUTO:
        return [], ""
    try:
        has_bfloat16 = multiplies_bfloat16()
    except MissingExtraError:
        return [], "auto: openvino is not installed"
    if bundle.kv_layout is not KVLayout.TOKEN_MAJOR:
        return [], f"auto: a bundle of variant {bundle.variant.value}"
    if not has_bfloat16:
        return [], "auto: this CPU does not multiply bfloat16 itself"
    if precision_for(bundle, "vit_trunk") != BFLOAT16 and bundle.precision.vit != "int8":
        return [], "auto: the bundle's pictures are computed in float16"
    precision = bundle.precision
    is_int4 = precision.base == "float32" and precision.llm == "int4"
    others = ("llm_decode",) if is_int4 and "llm_decode" in bundle.specs else ("llm", "llm_decode")
    return [name for name in bundle.specs if name not in others], "auto"


def _in_words(bundle: EngineBundle, by_openvino: list[str], why: str) -> str:
    parts = []
    for numbers, told in ((BFLOAT16, "bfloat16"), (FLOAT32, "float32")):
        alike = [name for name in by_openvino if precision_for(bundle, name) == numbers]
        if alike:
            parts.append(f"{', '.join(alike)} by OpenVINO {openvino_version()} in {told}")
    if rest := [name for name in bundle.specs if name not in by_openvino]:
        parts.append(f"{', '.join(rest)} by ONNX Runtime {ort_library()[0]} on the CPU")
    return "; ".join(parts) + (f" ({why})" if why else "")


def open_engines(
    bundle: EngineBundle, folder: Path, library: TrtLibrary, device: Device
) -> OpenGraphs:
    """The engines in `folder` that `library` built.

    Raises EngineMissing, EngineStale, OutOfDeviceMemory, CudaError, and GpuMissing if the driver is
    too old for the library.
    """
    store = EngineStore(folder, library.name)
    # All are checked before one is loaded: a library that refuses an engine says far less.
    entries = {
        name: store.checked(bundle, name, library.version, device.gpu) for name in bundle.specs
    }
    opened: dict[str, Engine] = {}
    try:
        for name, entry in entries.items():
            opened[name] = TrtEngine(bundle.specs[name], entry.path, library, device)
    except BaseException:
        _close(opened)
        raise
    runs_on = f"all graphs by {library.name} {library.version} on {device.gpu.name}"
    return OpenGraphs(opened, device, runs_on)


def _built_by(folder: Path) -> str | None:
    """The library that engines were built with, if there are any of one only."""
    found = [name for name in LIBRARIES if (folder / name).is_dir()]
    return found[0] if len(found) == 1 else None


def _close(graphs: dict[str, Engine]) -> None:
    for graph in graphs.values():
        graph.close()
