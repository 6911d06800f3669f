from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edge_vlm_runtime.server.gauges import (
    MachineGauges,
    rail_watts,
    resident_bytes,
    total_watts,
)
from tests.tiny import ROOT

SOURCE = Path(__file__).with_name("fake_nvml.c")


def test_memory_of_this_process(tmp_path: Path) -> None:
    found = resident_bytes()
    if Path("/proc/self/statm").exists():
        assert found is not None
        assert 10e6 < found < 100e9
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
    sample = MachineGauges(hwmon=tmp_path, statm=tmp_path / "nothing").sample()
    assert (sample.resident_bytes, sample.total_watts) == (None, 9.5)


READ = """
from edge_vlm_runtime.server.gauges import MachineGauges, open_gpus
gpus = open_gpus()
sample = MachineGauges().sample()
print(gpus and [gpus.watts(), gpus.used_bytes()], sample.gpu_watts, sample.gpu_used_bytes)
"""


def read_gpus(tmp_path: Path, setup: str = "", **environment: str) -> str:
    """What a process of its own finds: a loaded driver stays loaded."""
    done = subprocess.run(
        [sys.executable, "-c", setup + READ],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "runtime"),
            "LD_LIBRARY_PATH": str(tmp_path),
            **environment,
        },
    )
    assert done.stderr == ""
    return done.stdout.strip()


def test_gpus_tell_what_they_can(tmp_path: Path) -> None:
    """Through NVIDIA's own binding, from a stand-in for the driver's library."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    library = tmp_path / "libnvidia-ml.so.1"
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True)
    found = "{'0': 61.5} {'0': 1000.0, '1': 1010.0}"
    assert read_gpus(tmp_path) == f"[{found.replace('} {', '}, {')}] {found}"
    assert read_gpus(tmp_path, NVML_FAILS="1") == "None {} {}"


def test_no_driver_and_no_binding_are_no_gauges(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"not a library")
    assert read_gpus(tmp_path) == "None {} {}"
    absent = "import sys; sys.modules['pynvml'] = None\n"
    assert read_gpus(tmp_path, absent) == "None {} {}"


def test_power_of_the_whole_board_or_of_the_gpus() -> None:
    rails = {"VDD_CPU_GPU_CV": 2.5, "VDD_IN": 9.5, "VDD_SOC": 1.5}
    assert total_watts(rails, {"0": 55.0}) == 9.5
    assert total_watts({"VDD_SOC": 1.5}, {"0": 55.0, "1": 20.0}) == 75.0
    assert total_watts({"VDD_SOC": 1.5}, {}) is None
