"""What draws power, and how much: every meter that this machine has, and why the others are not.

| meter | what it counts |
| --- | --- |
| NVML | energy of an NVIDIA card since its driver was loaded: a difference is exact |
| RAPL | energy of the processor's package, a counter that wraps |
| INA | power of a Jetson's rails, read ten times a second and added up |
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from edge_vlm_runtime.server.gauges import HWMON, WHOLE_BOARD_RAILS, Gpus, open_gpus, rail_watts

POWERCAP = Path("/sys/class/powercap")
SAMPLE_S = 0.1


class Meter(Protocol):
    name: str

    def joules(self) -> float:
        """So far, from any beginning. Raises OSError or what its library raises."""

    def close(self) -> None: ...


class NvmlMeter:
    """All NVIDIA cards together."""

    name = "NVML"

    def __init__(self, gpus: Gpus) -> None:
        self._gpus = gpus

    def joules(self) -> float:
        counted = self._gpus.joules()
        if not counted:
            raise OSError("the card counts no energy any more")
        return sum(counted.values())

    def close(self) -> None:
        """There is nothing to close."""


class RaplMeter:
    """The packages of the processor: `energy_uj` of each, which begins anew at its range's end."""

    name = "RAPL"

    def __init__(self, zones: list[Path]) -> None:
        self._zones = zones
        self._ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
        self._last = [self._read(zone) for zone in zones]
        self._total = 0

    @staticmethod
    def _read(zone: Path) -> int:
        return int((zone / "energy_uj").read_text())

    def joules(self) -> float:
        for index, zone in enumerate(self._zones):
            now = self._read(zone)
            self._total += (now - self._last[index]) % (self._ranges[index] + 1)
            self._last[index] = now
        return self._total * 1e-6

    def close(self) -> None:
        """There is nothing to close."""


class RailMeter:
    """Watts of a board's rail, added up by a thread of its own. It has to be closed."""

    def __init__(self, hwmon: Path, rail: str) -> None:
        self.name = f"INA {rail}"
        self._hwmon, self._rail = hwmon, rail
        self._joules = 0.0
        self._failure: str | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="edge-vlm-rail", daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(SAMPLE_S):
            now = time.monotonic()
            watts = rail_watts(self._hwmon).get(self._rail)
            if watts is None:
                self._failure = f"{self._rail} cannot be read any more"
                return
            self._joules += watts * (now - last)
            last = now

    def joules(self) -> float:
        if self._failure is not None:
            raise OSError(self._failure)
        return self._joules

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


@dataclass
class Meters:
    """Those that can be read, and for each other one the reason."""

    found: list[Meter] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def joules(self) -> dict[str, float]:
        """Of each meter; one that can be read no more is moved to `absent`."""
        values = {}
        for meter in list(self.found):
            try:
                values[meter.name] = meter.joules()
            except Exception as error:  # noqa: BLE001 - a meter never ends a measurement
                self.found.remove(meter)
                self.absent[meter.name] = f"failed while it was read: {error}"
                meter.close()
        return values

    def close(self) -> None:
        for meter in self.found:
            meter.close()


def open_meters(*, powercap: Path = POWERCAP, hwmon: Path = HWMON) -> Meters:
    meters = Meters()
    for name, opening in (
        ("NVML", _nvml),
        ("RAPL", lambda: _rapl(powercap)),
        ("INA", lambda: _rails(hwmon)),
    ):
        found = opening()
        if isinstance(found, str):
            meters.absent[name] = found
        else:
            meters.found.append(found)
    return meters


def _nvml() -> Meter | str:
    gpus = open_gpus()
    if gpus is None:
        return "no NVIDIA driver answers, or nvidia-ml-py (extra `gauges`) is not installed"
    if not gpus.joules():
        return "the card counts no energy (only those since Volta do)"
    return NvmlMeter(gpus)


def _rapl(powercap: Path) -> Meter | str:
    zones = []
    for zone in sorted(powercap.glob("intel-rapl:[0-9]*")):
        try:
            is_package = (zone / "name").read_text().startswith("package")
        except OSError:
            continue
        if is_package and zone.name.count(":") == 1:
            zones.append(zone)
    if not zones:
        return f"no {powercap}/intel-rapl:* (not this processor, or a virtual machine)"
    try:
        return RaplMeter(zones)
    except PermissionError:
        return f"{zones[0]}/energy_uj may be read by root only: run with sudo"
    except (OSError, ValueError) as error:
        return f"{zones[0]} cannot be read: {error}"


def _rails(hwmon: Path) -> Meter | str:
    rails = rail_watts(hwmon)
    for name in WHOLE_BOARD_RAILS:
        if name in rails:
            return RailMeter(hwmon, name)
    if rails:
        return f"rails {', '.join(sorted(rails))} are none that feeds the whole board"
    return f"no INA3221 under {hwmon} (not a Jetson)"
