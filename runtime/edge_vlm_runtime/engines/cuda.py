"""The little of CUDA that an engine needs, through the driver's own library.

`libcuda.so.1` comes with every NVIDIA driver and its functions do not change between CUDA 12 and
13, so no Python package for CUDA is needed on a device.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from typing import Any

from edge_vlm.errors import CudaError, GpuMissing, OutOfDeviceMemory

DRIVER = "libcuda.so.1"
OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
NO_GPU = {34, 100, 101, 803}  # CUDA_ERROR_STUB_LIBRARY, NO_DEVICE, INVALID_DEVICE (of number 0),
# SYSTEM_DRIVER_MISMATCH: a driver's library, and no driver or GPU that it can use
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
POINTER_MEMORY_TYPE = 2  # CU_POINTER_ATTRIBUTE_MEMORY_TYPE
DEVICE_MEMORY = 2  # CU_MEMORYTYPE_DEVICE; managed memory reports it too


@dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    capability: str
    """As in "sm_87"."""


class Cuda:
    """The first GPU and its primary context. May be used by any thread, by one at a time.

    Raises GpuMissing without a driver or a GPU. Every call raises OutOfDeviceMemory for a lack of
    memory and CudaError for all else that fails.
    """

    def __init__(self, driver: str = DRIVER) -> None:
        try:
            self._lib: Any = ctypes.CDLL(driver)
        except OSError as error:
            raise GpuMissing(
                f"no NVIDIA driver: {error}", remedy="install it, or run where there is a GPU"
            ) from error
        self._call("cuInit", 0)
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._entered = threading.local()
        self.enter()
        name = ctypes.create_string_buffer(128)
        self._call("cuDeviceGetName", name, 128, device)
        major, minor = (
            self._attribute(device, attribute) for attribute in (CAPABILITY_MAJOR, CAPABILITY_MINOR)
        )
        self.gpu = Gpu(name=name.value.decode(), capability=f"sm_{major}{minor}")
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), 1)  # CU_STREAM_NON_BLOCKING
        self.stream = stream.value or 0

    def enter(self) -> None:
        """Makes the GPU the calling thread's: CUDA keeps that for each thread."""
        if not getattr(self._entered, "done", False):
            self._call("cuCtxSetCurrent", self._context)
            self._entered.done = True

    def memory(self) -> tuple[int, int]:
        """Free and total bytes."""
        self.enter()
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def alloc(self, num_bytes: int) -> int:
        """Address of that much device memory."""
        self.enter()
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(num_bytes))
        return pointer.value

    def free(self, pointer: int) -> None:
        self.enter()
        self._call("cuMemFree_v2", ctypes.c_uint64(pointer))

    def copy(self, target: int, source: int, num_bytes: int) -> None:
        """Within device memory, in the order of the stream; the two must not overlap."""
        self.enter()
        self._call(
            "cuMemcpyDtoDAsync_v2",
            *(ctypes.c_uint64(target), ctypes.c_uint64(source)),
            *(ctypes.c_size_t(num_bytes), ctypes.c_void_p(self.stream)),
        )

    def to_device(self, target: int, source: int, num_bytes: int) -> None:
        self.enter()
        self._call(
            "cuMemcpyHtoDAsync_v2",
            *(ctypes.c_uint64(target), ctypes.c_void_p(source)),
            *(ctypes.c_size_t(num_bytes), ctypes.c_void_p(self.stream)),
        )

    def to_host(self, target: int, source: int, num_bytes: int) -> None:
        self.enter()
        self._call(
            "cuMemcpyDtoHAsync_v2",
            *(ctypes.c_void_p(target), ctypes.c_uint64(source)),
            *(ctypes.c_size_t(num_bytes), ctypes.c_void_p(self.stream)),
        )

    def synchronize(self) -> None:
        self.enter()
        self._call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def is_device_memory(self, pointer: int) -> bool:
        """False for memory that CUDA does not know, such as a numpy array's."""
        self.enter()
        kind = ctypes.c_uint()
        code = self._lib.cuPointerGetAttribute(
            ctypes.byref(kind), POINTER_MEMORY_TYPE, ctypes.c_uint64(pointer)
        )
        return code == 0 and kind.value == DEVICE_MEMORY

    def _attribute(self, device: ctypes.c_int, attribute: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        return value.value

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._lib, function)(*arguments)
        if code == 0:
            return
        text = ctypes.c_char_p()
        self._lib.cuGetErrorString(code, ctypes.byref(text))
        reason = (text.value or b"unknown error").decode()
        if code == OUT_OF_MEMORY:
            raise OutOfDeviceMemory(
                f"{function}: {reason}", remedy="close other programs, or export smaller limits"
            )
        if code in NO_GPU:
            raise GpuMissing(
                f"no NVIDIA GPU that can be used ({function}: {reason})",
                remedy="see nvidia-smi, or run where there is one",
            )
        raise CudaError(f"{function} failed with CUDA error {code}: {reason}")
