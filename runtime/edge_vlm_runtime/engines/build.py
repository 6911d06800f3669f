"""Builds a bundle's engines: checks beforehand, one child process for each graph, entries."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_vlm import errors
from edge_vlm.errors import ConfigError, EngineStale, OutOfDeviceMemory, TrtBuildFailed, export
from edge_vlm.errors.export import NoSpaceLeft
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm_runtime.engines.cuda import Cuda
from edge_vlm_runtime.engines.store import EngineStore, Entry, Fingerprint, graph_bytes
from edge_vlm_runtime.engines.trt_library import load_library

LIBRARY_BYTES = 1_000_000_000
"""The libraries themselves and a graph without weights. A tiny graph peaks at 0.3 GB."""
WEIGHT_COPIES = 5
"""Measured with TensorRT for RTX 1.7: 3, or 5 where it keeps weights once for each profile."""
ENGINE_COPIES = 2
"""So large an engine can be, in weights, for the same reason."""
LAST_LINES = 5

Progress = Callable[[str, str, int, int], None]
"""Graph, phase, steps done, steps in all."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    library: str | None = None
    """None: TensorRT if it is here, else TensorRT for RTX."""
    targets: tuple[str, ...] = ()
    """GPUs to build for, as "sm_89"; none: the GPU that is here."""
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    rebuild: bool = False

    def __post_init__(self) -> None:
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise ValueError(f"BuildOptions.workspace_bytes = {self.workspace_bytes}")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise ValueError(f"BuildOptions.optimization_level = {self.optimization_level}")


@dataclass(frozen=True, kw_only=True)
class Built:
    entry: Entry
    fresh: bool
    """False: it was there already and fits."""


def build_engines(
    bundle: EngineBundle,
    folder: Path,
    options: BuildOptions,
    *,
    graphs: Sequence[str] = (),
    progress: Progress = lambda graph, phase, done, total: None,
) -> dict[str, Built]:
    """Builds the named graphs (all if none is named) into `folder` and says what came of each.

    Raises TrtMissing, GpuMissing (no targets and no GPU), OutOfDeviceMemory and NoSpaceLeft (before
    any work), and what `compile_graph` raises. Engines that were finished stay.
    """
    names = list(graphs) or list(bundle.specs)
    for name in names:
        bundle.graph_path(name)
    library = load_library(options.library)
    targets = tuple(dict.fromkeys(_target(target) for target in options.targets))
    gpu = None if targets else Cuda().gpu
    store = EngineStore(folder, library.name)
    wanted = {
        name: Fingerprint.of(
            bundle,
            name,
            library=library.name,
            library_version=library.version,
            gpu="" if gpu is None else gpu.name,
            capabilities=targets if gpu is None else (gpu.capability,),
            options={
                "workspace_bytes": options.workspace_bytes,
                "optimization_level": options.optimization_level,
            },
        )
        for name in names
    }
    built = {}
    for name in names:
        entry = None if options.rebuild else _still_good(store, name, wanted[name])
        if entry is not None:
            built[name] = Built(entry=entry, fresh=False)
    todo = [name for name in names if name not in built]
    if todo:
        store.folder.mkdir(parents=True, exist_ok=True)
        preflight({name: graph_bytes(bundle, name) for name in todo}, store.folder)
    for name in todo:
        built[name] = Built(
            entry=_build(bundle, name, store, wanted[name], targets, options, progress), fresh=True
        )
    return {name: built[name] for name in names}


def preflight(sizes: Mapping[str, int], folder: Path) -> None:
    """Raises OutOfDeviceMemory or NoSpaceLeft if such graphs will not fit, by our estimate.

    `sizes`: bytes of each graph with its weights.
    """
    largest = max(sizes, key=lambda name: sizes[name])
    needed, available = LIBRARY_BYTES + WEIGHT_COPIES * sizes[largest], memory_available()
    if available is not None and needed > available:
        raise OutOfDeviceMemory(
            f"building {largest} needs about {needed / 1e9:.1f} GB of memory, "
            f"{available / 1e9:.1f} GB is free",
            remedy="close other programs, add swap, or export with a smaller precision",
        )
    disk, free = ENGINE_COPIES * sum(sizes.values()), shutil.disk_usage(folder).free
    if disk > free:
        raise NoSpaceLeft(
            f"the engines need about {disk / 1e9:.1f} GB, {free / 1e9:.1f} GB is free",
            where=folder,
            remedy="free some, or name another disk with --engines",
        )


