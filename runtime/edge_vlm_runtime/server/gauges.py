"""What the machine tells about itself: memory of this process, power and memory of its GPU.

Read where the platform gives it: the kernel's files, the INA3221 sensors of a Jetson, and by pynvml
(extra `gauges`) NVIDIA's management library. What is missing is None; a missing gauge never stops
anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HWMON = Path("/sys/class/hwmon")
STATM = Path("/proc/self/statm")


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


class Gpus:
    """NVIDIA GPUs by their number, through the driver's management library."""

    def __init__(self, nvml: Any) -> None:
        """`nvml`: the module pynvml. Raises its NVMLError when the driver does not answer."""
        self._nvml = nvml
        nvml.nvmlInit()
        self._handles = [
            nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())
        ]

    def watts(self) -> dict[str, float]:
        """Power that each draws; those that do not tell are left out."""
        return self._each(lambda gpu: self._nvml.nvmlDeviceGetPowerUsage(gpu) * 1e-3)

    def names(self) -> list[str]:
        """What each is called."""
        texts = [self._nvml.nvmlDeviceGetName(gpu) for gpu in self._handles]
        return [text.decode() if isinstance(text, bytes) else str(text) for text in texts]

    def driver(self) -> str:
        """Its version."""
        text = self._nvml.nvmlSystemGetDriverVersion()
        return text.decode() if isinstance(text, bytes) else str(text)

    def joules(self) -> dict[str, float]:
        """Energy that each has drawn since the driver was loaded; those that do not count it are
        left out."""
        return self._each(lambda gpu: self._nvml.nvmlDeviceGetTotalEnergyConsumption(gpu) * 1e-3)

    def clocks_mhz(self) -> dict[str, float]:
        """Of the multiprocessors and of the memory, as `gpu0 sm` and `gpu0 memory`."""
        found = {}
        for name, kind in (("sm", self._nvml.NVML_CLOCK_SM), ("memory", self._nvml.NVML_CLOCK_MEM)):
            clocks = self._each(
                lambda gpu, kind=kind: float(self._nvml.nvmlDeviceGetClockInfo(gpu, kind))  # type: ignore[misc]
            )
            found.update({f"gpu{number} {name}": mhz for number, mhz in clocks.items()})
        return found

    def used_bytes(self) -> dict[str, float]:
        """Memory in use by all processes."""
        return self._each(lambda gpu: float(self._nvml.nvmlDeviceGetMemoryInfo(gpu).used))

    def _each(self, read: Callable[[Any], float]) -> dict[str, float]:
        values = {}
        for number, handle in enumerate(self._handles):
            with suppress(self._nvml.NVMLError):
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
    """None without pynvml, or where there is no NVIDIA driver or it does not answer."""
    try:
        import pynvml  # type: ignore[import-untyped]
    except ImportError:  # the extra `gauges`: a server does without
        return None
    try:
        return Gpus(pynvml)
    except pynvml.NVMLError:
        return None


@dataclass(frozen=True, kw_only=True)
class MachineSample:
    """What the gauges read at one moment; empty where there was nothing to read."""

    resident_bytes: int | None = None
    rail_watts: Mapping[str, float] = field(default_factory=dict)
    gpu_watts: Mapping[str, float] = field(default_factory=dict)
    gpu_used_bytes: Mapping[str, float] = field(default_factory=dict)

    @property
    def total_watts(self) -> float | None:
        return total_watts(self.rail_watts, self.gpu_watts)


class MachineGauges:
    """All gauges of this machine."""

    def __init__(self, *, hwmon: Path = HWMON, statm: Path = STATM) -> None:
        self._hwmon, self._statm = hwmon, statm
        self._gpus = open_gpus()

    def sample(self) -> MachineSample:
        """Reads files and asks the driver, which may take a while: not for an event loop."""
        gpus = self._gpus
        return MachineSample(
            resident_bytes=resident_bytes(self._statm),
            rail_watts=rail_watts(self._hwmon),
            gpu_watts={} if gpus is None else gpus.watts(),
            gpu_used_bytes={} if gpus is None else gpus.used_bytes(),
        )
