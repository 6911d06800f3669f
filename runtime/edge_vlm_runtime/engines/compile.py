"""Compiles one graph to an engine, in a process of its own.

`python -m edge_vlm_runtime.engines.compile` reads a request (JSON) from standard input and writes
lines of JSON to standard output: {"progress": ...} as it goes, {"done": ...} or {"error": ...} at
the end.
A compiler that crashes, or is killed for its memory, takes only this process with it.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_vlm.errors import (
    EdgeVlmError,
    EngineError,
    OnnxUnsupported,
    OutOfDeviceMemory,
    TrtBuildFailed,
    TrtMissing,
    TrtNoTactic,
    TrtParse,
    TrtProfile,
)
from edge_vlm.formats.graph_spec import GraphSpec
from edge_vlm_runtime.engines.trt_library import TrtLibrary, load_library
from edge_vlm_runtime.engines.trt_profiles import profiles_of

Report = Callable[[str, int, int], None]
"""Phase, steps done, steps in all."""

INCONSISTENT_PROFILE = ("not self-consistent", "invalid optimization profile")
NO_TACTIC = ("Could not find any implementation", "no implementation")
OUT_OF_MEMORY = ("OutOfMemory", "out of memory", "memory allocation failed")
DTYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
}


def compile_graph(
    library: TrtLibrary,
    graph: Path,
    spec: GraphSpec,
    *,
    targets: tuple[str, ...] = (),
    workspace_bytes: int | None = None,
    optimization_level: int | None = None,
    timing_cache: Path | None = None,
    report: Report = lambda phase, done, total: None,
) -> Any:
    """The serialised engine, a buffer.

    `targets` ("sm_89"): GPUs to build for instead of the one here; only TensorRT for RTX can.
    Raises OnnxUnsupported, TrtParse, TrtProfile, TrtNoTactic, OutOfDeviceMemory, TrtBuildFailed.
    """
    trt = library.module
    library.clear()
    builder = _made(trt.Builder(library.logger), "Builder", library, graph)
    # Version 10 needs this flag to take the graph's types as they are; 11 knows no other way.
    flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flag)
    parser = trt.OnnxParser(network, library.logger)
    if not parser.parse_from_file(str(graph)):
        raise _parse_error(trt, parser, library, graph)
    _check_tensors(trt, network, spec, graph)

    config = builder.create_builder_config()
    for profile in profiles_of(spec):
        trt_profile = builder.create_optimization_profile()
        for tensor in spec.inputs:
            trt_profile.set_shape(tensor.name, *profile.shapes(tensor))
        if config.add_optimization_profile(trt_profile) < 0:
            raise TrtProfile(f"profile {profile.name} is refused: {_said(library)}", where=graph)
    if targets:
        _set_targets(trt, config, targets, library)
    if workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    if optimization_level is not None:
        config.builder_optimization_level = optimization_level
    cache = None
    if timing_cache is not None:
        known = timing_cache.read_bytes() if timing_cache.is_file() else b""
        cache = config.create_timing_cache(known)
        if cache is None or not config.set_timing_cache(cache, False):
            # Measured by another version or GPU: begin a new one.
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
    monitor = _monitor(trt, report)
    config.progress_monitor = monitor

    engine = builder.build_serialized_network(network, config)
    for warning in library.messages("WARNING"):
        if any(mark in warning for mark in INCONSISTENT_PROFILE):
            raise TrtProfile(warning, where=graph, remedy="export the bundle again")
    if engine is None:
        raise _build_error(library, graph)
    if timing_cache is not None and cache is not None:
        partial = timing_cache.with_suffix(".partial")
        partial.write_bytes(memoryview(cache.serialize()))
        partial.replace(timing_cache)
    return engine


def _made(value: Any, what: str, library: TrtLibrary, graph: Path) -> Any:
    if value is None:
        raise TrtBuildFailed(f"{library.name} gives no {what}: {_said(library)}", where=graph)
    return value


def _check_tensors(trt: Any, network: Any, spec: GraphSpec, graph: Path) -> None:
    """TrtParse if the graph's inputs and outputs are not those of its spec."""
    sides = (
        ("input", spec.inputs, [network.get_input(i) for i in range(network.num_inputs)]),
        ("output", spec.outputs, [network.get_output(i) for i in range(network.num_outputs)]),
    )
    for side, wanted, found in sides:
        expected = {tensor.name: getattr(trt.DataType, DTYPES[tensor.dtype]) for tensor in wanted}
        given = {tensor.name: tensor.dtype for tensor in found}
        for name in expected.keys() | given.keys():
            if expected.get(name) != given.get(name):
                raise TrtParse(
                    f"{side} {name} is {given.get(name)} to the parser, "
                    f"{expected.get(name)} in the spec",
                    where=graph,
                    remedy="export the bundle again",
                )


