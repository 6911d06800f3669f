"""The calls to CUDA's driver, made to a stand-in in C that has its prototypes and no GPU."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

from edge_vlm.errors import CudaError, GpuMissing, OutOfDeviceMemory
from edge_vlm_runtime.engines.cuda import Cuda, Gpu

SOURCE = Path(__file__).with_name("fake_cuda.c")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path_factory.mktemp("driver") / "libcuda.so"
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True)
    return str(library)


def test_memory_is_copied_there_within_and_back(driver: str) -> None:
    cuda = Cuda(driver)
    assert cuda.gpu == Gpu(name="Orin", capability="sm_87")
    assert cuda.memory() == (5_000_000_000, 8_000_000_000)
    there, back = np.arange(8, dtype=np.float32), np.zeros(8, np.float32)
    block = cuda.alloc(64)
    assert cuda.is_device_memory(block)
    assert cuda.is_device_memory(block + 63)
    assert not cuda.is_device_memory(there.ctypes.data)
    cuda.to_device(block, there.ctypes.data, 32)
    cuda.copy(block + 32, block, 32)
    cuda.to_host(back.ctypes.data, block + 32, 32)
    cuda.synchronize()
    assert (back == there).all()
    cuda.free(block)
    assert not cuda.is_device_memory(block)


def test_any_thread_may_use_it(driver: str) -> None:
    """A server opens its engines on one thread and runs them on another."""
    cuda, seen = Cuda(driver), []

    def use() -> None:
        block = cuda.alloc(64)
        seen.append(cuda.is_device_memory(block))
        cuda.synchronize()
        cuda.free(block)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [True]


def test_what_the_driver_refuses_is_named(driver: str) -> None:
    cuda = Cuda(driver)
    with pytest.raises(OutOfDeviceMemory, match=r"cuMemAlloc_v2: out of memory") as caught:
        cuda.alloc(1 << 30)
    assert "TRT" not in caught.value.code  # TensorRT has no part in it
    block = cuda.alloc(16)
    with pytest.raises(CudaError, match=r"cuMemcpyDtoDAsync_v2 .* error 1: invalid argument"):
        cuda.copy(block + 8, block, 16)
    cuda.free(block)


@pytest.mark.parametrize("number", [34, 100, 803])
def test_a_driver_without_a_gpu_it_can_use(
    driver: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setenv("FAKE_CUINIT", str(number))
    with pytest.raises(GpuMissing, match="no NVIDIA GPU that can be used"):
        Cuda(driver)


def test_a_driver_that_fails_for_another_reason_has_a_gpu(
    driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUINIT", "999")
    with pytest.raises(CudaError, match="cuInit failed with CUDA error 999"):
        Cuda(driver)


def test_no_driver(tmp_path: Path) -> None:
    with pytest.raises(GpuMissing, match="no NVIDIA driver"):
        Cuda(str(tmp_path / "libcuda.so.1"))
