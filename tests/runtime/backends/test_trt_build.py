"""Engines of a tiny bundle: built by the real compiler where it is installed, kept, and refused
where they do not fit. Nothing here runs an engine."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_vlm.errors import (
    BundleSchemaError,
    ConfigError,
    EngineMissing,
    EngineStale,
    GpuMissing,
    OnnxUnsupported,
    OutOfDeviceMemory,
    TrtBuildFailed,
    TrtParse,
)
from edge_vlm.errors.export import NoSpaceLeft
from edge_vlm.formats.bundle import MANIFEST, EngineBundle
from edge_vlm_runtime.cli.build import build
from edge_vlm_runtime.engines import build as trt_builder
from edge_vlm_runtime.engines.build import BuildOptions, build_engines, preflight, run_child
from edge_vlm_runtime.engines.cuda import Gpu
from edge_vlm_runtime.engines.store import EngineStore, Fingerprint
from tests.published_folder import image_bundle
from tests.runtime.command_line import command_line
from tests.tiny import tiny_bundle, tiny_variant

RTX = "tensorrt_rtx"
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec(RTX) is None,
    reason="tensorrt_rtx is not installed (pip install 'edge-vlm[trt-rtx]')",
)
ADA = Gpu(name="NVIDIA GeForce RTX 4090", capability="sm_89")
ORIN = Gpu(name="Orin", capability="sm_87")
COMPILER = [sys.executable, "-m", "edge_vlm_runtime.engines.compile"]


@pytest.fixture(scope="module")
def bundle() -> EngineBundle:
    return EngineBundle.open(tiny_bundle())


@pytest.fixture(scope="module")
def engines(bundle: EngineBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every graph, in every profile, for SM89 and SM120, by NVIDIA's parser and builder."""
    folder = tmp_path_factory.mktemp("engines")
    steps: list[str] = []
    built = build_engines(
        bundle,
        folder,
        BuildOptions(library=RTX, targets=("sm_89", "SM120")),
        progress=lambda graph, phase, done, total: steps.append(graph),
    )
    assert {name: result.fresh for name, result in built.items()} == dict.fromkeys(
        bundle.specs, True
    )
    assert set(steps) == set(bundle.specs)
    return folder


@needs_rtx
def test_every_graph_builds_for_ada_and_blackwell(bundle: EngineBundle, engines: Path) -> None:
    store = EngineStore(engines, RTX)
    for name in bundle.specs:
        entry = store.checked(bundle, name, _version(), ADA)
        assert entry.path.stat().st_size > 100_000
        assert entry.fingerprint.capabilities == ("sm_89", "sm_120")
        assert entry.build["warnings"] == []
    assert {p.name for p in store.folder.iterdir()} == {
        f"{name}.{end}" for name in bundle.specs for end in ("engine", "json")
    }


@needs_rtx
@pytest.mark.parametrize(
    ("folder", "graph"),
    [
        (lambda: tiny_variant("edge"), "vit_trunk"),  # float16, int8 in and int8 weights
        (lambda: tiny_variant("edge"), "llm_decode"),  # float16, int4 weights, joined scores
        (image_bundle, "image_encoder"),
        (image_bundle, "llm"),
    ],
)
def test_other_precisions_and_graphs_build(
    folder: Callable[[], Path], graph: str, tmp_path: Path
) -> None:
    options = BuildOptions(library=RTX, targets=("sm_89", "sm_120"))
    built = build_engines(EngineBundle.open(folder()), tmp_path, options, graphs=[graph])
    assert built[graph].entry.build["warnings"] == []


@needs_rtx
def test_the_command_keeps_what_is_up_to_date(
    bundle: EngineBundle, engines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = ["--target", "sm_89", "--target", "sm_120", "--library", RTX]
    arguments = [str(bundle.path), "--engines", str(engines), *targets]
    assert command_line(build, arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[2][:11] for line in lines[:-1]] == [" up to date"] * 3
    assert "sm_89, sm_120" in lines[-1]


@needs_rtx
def test_a_graph_it_cannot_import(tmp_path: Path, bundle: EngineBundle) -> None:
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Det", ["x"], ["y"], name="the_node")],
        "g",
        [value("x", 1, ["F", 2, 2])],
        [value("y", 1, ["F"])],
    )
    path = tmp_path / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    with pytest.raises(OnnxUnsupported, match="Det the_node"):
        run_child(COMPILER, _request(tmp_path, bundle, path), "g", lambda *step: None)
    path.write_bytes(b"not a graph")
    with pytest.raises(TrtParse, match="cannot read it"):
        run_child(COMPILER, _request(tmp_path, bundle, path), "g", lambda *step: None)


def _request(folder: Path, bundle: EngineBundle, path: Path) -> dict[str, object]:
    return {
        "library": RTX,
        "graph": str(path),
        "spec": bundle.specs["vit_stem"].to_dict(),
        "engine": str(folder / "engine"),
        "timing_cache": None,
        "targets": ["sm_89"],
        "workspace_bytes": None,
        "optimization_level": None,
    }


def _version() -> str:
    from edge_vlm_runtime.engines.trt_library import load_library

    return load_library(RTX).version


def _stored(bundle: EngineBundle, folder: Path, gpu: Gpu = ADA) -> EngineStore:
    """A store with a made-up engine of `vit_stem`."""
    store = EngineStore(folder, "tensorrt")
    store.folder.mkdir(parents=True)
    fingerprint = Fingerprint.of(
        bundle,
        "vit_stem",
        library="tensorrt",
        library_version="10.3.0",
        gpu=gpu.name,
        capabilities=(gpu.capability,),
        options={"optimization_level": None},
    )
    file = store.folder / "new"
    file.write_bytes(b"engine")
    store.write("vit_stem", file, fingerprint, {"seconds": 1.0})
    return store


