"""What the machine tells about itself: memory of this process, power and memory of its GPU.

Read where the platform gives it, without any library to install: the kernel's files, the INA3221
sensors of a Jetson, and NVIDIA's management library if the driver brought one. What is missing is
None; a missing gauge never stops anything.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

HWMON = Path("/sys/class/hwmon")
STATM = Path("/proc/self/statm")
NVML_LIBRARY = "libnvidia-ml.so.1"


def resident_bytes(statm: Path = STATM) -> int | None:
    """Memory of this process that is in RAM now."""
    try:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def rail_watts(hwmon: Path = HWMON) -> dict[str, float]:
    """Power of each supply rail that an INA3221 measures, by the rail's name (`VDD_IN`, ...)."""
    rails: dict[str, float] = {}
    for folder in sorted(hwmon.glob("hwmon*")):
        with suppress(OSError):
            if (folder / "name").read_text().strip() == "ina3221":
                rails.update(_rails_of(folder))
    return rails


def _rails_of(folder: Path) -> dict[str, float]:
    rails = {}
    for label in sorted(folder.glob("in*_label")):
        number = label.name.removeprefix("in").removesuffix("_label")
        with suppress(OSError, ValueError):  # a rail that is not connected cannot be read
            millivolts = int((folder / f"in{number}_input").read_text())
            milliamperes = int((folder / f"curr{number}_input").read_text())
            rails[label.read_text().strip()] = millivolts * milliamperes * 1e-6
    return rails


class _Memory(ctypes.Structure):
    """nvmlMemory_t"""

    _fields_ = (
        ("total", ctypes.c_ulonglong),
        ("free", ctypes.c_ulonglong),
        ("used", ctypes.c_ulonglong),
    )


class Gpus:
    """NVIDIA GPUs by their number, through the driver's management library."""

    def __init__(self, library: Any) -> None:
        """`library`: what `ctypes.CDLL` gives. Raises OSError when it cannot be used."""
        self._library = library
        self._handles: list[ctypes.c_void_p] = []
        count = ctypes.c_uint()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        for number in range(count.value):
            handle = ctypes.c_void_p()
            self._call("nvmlDeviceGetHandleByIndex_v2", number, ctypes.byref(handle))
            self._handles.append(handle)

    def _call(self, name: str, *arguments: Any) -> None:
        try:
            code = getattr(self._library, name)(*arguments)
        except AttributeError as error:
            raise OSError(f"{name} is not there") from error
        if code != 0:
            raise OSError(f"{name} failed with {code}")

    def watts(self) -> dict[str, float]:
        """Power that each draws; those that do not tell are left out."""

        def read(handle: ctypes.c_void_p) -> float:
            milliwatts = ctypes.c_uint()
            self._call("nvmlDeviceGetPowerUsage", handle, ctypes.byref(milliwatts))
            return milliwatts.value * 1e-3

        return self._each(read)

    def used_bytes(self) -> dict[str, float]:
        """Memory in use by all processes."""

        def read(handle: ctypes.c_void_p) -> float:
            memory = _Memory()
            self._call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
            return float(memory.used)

        return self._each(read)

    def _each(self, read: Callable[[ctypes.c_void_p], float]) -> dict[str, float]:
        values = {}
        for number, handle in enumerate(self._handles):
            with suppress(OSError):
                values[str(number)] = read(handle)
        return values


WHOLE_BOARD_RAILS = ("VDD_IN", "POM_5V_IN", "VIN_SYS_5V0")
"""Rails of the Jetson modules that feed all others."""


def total_watts(rails: Mapping[str, float], gpus: Mapping[str, float]) -> float | None:
    """What the whole board draws, else its GPUs; None when neither is known."""
    for name in WHOLE_BOARD_RAILS:
        if name in rails:
            return rails[name]
    return sum(gpus.values()) if gpus else None


def open_gpus() -> Gpus | None:
    """None where there is no NVIDIA driver or it does not answer (a Jetson's has no such part)."""
    try:
        return Gpus(ctypes.CDLL(NVML_LIBRARY))
    except OSError:
        return None
