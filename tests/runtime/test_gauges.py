from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from edge_vlm_runtime.server.gauges import Gpus, rail_watts, resident_bytes, total_watts


def test_memory_of_this_process(tmp_path: Path) -> None:
    found = resident_bytes()
    if Path("/proc/self/statm").exists():
        assert found is not None and 10e6 < found < 100e9
    for content in ("", "1", "a b c"):
        (tmp_path / "statm").write_text(content)
        assert resident_bytes(tmp_path / "statm") is None
    assert resident_bytes(tmp_path / "nothing") is None


def write_sensor(folder: Path, name: str, rails: dict[str, tuple[str, str]]) -> None:
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    for number, (label, (volts, amperes)) in enumerate(rails.items(), start=1):
        (folder / f"in{number}_label").write_text(f"{label}\n")
        (folder / f"in{number}_input").write_text(volts)
        (folder / f"curr{number}_input").write_text(amperes)


def test_rails_of_a_jetson(tmp_path: Path) -> None:
    """Millivolts and milliamperes, as the kernel's INA3221 driver gives them."""
    rails = {
        "VDD_IN": ("19000\n", "500\n"),
        "VDD_CPU_GPU_CV": ("19000\n", "120\n"),
        "NC": ("", ""),
    }
    write_sensor(tmp_path / "hwmon0", "nvme", {"Composite": ("1", "1")})
    write_sensor(tmp_path / "hwmon1", "ina3221", rails)
    (tmp_path / "hwmon2").mkdir()
    assert rail_watts(tmp_path) == pytest.approx({"VDD_IN": 9.5, "VDD_CPU_GPU_CV": 2.28})
    assert rail_watts(tmp_path / "nothing") == {}


class Nvml:
    """Two GPUs; the second one does not tell its power."""

    def __init__(self) -> None:
        self.handles: list[Any] = []

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, number: int, handle: Any) -> int:
        handle._obj.value = 100 + number
        return 0

    def nvmlDeviceGetPowerUsage(self, handle: ctypes.c_void_p, power: Any) -> int:
        power._obj.value = 61_500
        return 0 if handle.value == 100 else 3

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p, memory: Any) -> int:
        memory._obj.used = (handle.value or 0) * 10
        return 0


def test_gpus_tell_what_they_can() -> None:
    gpus = Gpus(Nvml())
    assert gpus.watts() == {"0": 61.5}
    assert gpus.used_bytes() == {"0": 1000.0, "1": 1010.0}


def test_a_driver_that_does_not_answer() -> None:
    class Silent(Nvml):
        def nvmlInit_v2(self) -> int:
            return 9

    with pytest.raises(OSError, match="nvmlInit_v2 failed with 9"):
        Gpus(Silent())
    with pytest.raises(OSError, match="not there"):
        Gpus(object())


def test_power_of_the_whole_board_or_of_the_gpus() -> None:
    rails = {"VDD_CPU_GPU_CV": 2.5, "VDD_IN": 9.5, "VDD_SOC": 1.5}
    assert total_watts(rails, {"0": 55.0}) == 9.5
    assert total_watts({"VDD_SOC": 1.5}, {"0": 55.0, "1": 20.0}) == 75.0
    assert total_watts({"VDD_SOC": 1.5}, {}) is None