def memory_available() -> int | None:
    """Bytes that a new process can have, None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = {line.partition(":")[0]: line.split()[1] for line in lines}
    return int(sizes["MemAvailable"]) * 1024 if "MemAvailable" in sizes else None


def _target(text: str) -> str:
    digits = text.lower().replace("sm", "").strip("_")
    if not digits.isdigit():
        raise ConfigError(f"no target {text!r}", remedy="write it as sm_89")
    return f"sm_{digits}"


def _still_good(store: EngineStore, name: str, wanted: Fingerprint) -> Entry | None:
    try:
        entry = store.read(name)
    except EngineStale:
        return None  # not readable: build it again
    if entry is None or not entry.path.is_file() or entry.fingerprint.differences(wanted):
        return None
    return entry


def _build(
    bundle: EngineBundle,
    name: str,
    store: EngineStore,
    fingerprint: Fingerprint,
    targets: tuple[str, ...],
    options: BuildOptions,
    progress: Progress,
) -> Entry:
    with tempfile.TemporaryDirectory(prefix=f".{name}.partial-", dir=store.folder) as scratch:
        engine = Path(scratch) / "engine"
        request = {
            "library": fingerprint.library,
            "graph": str(bundle.graph_path(name)),
            "spec": bundle.specs[name].to_dict(),
            "engine": str(engine),
            # TensorRT for RTX measures kernels when they run, not here, and fills no such cache.
            "timing_cache": str(store.timing_cache) if store.library == "tensorrt" else None,
            "targets": targets,
            "workspace_bytes": options.workspace_bytes,
            "optimization_level": options.optimization_level,
        }
        done = run_child(
            [sys.executable, "-m", "edge_vlm_runtime.engines.compile"], request, name, progress
        )
        return store.write(name, engine, fingerprint, done)


def run_child(
    command: Sequence[str], request: Mapping[str, Any], graph: str, progress: Progress
) -> dict[str, Any]:
    """Runs the compiler and returns its "done" line; its errors are raised here.

    A child that dies is OutOfDeviceMemory if it was killed, TrtBuildFailed otherwise.
    """
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as child,
    ):
        assert child.stdin is not None and child.stdout is not None
        last: dict[str, Any] = {}
        try:
            child.stdin.write(json.dumps(request))
            child.stdin.close()
            for line in child.stdout:
                message = _message(line)
                if message is None:
                    log.write(line)
                elif "progress" in message:
                    progress(graph, *message["progress"])
                else:
                    last = message
        except BrokenPipeError:
            pass  # it died before it read the request: its exit code says how
        except BaseException:
            child.kill()
            raise
        code = child.wait()
        if code == 0 and "done" in last:
            return dict(last["done"])
        if "error" in last:
            name = last["error"]
            kind = getattr(errors, name, None) or getattr(export, name)
            raise kind(last["what"], where=last["where"], remedy=last["remedy"])
        log.seek(0)
        tail = " | ".join(log.read().splitlines()[-LAST_LINES:]) or "it said nothing"
    if code == -signal.SIGKILL:
        raise OutOfDeviceMemory(
            f"the compiler was killed while it built {graph}, most likely for its memory: {tail}",
            remedy="close other programs, add swap, or lower --workspace",
        )
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    raise TrtBuildFailed(f"the compiler of {graph} ended with {how}: {tail}")


def _message(line: str) -> dict[str, Any] | None:
    """None if the line is not one of ours: the library prints too."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    known = isinstance(message, dict) and message.keys() & {"progress", "done", "error"}
    return message if known else None
