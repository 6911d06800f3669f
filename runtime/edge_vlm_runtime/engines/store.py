"""Built engines on disk. An engine is a cache entry: the bundle is what is kept and copied.

    BUNDLE/engines/LIBRARY/GRAPH.engine    what the library wrote
    BUNDLE/engines/LIBRARY/GRAPH.json      for what it was built, its sha256, how the build went

The .json is written last, so an interrupted build leaves no entry.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_vlm.errors import BundleSchemaError, EngineMissing, EngineStale
from edge_vlm.formats.bundle import BORROWED, MANIFEST, EngineBundle, sha256_of_file
from edge_vlm.json_text import MALFORMED, fault_of, parse_json
from edge_vlm_runtime.engines.cuda import Gpu

FORMAT = 1
BUILD_AGAIN = "build it here: edge-vlm build BUNDLE"


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """All that must agree for an engine to be the right one."""

    graph: str
    """sha256 over the graph's file and its weights."""
    profiles: str
    """sha256 over the spec, from which the profiles are made."""
    library: str
    library_version: str
    platform: str
    gpu: str
    """Name of the GPU it was built on, empty when built for `capabilities` without one."""
    capabilities: tuple[str, ...]
    options: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        bundle: EngineBundle,
        name: str,
        *,
        library: str,
        library_version: str,
        gpu: str,
        capabilities: tuple[str, ...],
        options: Mapping[str, Any],
    ) -> Fingerprint:
        spec = json.dumps(bundle.specs[name].to_dict(), sort_keys=True)
        return cls(
            graph=_graph_digest(bundle, name),
            profiles=hashlib.sha256(spec.encode()).hexdigest(),
            library=library,
            library_version=library_version,
            platform=f"{platform.system().lower()}-{platform.machine()}",
            gpu=gpu,
            capabilities=capabilities,
            options=dict(options),
        )

    def differences(self, other: Fingerprint) -> tuple[str, ...]:
        """One line for each field in which `other` is not this."""
        return tuple(
            f"{field.name}: {mine!r}, now {theirs!r}"
            for field in dataclasses.fields(self)
            if (mine := getattr(self, field.name)) != (theirs := getattr(other, field.name))
        )

    def mismatches(
        self, bundle: EngineBundle, name: str, version: str, gpu: Gpu
    ) -> tuple[str, ...]:
        """Why an engine of this fingerprint must not run here; nothing if it may."""
        wanted = Fingerprint.of(
            bundle,
            name,
            library=self.library,
            library_version=version,
            gpu=gpu.name if self.gpu else "",
            capabilities=self.capabilities,
            options=self.options,
        )
        found = self.differences(wanted)
        if gpu.capability not in self.capabilities:
            found += (f"capabilities: {list(self.capabilities)}, now {gpu.capability!r}",)
        return found


@dataclass(frozen=True, kw_only=True)
class Entry:
    path: Path
    sha256: str
    fingerprint: Fingerprint
    build: Mapping[str, Any]
    """Seconds, peak memory, warnings."""


class EngineStore:
    """Entries of one library under `folder`."""

    def __init__(self, folder: Path, library: str) -> None:
        self.library = library
        self.folder = folder / library

    def engine_path(self, name: str) -> Path:
        return self.folder / f"{name}.engine"

    @property
    def timing_cache(self) -> Path:
        return self.folder / "timing.cache"

    def read(self, name: str) -> Entry | None:
        """None if there is no entry; EngineStale if there is one that cannot be read."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            return None
        try:
            data = parse_json(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}, this program reads {FORMAT}")
            fields = dict(data["fingerprint"])
            fields["capabilities"] = tuple(fields["capabilities"])
            fields["options"] = dict(fields["options"])
            return Entry(
                path=self.engine_path(name),
                sha256=str(data["sha256"]),
                fingerprint=Fingerprint(**fields),
                build=dict(data["build"]),
            )
        except (OSError, *MALFORMED) as error:
            raise EngineStale(
                f"the entry of graph {name} is not one we wrote: {fault_of(error)}",
                where=path,
                remedy=BUILD_AGAIN,
            ) from error

    def write(
        self, name: str, engine: Path, fingerprint: Fingerprint, build: Mapping[str, Any]
    ) -> Entry:
        """Takes `engine`, a file in `folder`, as the entry of `name`."""
        digest = sha256_of_file(engine)
        target, record = self.engine_path(name), self.folder / f"{name}.json"
        record.unlink(missing_ok=True)  # from here until the end there is no entry
        os.replace(engine, target)
        data = {
            "format": FORMAT,
            "sha256": digest,
            "fingerprint": dataclasses.asdict(fingerprint),
            "build": dict(build),
        }
        partial = record.with_suffix(".json.partial")
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, record)
        return Entry(path=target, sha256=digest, fingerprint=fingerprint, build=dict(build))

    def checked(self, bundle: EngineBundle, name: str, version: str, gpu: Gpu) -> Entry:
        """The entry to run on `gpu` with the library's `version`.

        Raises EngineMissing, or EngineStale naming every field that differs.
        """
        entry = self.read(name)
        if entry is None or not entry.path.is_file():
            raise EngineMissing(
                f"graph {name} has no engine", where=self.folder, remedy=BUILD_AGAIN
            )
        differences = entry.fingerprint.mismatches(bundle, name, version, gpu)
        if not differences and sha256_of_file(entry.path) != entry.sha256:
            differences = ("the file is not the one that was built",)
        if differences:
            raise EngineStale(
                f"the engine of graph {name} does not fit ({'; '.join(differences)})",
                where=entry.path,
                remedy=BUILD_AGAIN,
                differences=differences,
            )
        return entry


def graph_bytes(bundle: EngineBundle, name: str) -> int:
    """Size of a graph's file and its weights."""
    return sum((bundle.path / file).stat().st_size for file in _graph_files(bundle, name))


def _graph_digest(bundle: EngineBundle, name: str) -> str:
    """Made of the manifest's hashes, which were checked when the bundle was opened."""
    try:
        manifest = parse_json((bundle.path / MANIFEST).read_text(encoding="utf-8"))
        hashes = [f"{file} {manifest['files'][file]}" for file in _graph_files(bundle, name)]
    except (OSError, *MALFORMED) as error:
        raise BundleSchemaError(f"{MANIFEST}: {fault_of(error)}", where=bundle.path) from error
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _graph_files(bundle: EngineBundle, name: str) -> list[str]:
    """The graph and its weights, those that it may borrow included."""
    graph = bundle.graph_path(name)
    places = [graph.with_name(f"{n}.weights") for n in (name, *BORROWED.get(name, ()))]
    weights = [path for path in places if path.is_file()]
    return [path.relative_to(bundle.path).as_posix() for path in (graph, *weights)]
