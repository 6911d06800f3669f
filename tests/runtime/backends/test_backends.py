"""The same stream on every backend, and the named error where one cannot be had.

TensorRT itself is a stand-in here whose engines compute through ONNX Runtime, on a "device" whose
memory is apart from the host's: what is tested is everything around the library.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_vlm.cli import main
from edge_vlm.errors import (
    ConfigError,
    CudaError,
    EngineError,
    EngineMissing,
    EngineStale,
    GpuMissing,
    MissingExtraError,
    OutOfDeviceMemory,
    TrtMissing,
)
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.pixels.frames import Frame
from edge_vlm.pruning.policies import FrameTopK
from edge_vlm_export.verify.ort_runner import OrtRunner
from edge_vlm_runtime.engines.base import Engine
from edge_vlm_runtime.engines.cuda import Cuda, Gpu
from edge_vlm_runtime.engines.names import Backend
from edge_vlm_runtime.engines.open import open_by_ort, open_engines
from edge_vlm_runtime.engines.openvino import BFLOAT16, FLOAT32, OpenVinoEngine, precision_for
from edge_vlm_runtime.engines.ort import CPU, OrtDevice, OrtEngine
from edge_vlm_runtime.engines.store import EngineStore, Fingerprint
from edge_vlm_runtime.engines.trt_library import load_library
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from tests.published_folder import image_bundle
from tests.runtime.backends.fake_trt import API, FakeDevice, FakeTrt
from tests.tiny import tiny_bundle, tiny_variant

RELEASE = sorted(API)[0]
ORIN = Gpu(name="Orin", capability="sm_87")


def _fake(bundle: EngineBundle, folder: Path, gpu: Gpu) -> FakeTrt:
    """A library, and in `folder` entries of engines that it "built" on `gpu`."""
    fake = FakeTrt(RELEASE, bundle.specs["llm"])
    store = EngineStore(folder, fake.library.name)
    store.folder.mkdir(parents=True)
    for name, spec in bundle.specs.items():
        fake.engines[name.encode()] = (spec, OrtRunner(bundle.graph_path(name), spec).run)
        file = store.folder / "new"
        file.write_bytes(name.encode())
        fingerprint = Fingerprint.of(
            bundle,
            name,
            library=fake.library.name,
            library_version=fake.library.version,
            gpu=gpu.name,
            capabilities=(gpu.capability,),
            options={},
        )
        store.write(name, file, fingerprint, {})
    return fake


def _stream(engines: LoadedBundle) -> list[np.ndarray]:
    """Logits behind frames, questions that are undone, answers and an eviction."""
    rng = np.random.default_rng(3)
    vision, lm, prompt = engines.vision, engines.language, engines.prompt
    arena, state, policy = lm.new_arena(160), vision.new_state(), FrameTopK(0.5)
    lm.prefill(arena, lm.embed(prompt.bos_ids))
    logits, ends = [], [arena.length]
    for i in range(4):
        rgb = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        tokens = vision.encode(Frame(rgb=rgb, pts_ns=i * 10**9, seq=i), state, policy)
        ids = prompt.frame_ids(float(i), len(tokens.cells), first=i == 0)
        blocks = np.where(prompt.vision_mask(ids), i, -1)
        logits.append(lm.prefill(arena, lm.embed(ids, tokens.embeds), blocks))
        ends.append(arena.length)
        mark = arena.mark()
        logits.append(lm.prefill(arena, lm.embed(prompt.question_ids("is there a car ?"))))
        logits += [lm.decode_step(arena, token) for token in (5, 6, 7)]
        arena.truncate(mark)
    arena.evict(ends[1], ends[2])
    logits.append(lm.prefill(arena, lm.embed(prompt.question_ids("how many cars ?"))))
    logits.append(lm.measure(arena, [lm.embed([5, 6]), lm.embed([7])]).ravel())
    logits += [plane.ravel() for layer in range(2) for plane in arena.rows(layer)]
    arena.close()
    arena.close()
    return logits


@pytest.mark.parametrize("variant", ["plain", "both"])
def test_a_stream_on_engines_equals_onnx_runtime(variant: str, tmp_path: Path) -> None:
    folder = tiny_bundle() if variant == "plain" else tiny_variant(variant)
    bundle, device = EngineBundle.open(folder), FakeDevice()
    fake = _fake(bundle, tmp_path, device.gpu)
    opened = open_engines(bundle, tmp_path, fake.library, device)
    with LoadedBundle(bundle, opened.graphs, opened.cache_memory) as engines:
        got = _stream(engines)
        assert device.entered > 0
    assert not device.blocks  # neither a cache nor a buffer is left behind
    with LoadedBundle.open(folder, threads=1) as engines:
        expected = _stream(engines)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)


def test_the_cache_never_leaves_the_device(tmp_path: Path) -> None:
    bundle, device = EngineBundle.open(tiny_bundle()), FakeDevice(free=10**9)
    fake = _fake(bundle, tmp_path, device.gpu)
    opened = open_engines(bundle, tmp_path, fake.library, device)
    with LoadedBundle(bundle, opened.graphs, opened.cache_memory) as engines:
        lm = engines.language
        arena = lm.new_arena(400)
        lm.prefill(arena, lm.embed(np.full(64, 5)))
        device.copied_bytes = 0
        lm.decode_step(arena, 5)
        short = device.copied_bytes
        for _ in range(3):
            lm.prefill(arena, lm.embed(np.full(64, 5)))
        device.copied_bytes = 0
        lm.decode_step(arena, 5)
        # The mask has grown by a number for each token of the past; nothing else has.
        assert device.copied_bytes - short == 4 * (3 * 64 + 1)
        del arena
    assert not device.blocks


def test_an_arena_that_is_forgotten_gives_its_memory_back(tmp_path: Path) -> None:
    bundle, device = EngineBundle.open(tiny_bundle()), FakeDevice()
    fake = _fake(bundle, tmp_path, device.gpu)
    opened = open_engines(bundle, tmp_path, fake.library, device)
    with LoadedBundle(bundle, opened.graphs, opened.cache_memory) as engines:
        arena = engines.language.new_arena(100)
        assert len(device.blocks) == 1
        assert device.is_device_memory(arena.pointers[0])
        del arena
        assert not device.blocks


def test_engines_of_another_gpu_or_release_are_refused(tmp_path: Path) -> None:
    bundle = EngineBundle.open(tiny_bundle())
    fake = _fake(bundle, tmp_path, ORIN)
    with pytest.raises(EngineStale, match=r"gpu: 'Orin', now 'NVIDIA GeForce RTX 4090'"):
        open_engines(bundle, tmp_path, fake.library, FakeDevice())
    fake.library.version = "99.0"
    with pytest.raises(EngineStale, match=r"library_version: .* now '99\.0'"):
        open_engines(bundle, tmp_path, fake.library, FakeDevice(gpu=ORIN))


def test_a_graph_without_engine_is_named_before_any_is_loaded(tmp_path: Path) -> None:
    bundle = EngineBundle.open(tiny_bundle())
    fake = _fake(bundle, tmp_path, ORIN)
    EngineStore(tmp_path, fake.library.name).engine_path("llm").unlink()
    fake.refuses_engine = True
    with pytest.raises(EngineMissing, match=r"graph llm has no engine.*edge-vlm build"):
        open_engines(bundle, tmp_path, fake.library, FakeDevice(gpu=ORIN))


def test_a_gpu_without_room_leaves_nothing_behind(tmp_path: Path) -> None:
    bundle, device = EngineBundle.open(tiny_bundle()), FakeDevice(free=10)
    fake = _fake(bundle, tmp_path, device.gpu)
    with pytest.raises(OutOfDeviceMemory, match="scratch memory"):
        open_engines(bundle, tmp_path, fake.library, device)
    assert not device.blocks


def _has_gpu() -> bool:
    try:
        Cuda()
    except GpuMissing:
        return False
    return True


needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed"
)


@needs_rtx
def test_the_real_library_without_a_driver_is_a_named_error(tmp_path: Path) -> None:
    if _has_gpu():
        pytest.skip("there is a GPU here")
    bundle = EngineBundle.open(tiny_bundle())
    library = load_library("tensorrt_rtx")
    fake = _fake(bundle, tmp_path, ORIN)
    entry = EngineStore(tmp_path, fake.library.name).engine_path("llm")
    from edge_vlm_runtime.engines.trt import TrtEngine

    with pytest.raises(GpuMissing, match="driver is missing or too old for tensorrt_rtx") as caught:
        TrtEngine(bundle.specs["llm"], entry, library, FakeDevice())
    assert caught.value.code == "E-GPU"


@needs_rtx
def test_serving_engines_without_a_gpu_is_one_clear_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    if _has_gpu():
        pytest.skip("there is a GPU here")
    code = main(["serve", "--bundle", str(tiny_bundle()), "--backend", "trt", "--port", "0"])
    err = capsys.readouterr().err
    assert code == GpuMissing.exit_code
    assert "edge-vlm: E-GPU: no NVIDIA driver" in err
    assert err.count("\n") == 1


def test_serving_engines_without_the_library_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_library.cache_clear()
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    try:
        code = main(["serve", "--bundle", str(tiny_bundle()), "--backend", "trt", "--port", "0"])
    finally:
        load_library.cache_clear()
    err = capsys.readouterr().err
    assert code == TrtMissing.exit_code
    assert "edge-vlm: E-TRT-MISSING-LIB: " in err
    assert err.count("\n") == 1


def test_a_bundle_for_onnx_runtime_has_no_engines() -> None:
    with pytest.raises(ConfigError, match="--variant portable"):
        LoadedBundle.open(tiny_variant("ort-int4"), backend=Backend.TRT)


def test_engines_are_for_their_backend(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--backend trt"):
        LoadedBundle.open(tiny_bundle(), engines=tmp_path)


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("provider_is_there", [False, True])
def test_onnx_runtime_never_falls_back_to_the_cpu(
    provider_is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    real = onnxruntime.get_available_providers
    names: list[str] = [*real(), "CUDAExecutionProvider"] if provider_is_there else real()
    if not provider_is_there and "CUDAExecutionProvider" in names:
        pytest.skip("this onnxruntime has it")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    if not provider_is_there:
        with pytest.raises(MissingExtraError, match="CUDAExecutionProvider"):
            LoadedBundle.open(tiny_bundle(), backend=Backend.CUDA)
        return
    if _has_gpu():
        pytest.skip("there is a GPU here")
    with pytest.raises(GpuMissing):
        LoadedBundle.open(tiny_bundle(), backend=Backend.CUDA)
    with pytest.raises(CudaError, match="CUDAExecutionProvider"):
        open_by_ort(EngineBundle.open(tiny_bundle()), OrtDevice(FakeDevice()), threads=1)


@pytest.mark.parametrize("variant", ["plain", "ort-int4"])
def test_onnx_runtime_works_on_a_cache_in_device_memory(variant: str) -> None:
    folder = tiny_bundle() if variant == "plain" else tiny_variant(variant)
    bundle, device = EngineBundle.open(folder), _Waited()
    where = OrtDevice(device, place="cpu")  # the host's memory, as of a device
    opened = open_by_ort(bundle, where, threads=1, provider=CPU)
    assert opened.runs_on.endswith(f"on {device.gpu.name}")
    with LoadedBundle(bundle, opened.graphs, opened.cache_memory) as engines:
        got = _stream(engines)
        assert device.moved_bytes > 0
        rows = sum(plane.nbytes for plane in got[-4:])
        assert device.copied_bytes >= rows  # the test has looked at them; nobody else has
        device.copied_bytes = 0
        arena = engines.language.new_arena(50)
        engines.language.prefill(arena, engines.language.embed([5, 6, 7]))
        engines.language.decode_step(arena, 5)
        assert device.copied_bytes == 0
        arena.close()
    assert not device.blocks
    assert not device.pending
    with LoadedBundle.open(folder, threads=1) as engines:
        expected = _stream(engines)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


class _Waited(FakeDevice):
    """Moves within the device are done when somebody waits for them, and no sooner."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: list[tuple[int, int, int]] = []

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        self.pending.append((target, source, num_bytes))

    def synchronize(self) -> None:
        for move in self.pending:
            super().copy(*move)
        self.pending = []


needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed"
)


def _by_openvino(folder: Path, precision: str) -> list[np.ndarray]:
    bundle = EngineBundle.open(folder)
    graphs: dict[str, Engine] = {
        name: OpenVinoEngine(bundle, name, threads=1, precision=precision) for name in bundle.specs
    }
    with LoadedBundle(bundle, graphs) as engines:
        return _stream(engines)


@needs_openvino
@pytest.mark.parametrize("variant", ["plain", "both"])
def test_a_stream_by_openvino_equals_onnx_runtime(variant: str) -> None:
    folder = tiny_bundle() if variant == "plain" else tiny_variant(variant)
    with LoadedBundle.open(folder, threads=1) as engines:
        expected = _stream(engines)
    for got, exact in zip(_by_openvino(folder, FLOAT32), expected, strict=True):
        np.testing.assert_allclose(got, exact, atol=1e-4, rtol=1e-4)
    for got, exact in zip(_by_openvino(folder, BFLOAT16), expected, strict=True):
        cosine = got.ravel() @ exact.ravel() / np.linalg.norm(got) / np.linalg.norm(exact)
        assert cosine > 0.999


@needs_openvino
def test_every_answer_by_openvino_is_right_in_a_bundle_whose_frames_see_each_other() -> None:
    """In bfloat16 some of its logits were those of another step, or zero."""
    with LoadedBundle.open(image_bundle(), threads=1) as engines:
        expected = _stream(engines)
    with LoadedBundle.open(image_bundle(), threads=1, backend=Backend.OPENVINO) as engines:
        found = _stream(engines)
        assert "llm by OpenVINO" in engines.runs_on.replace("image_encoder, ", "")
    for got, exact in zip(found, expected, strict=True):
        cosine = got.ravel() @ exact.ravel() / np.linalg.norm(got) / np.linalg.norm(exact)
        assert cosine > 0.995


