"""Compiler and engine use only what every supported release has, and map its answers to errors."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_vlm.errors import (
    ConfigError,
    EngineStale,
    GpuMissing,
    OnnxUnsupported,
    OutOfDeviceMemory,
    ShapeRange,
    TrtBuildFailed,
    TrtMissing,
    TrtNoTactic,
    TrtParse,
    TrtProfile,
)
from edge_vlm.formats.graph_spec import DynamicDim, GraphSpec, TensorSpec
from edge_vlm_runtime.engines import trt_library
from edge_vlm_runtime.engines.compile import compile_graph
from edge_vlm_runtime.engines.cuda import Cuda
from edge_vlm_runtime.engines.trt import TrtEngine
from edge_vlm_runtime.engines.trt_library import load_library
from edge_vlm_runtime.engines.trt_profiles import profile_for, profiles_of
from tests.runtime.backends.fake_trt import API, FakeDevice, FakeTrt

SPEC = GraphSpec(
    name="g",
    inputs=(
        TensorSpec(name="x", dtype="float32", shape=("s", 2)),
        TensorSpec(name="past", dtype="float32", shape=("p", 2)),
    ),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("s", 2)),),
    dims={"s": DynamicDim(min=1, opt=2, max=4), "p": DynamicDim(min=0, opt=2, max=8)},
)
GRAPH = Path("g.onnx")
REMOVED_IN_11 = {"supports_model", "algorithm_selector", "device_memory_size", "int8_calibrator"}


@pytest.fixture(params=sorted(API))
def fake(request: pytest.FixtureRequest) -> FakeTrt:
    return FakeTrt(request.param, SPEC)


@pytest.fixture
def engine_file(tmp_path: Path) -> Path:
    path = tmp_path / "g.engine"
    path.write_bytes(b"engine")
    return path


def test_the_record_tells_releases_apart() -> None:
    names = {
        release: {n.rstrip("()") for names in API[release].values() for n in names}
        for release in API
    }
    assert {r for r in API if names[r] & REMOVED_IN_11} == {r for r in API if "==10." in r}
    assert [r for r in API if "ComputeCapability" in API[r]] == [r for r in API if "rtx" in r]


def test_the_fake_refuses_what_a_release_lacks(fake: FakeTrt) -> None:
    builder = fake.module.Builder(fake.library.logger)
    config = builder.create_builder_config()
    for name in ("int8_calibrator", "no_such_setting"):
        if name not in fake.api["IBuilderConfig"]:
            with pytest.raises(AttributeError):
                setattr(config, name, None)
            with pytest.raises(AttributeError):
                getattr(config, name)


def test_a_build_uses_recorded_names_only(fake: FakeTrt, tmp_path: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    cache = tmp_path / "timing.cache"
    engine = compile_graph(
        fake.library,
        GRAPH,
        SPEC,
        workspace_bytes=10**6,
        optimization_level=2,
        timing_cache=cache,
        report=lambda *step: steps.append(step),
    )
    assert engine == b"engine"
    assert fake.flags == 1 << fake.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    assert fake.config.builder_optimization_level == 2
    assert fake.config._pool == (fake.module.MemoryPoolType.WORKSPACE, 10**6)
    assert cache.read_bytes() == b"timings"
    assert steps == [("Building", 0, 2), ("Building", 1, 2), ("Building", 2, 2)]
    recorded = {name.rstrip("()") for name in fake.api["IProgressMonitor"]}
    mine = {n for n in vars(type(fake.config.progress_monitor)) if n[0] != "_"}
    assert mine == {"phase_start", "step_complete", "phase_finish"} <= recorded
    assert fake.profiles == [
        {"x": ((1, 2), (1, 2), (1, 2)), "past": ((0, 2), (2, 2), (8, 2))},
        {"x": ((1, 2), (2, 2), (4, 2)), "past": ((0, 2), (2, 2), (8, 2))},
    ]


def test_timings_of_another_release_are_dropped(fake: FakeTrt, tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"old")
    compile_graph(fake.library, GRAPH, SPEC, timing_cache=cache)
    fake.accepts_cache = False
    cache.write_bytes(b"foreign")
    compile_graph(fake.library, GRAPH, SPEC, timing_cache=cache)
    assert fake.caches == [b"old", b"foreign", b""]
    assert cache.read_bytes() == b"timings"


def test_only_rtx_builds_for_other_gpus(fake: FakeTrt) -> None:
    if fake.library.name == "tensorrt_rtx":
        compile_graph(fake.library, GRAPH, SPEC, targets=("sm_89", "sm_120"))
        known = fake.module.ComputeCapability
        assert fake.config.num_compute_capabilities == 2
        assert (fake.config._target_0, fake.config._target_1) == (known.SM89, known.SM120)
        with pytest.raises(TrtBuildFailed, match=r"no target sm_87.*SM120, SM121"):
            compile_graph(fake.library, GRAPH, SPEC, targets=("sm_87",))
    else:
        with pytest.raises(TrtMissing, match="builds only for the GPU that is here"):
            compile_graph(fake.library, GRAPH, SPEC, targets=("sm_89",))


def test_an_operator_it_lacks_is_named(fake: FakeTrt) -> None:
    fake.parse_errors = [
        fake.error("UNSUPPORTED_NODE", "no importer", node_operator="Foo", node_name="/foo")
    ]
    with pytest.raises(OnnxUnsupported, match="Foo /foo: no importer"):
        compile_graph(fake.library, GRAPH, SPEC)
    fake.parse_errors = [fake.error("MODEL_DESERIALIZE_FAILED", "cut off")]
    with pytest.raises(TrtParse, match="cut off"):
        compile_graph(fake.library, GRAPH, SPEC)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Could not find any implementation for node {ForeignNode[a...b]}.", TrtNoTactic),
        ("Requested amount of GPU memory could not be allocated: OutOfMemory", OutOfDeviceMemory),
        ("kMAX values are not self-consistent: 1023 >= 256", TrtProfile),
        ("something else", TrtBuildFailed),
    ],
)
def test_a_failed_build_is_sorted_by_what_was_logged(
    fake: FakeTrt, text: str, kind: type[Exception]
) -> None:
    fake.build_result, fake.says = None, [("ERROR", text)]
    with pytest.raises(kind, match=re.escape(text[:30])):
        compile_graph(fake.library, GRAPH, SPEC)


def test_a_warning_about_profiles_is_an_error(fake: FakeTrt) -> None:
    fake.says = [("WARNING", "kMAX values for profile 0 are not self-consistent")]
    with pytest.raises(TrtProfile, match="not self-consistent"):
        compile_graph(fake.library, GRAPH, SPEC)
    fake.says = [("WARNING", "something harmless")]
    compile_graph(fake.library, GRAPH, SPEC)


def test_a_graph_other_than_its_spec_is_refused(fake: FakeTrt) -> None:
    other = TensorSpec(name="x", dtype="float16", shape=("s", 2))
    spec = GraphSpec(name="g", inputs=(other, SPEC.inputs[1]), outputs=SPEC.outputs, dims=SPEC.dims)
    with pytest.raises(TrtParse, match="input x is"):
        compile_graph(fake.library, GRAPH, spec)


def _bound(engine: TrtEngine, s: int, p: int) -> np.ndarray:
    y = np.zeros((s, 2), np.float32)
    engine.bind_array("x", np.full((s, 2), 3, np.float32))
    engine.bind_array("past", np.ones((p, 2), np.float32))
    engine.bind_array("y", y)
    return y


def test_an_engine_runs_on_host_arrays(fake: FakeTrt, engine_file: Path) -> None:
    device = FakeDevice()
    engine = TrtEngine(SPEC, engine_file, fake.library, device)
    for s, p in ((1, 0), (1, 5), (3, 8), (4, 0), (1, 8)):
        y = _bound(engine, s, p)
        engine.run()
        assert (y == 6 * s + 2 * p).all()
    assert fake.profile_runs == [0, 1, 0]
    assert len(device.blocks) == 3
    engine.close()
    engine.close()
    assert not device.blocks


def test_device_memory_is_used_where_it_is(fake: FakeTrt, engine_file: Path) -> None:
    device = FakeDevice()
    engine = TrtEngine(SPEC, engine_file, fake.library, device)
    y = _bound(engine, 1, 2)
    arena = device.alloc(8 * 8)
    engine.bind("past", arena, (4, 2))
    engine.run()
    assert (y == 6).all()
    assert device.copies == 2  # x in, y out


def test_device_memory_at_an_odd_address_goes_through_a_buffer(
    fake: FakeTrt, engine_file: Path
) -> None:
    device = FakeDevice()
    engine = TrtEngine(SPEC, engine_file, fake.library, device)
    _bound(engine, 2, 1)
    past, result = device.alloc(64), device.alloc(64)
    rows = np.arange(4, dtype=np.float32)
    device.to_device(past + 8, rows.ctypes.data, 16)
    device.copies = 0
    engine.bind("past", past + 8, (2, 2))
    engine.bind("y", result + 8, (2, 2))
    engine.run()
    assert device.copies == 1  # x; the others never leave the device
    assert device.moved_bytes == 32
    y = np.zeros((2, 2), np.float32)
    device.to_host(y.ctypes.data, result + 8, 16)
    assert (y == 12 + 6).all()


def test_shapes_outside_are_refused(fake: FakeTrt, engine_file: Path) -> None:
    engine = TrtEngine(SPEC, engine_file, fake.library, FakeDevice())
    _bound(engine, 5, 0)
    with pytest.raises(ShapeRange, match="dimension s"):
        engine.run()
    with pytest.raises(ShapeRange, match=r"full: s 1\.\.4, p 0\.\.8"):
        profile_for(profiles_of(SPEC), {"s": 9, "p": 0}, "g")


def test_an_engine_that_will_not_load(fake: FakeTrt, engine_file: Path) -> None:
    with pytest.raises(OutOfDeviceMemory, match="scratch memory"):
        TrtEngine(SPEC, engine_file, fake.library, FakeDevice(free=999))
    fake.refuses_engine = True
    fake.says = [("ERROR", "The engine plan file is not compatible with this version")]
    with pytest.raises(EngineStale, match="not compatible with this version"):
        TrtEngine(SPEC, engine_file, fake.library, FakeDevice())


def test_vision_profiles_hold_one_frame() -> None:
    spec = GraphSpec(
        name="vit_trunk",
        inputs=(
            TensorSpec(name="hidden", dtype="float32", shape=("F", 9)),
            TensorSpec(name="cell_idx", dtype="int32", shape=("G",)),
        ),
        outputs=(),
        dims={"F": DynamicDim(min=1, opt=1, max=4), "G": DynamicDim(min=1, opt=41, max=324)},
    )
    step, full = profiles_of(spec)
    assert step.shapes(spec.inputs[1]) == ((1,), (41,), (81,))
    assert full.shapes(spec.inputs[1]) == ((1,), (41,), (324,))
    assert step.shapes(spec.inputs[0])[2] == (1, 9)


@pytest.fixture
def no_cache() -> Iterator[None]:
    load_library.cache_clear()
    yield
    load_library.cache_clear()


def test_a_missing_library_is_a_named_error(
    no_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(TrtMissing, match=r"tensorrt .*tensorrt_rtx") as caught:
        load_library()
    assert (caught.value.code, caught.value.exit_code) == ("E-TRT-MISSING-LIB", 11)
    with pytest.raises(ConfigError, match="no TensorRT library 'onnx'"):
        load_library("onnx")


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"__version__": "10.3.0"}, "not the full library"),
        ({"__version__": "8.6.1", "Builder": 1, "OnnxParser": 1, "Runtime": 1}, "8.6.1 is too old"),
    ],
)
def test_a_stub_and_an_old_release_are_refused(
    no_cache: None, monkeypatch: pytest.MonkeyPatch, attributes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(trt_library, "_import", lambda name: SimpleNamespace(**attributes))
    with pytest.raises(TrtMissing, match=message):
        load_library("tensorrt")


def test_no_driver_is_a_named_error() -> None:
    with pytest.raises(GpuMissing, match="no NVIDIA driver") as caught:
        Cuda("libcuda-that-is-not-there.so.1")
    assert caught.value.code == "E-GPU"