def _set_targets(trt: Any, config: Any, targets: tuple[str, ...], library: TrtLibrary) -> None:
    known = getattr(trt, "ComputeCapability", None)
    if known is None or not hasattr(config, "set_compute_capability"):
        raise TrtMissing(
            f"{library.name} {library.version} builds only for the GPU that is here",
            remedy="leave --target out, or use --library tensorrt_rtx",
        )
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        name = target.upper().replace("_", "")
        if not hasattr(known, name):
            raise TrtBuildFailed(
                f"{library.name} {library.version} has no target {target}",
                remedy="it knows " + ", ".join(sorted(n for n in dir(known) if n[:2] == "SM")),
            )
        config.set_compute_capability(getattr(known, name), index)


def _parse_error(trt: Any, parser: Any, library: TrtLibrary, graph: Path) -> EngineError:
    unsupported = {
        getattr(trt.ErrorCode, name) for name in dir(trt.ErrorCode) if name[:12] == "UNSUPPORTED_"
    }
    lines, missing = [], []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        at = f"{error.node_operator()} {error.node_name()}".strip()
        lines.append(f"{at}: {error.desc()}" if at else str(error.desc()))
        if error.code() in unsupported:
            missing.append(lines[-1])
    if missing:
        return OnnxUnsupported(
            f"{library.name} {library.version} cannot import {'; '.join(missing)}",
            where=graph,
            remedy="export with --variant portable, or use ONNX Runtime for this bundle",
        )
    return TrtParse(
        f"{library.name} {library.version} cannot read it: {'; '.join(lines) or _said(library)}",
        where=graph,
    )


def _build_error(library: TrtLibrary, graph: Path) -> EngineError:
    """The library says why only in its log; this is the one place that reads log text."""
    said = _said(library)
    if any(mark in said for mark in OUT_OF_MEMORY):
        return OutOfDeviceMemory(said, where=graph, remedy="lower --workspace, or free some memory")
    if any(mark in said for mark in INCONSISTENT_PROFILE):
        return TrtProfile(said, where=graph, remedy="export the bundle again")
    if any(mark in said for mark in NO_TACTIC):
        return TrtNoTactic(said, where=graph, remedy="try a newer version, or another precision")
    return TrtBuildFailed(said, where=graph)


def _said(library: TrtLibrary) -> str:
    return "; ".join(library.errors) or "it gives no reason"


def _monitor(trt: Any, report: Report) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            report(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            report(phase_name, step + 1, self._steps.get(phase_name, step + 1))
            return True  # False would end the build

        def phase_finish(self, phase_name: str) -> None:
            steps = self._steps.pop(phase_name, 0)
            report(phase_name, steps, steps)

    return Monitor()


def _say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _main() -> int:
    request = json.load(sys.stdin)
    began = time.monotonic()
    try:
        library = load_library(request["library"])
        engine = compile_graph(
            library,
            Path(request["graph"]),
            GraphSpec.from_dict(request["spec"]),
            targets=tuple(request["targets"]),
            workspace_bytes=request["workspace_bytes"],
            optimization_level=request["optimization_level"],
            timing_cache=_path(request["timing_cache"]),
            report=lambda phase, done, total: _say(progress=[phase, done, total]),
        )
        Path(request["engine"]).write_bytes(memoryview(engine))
    except EdgeVlmError as error:
        what = {"what": error.what, "where": error.where, "remedy": error.remedy}
        _say(error=type(error).__name__, **what)
        return 1
    _say(
        done={
            "seconds": round(time.monotonic() - began, 2),
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "warnings": library.messages("WARNING"),
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(_main())