@needs_openvino
def test_openvino_refuses_what_it_would_compute_wrongly() -> None:
    for backend in (Backend.OPENVINO, Backend.AUTO):
        if backend is Backend.OPENVINO:
            with pytest.raises(ConfigError, match="--variant portable, or take --backend ort"):
                LoadedBundle.open(tiny_variant("ort-int4"), backend=backend)
        else:
            with LoadedBundle.open(tiny_variant("ort-int4"), backend=backend) as engines:
                assert "OpenVINO" not in engines.runs_on
    assert precision_for(EngineBundle.open(tiny_variant("edge")), "vit_stem") == FLOAT32


@needs_openvino
def test_int8_pictures_are_for_openvino(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("edge_vlm_runtime.engines.open.multiplies_bfloat16", lambda: True)
    with LoadedBundle.open(tiny_variant("edge"), threads=1, backend=Backend.AUTO) as engines:
        assert engines.runs_on.startswith("vit_stem, vit_trunk by OpenVINO")
        assert "in float32; llm, llm_decode by ONNX Runtime" in engines.runs_on
    assert not caplog.messages
    with LoadedBundle.open(tiny_variant("edge"), threads=1):
        assert "--backend openvino" in caplog.messages[0]


@needs_openvino
def test_auto_takes_openvino_for_pictures_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = []
    for has_bfloat16 in (True, False):
        for module in ("open", "openvino"):
            target = f"edge_vlm_runtime.engines.{module}.multiplies_bfloat16"
            monkeypatch.setattr(target, lambda has=has_bfloat16: has)
        with LoadedBundle.open(tiny_bundle(), threads=1, backend=Backend.AUTO) as engines:
            kinds = {name: type(graph) for name, graph in engines._graphs.items()}
            said.append(engines.runs_on)
        picture = OpenVinoEngine if has_bfloat16 else OrtEngine
        assert kinds == {"vit_stem": picture, "vit_trunk": picture, "llm": OrtEngine}
    assert said[0].startswith("vit_stem, vit_trunk by OpenVINO 20")
    assert "in bfloat16; llm by ONNX Runtime" in said[0]
    assert "this CPU does not multiply bfloat16 itself" in said[1]


@needs_openvino
def test_auto_reads_frames_of_four_bits_by_openvino_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edge_vlm_runtime.engines.open.multiplies_bfloat16", lambda: True)
    folder = tiny_variant("int4")
    with LoadedBundle.open(folder, threads=1) as engines:
        expected = _stream(engines)
    with LoadedBundle.open(folder, threads=1, backend=Backend.AUTO) as engines:
        found = _stream(engines)
        reading = engines._graphs["llm"]
        assert isinstance(reading, OpenVinoEngine)
        assert isinstance(engines._graphs["llm_decode"], OrtEngine)
        # As many activations share a scale as weights do (16 of 48); more, and it would be slow.
        assert int(reading._compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")) == 16
    for got, exact in zip(found, expected, strict=True):
        cosine = got.ravel() @ exact.ravel() / np.linalg.norm(got) / np.linalg.norm(exact)
        assert cosine > 0.995


def test_without_openvino_auto_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'edge-vlm\[openvino\]'"):
        LoadedBundle.open(tiny_bundle(), backend=Backend.OPENVINO)
    with LoadedBundle.open(tiny_bundle(), threads=1, backend=Backend.AUTO) as engines:
        assert engines.runs_on.startswith("vit_stem, vit_trunk, llm by ONNX Runtime")
        assert "openvino is not installed" in engines.runs_on


@needs_openvino
def test_openvino_reads_the_graph_of_its_spec_only(tmp_path: Path) -> None:
    bundle = EngineBundle.open(tiny_bundle())
    wrong = tmp_path / "llm.onnx"

    class Elsewhere:
        precision, kv_layout, specs = bundle.precision, bundle.kv_layout, bundle.specs

        def graph_path(self, name: str) -> Path:
            return wrong

    wrong.write_bytes(b"not a graph")
    elsewhere: Any = Elsewhere()
    with pytest.raises(EngineError, match="cannot load it"):
        OpenVinoEngine(elsewhere, "llm", threads=1)
    wrong = bundle.graph_path("vit_trunk")
    with pytest.raises(EngineError, match="its spec"):
        OpenVinoEngine(elsewhere, "llm", threads=1)