def test_an_engine_is_found_again(bundle: EngineBundle, tmp_path: Path) -> None:
    entry = _stored(bundle, tmp_path).checked(bundle, "vit_stem", "10.3.0", ADA)
    assert entry.path.read_bytes() == b"engine"
    assert entry.build == {"seconds": 1.0}


def test_an_engine_of_another_gpu_is_refused(bundle: EngineBundle, tmp_path: Path) -> None:
    with pytest.raises(EngineStale, match=r"RTX 4090.*now 'Orin'") as caught:
        _stored(bundle, tmp_path).checked(bundle, "vit_stem", "10.3.0", ORIN)
    assert [line.partition(":")[0] for line in caught.value.differences] == ["gpu", "capabilities"]
    assert caught.value.code == "E-ENGINE-STALE"


def test_an_engine_of_another_version_is_refused(bundle: EngineBundle, tmp_path: Path) -> None:
    with pytest.raises(EngineStale, match=r"library_version: '10\.3\.0', now '10\.16\.1'"):
        _stored(bundle, tmp_path).checked(bundle, "vit_stem", "10.16.1", ADA)


def test_an_engine_of_another_graph_is_refused(bundle: EngineBundle, tmp_path: Path) -> None:
    store = _stored(bundle, tmp_path / "engines")
    copy = tmp_path / "bundle"
    shutil.copytree(bundle.path, copy)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"]["graphs/vit_stem.onnx"] = "0" * 64
    (copy / MANIFEST).write_text(json.dumps(manifest))
    other = dataclasses.replace(bundle, path=copy)
    with pytest.raises(EngineStale) as caught:
        store.checked(other, "vit_stem", "10.3.0", ADA)
    assert [line.partition(":")[0] for line in caught.value.differences] == ["graph"]


def test_a_damaged_engine_is_refused(bundle: EngineBundle, tmp_path: Path) -> None:
    store = _stored(bundle, tmp_path)
    store.engine_path("vit_stem").write_bytes(b"cut")
    with pytest.raises(EngineStale, match="not the one that was built"):
        store.checked(bundle, "vit_stem", "10.3.0", ADA)
    (store.folder / "vit_stem.json").write_text("{")
    with pytest.raises(EngineStale, match="not one we wrote"):
        store.checked(bundle, "vit_stem", "10.3.0", ADA)


def test_no_engine_says_how_to_build_it(bundle: EngineBundle, tmp_path: Path) -> None:
    store = _stored(bundle, tmp_path)
    with pytest.raises(EngineMissing, match="edge-vlm build"):
        store.checked(bundle, "llm", "10.3.0", ADA)
    store.engine_path("vit_stem").unlink()
    with pytest.raises(EngineMissing, match="vit_stem has no engine"):
        store.checked(bundle, "vit_stem", "10.3.0", ADA)


def _child(code: str) -> dict[str, object]:
    command = [sys.executable, "-c", f"import json, os, sys; sys.stdin.read(); {code}"]
    return run_child(command, {}, "llm", lambda *step: None)


def test_what_a_child_prints_besides_is_not_a_message() -> None:
    code = "print('[TRT] hello'); print('{\"a\": 1}'); print('{\"done\": {\"seconds\": 2}}')"
    assert _child(code) == {"seconds": 2}


def test_a_child_that_dies_is_told_apart() -> None:
    with pytest.raises(OutOfDeviceMemory, match="killed while it built llm"):
        _child("os.kill(os.getpid(), 9)")
    with pytest.raises(TrtBuildFailed, match="signal SIGSEGV: last words"):
        _child("print('last words', file=sys.stderr, flush=True); os.kill(os.getpid(), 11)")
    with pytest.raises(TrtBuildFailed, match="exit code 3"):
        _child("sys.exit(3)")
    with pytest.raises(TrtBuildFailed, match="exit code 0"):
        _child("print('{}')")


def test_too_little_memory_or_disk_is_said_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preflight({"a": 10}, tmp_path)
    with pytest.raises(NoSpaceLeft, match="free some"):
        monkeypatch.setattr(trt_builder, "memory_available", lambda: None)
        preflight({"a": 10**15}, tmp_path)
    monkeypatch.setattr(trt_builder, "memory_available", lambda: 2 * 10**9)
    with pytest.raises(
        OutOfDeviceMemory, match=r"building big needs about 6\.0 GB of memory, 2\.0"
    ):
        preflight({"small": 1, "big": 10**9}, tmp_path)


@needs_rtx
def test_without_a_gpu_a_target_is_needed(
    bundle: EngineBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_vlm_runtime.engines.cuda.Cuda.__init__.__defaults__", ("no.so",))
    with pytest.raises(GpuMissing, match="no NVIDIA driver"):
        build_engines(bundle, tmp_path, BuildOptions(library=RTX))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="no target 'orin'"):
        build_engines(bundle, tmp_path, BuildOptions(library=RTX, targets=("orin",)))
    with pytest.raises(TrtBuildFailed, match="no target sm_87"):
        build_engines(bundle, tmp_path, BuildOptions(library=RTX, targets=("sm_87",)))
    with pytest.raises(BundleSchemaError, match="no graph 'nose'"):
        build_engines(bundle, tmp_path, BuildOptions(library=RTX), graphs=["nose"])
