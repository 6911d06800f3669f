"""Checks of a machine, with the files of others: a Jetson's, a workstation's, nothing at all."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from edge_vlm.errors import GpuMissing
from edge_vlm_runtime.doctor.machine import (
    INSTALL_DRIVER,
    Machine,
    Plan,
    State,
    check_cameras,
    check_cuda,
    check_driver,
    check_gauges,
    check_gstreamer,
    check_jetpack,
    check_memory,
    check_python,
)
from edge_vlm_runtime.engines.cuda import Gpu
from edge_vlm_runtime.engines.names import Backend

TEGRA = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n"
DRIVERS = {
    "550.54.15": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 2024\n",
    "560.35.03": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  560.35.03  Release\n",
}


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def no_gpu() -> Gpu:
    raise GpuMissing("no NVIDIA driver: libcuda.so.1")


def none_installed(name: str) -> str:
    raise metadata.PackageNotFoundError(name)


@pytest.fixture
def empty(tmp_path: Path) -> Machine:
    """A machine that tells nothing."""
    root = tmp_path / "root"
    root.mkdir()
    return Machine(root=root, which=lambda name: None, version=none_installed, gpu=no_gpu)


def test_this_python_is_right() -> None:
    assert check_python().state is State.OK


def test_a_jetson(empty: Machine) -> None:
    write(empty.root, "proc/device-tree/model", "NVIDIA Jetson Orin Nano Developer Kit\0")
    assert check_jetpack(empty).state is State.MISSING
    assert check_jetpack(empty).fix == "sudo apt install nvidia-jetpack"
    write(empty.root, "etc/nv_tegra_release", TEGRA)
    found = check_jetpack(empty)
    assert found.state is State.OK
    assert found.text == "JetPack 6, Jetson Linux 36.4.3, NVIDIA Jetson Orin Nano Developer Kit"
    assert check_driver(empty).state is State.OK


def test_a_release_that_is_not_understood_is_wrong(empty: Machine) -> None:
    write(empty.root, "etc/nv_tegra_release", "something else\n")
    assert check_jetpack(empty).state is State.WRONG


def test_no_jetson_needs_no_jetpack(empty: Machine) -> None:
    found = check_jetpack(empty)
    assert (found.state, found.fix) == (State.OK, None)


@pytest.mark.parametrize("version", DRIVERS)
def test_the_driver(empty: Machine, version: str) -> None:
    assert check_driver(empty).state is State.MISSING
    write(empty.root, "proc/driver/nvidia/version", DRIVERS[version])
    found = check_driver(empty)
    assert (found.state, found.text) == (State.OK, f"NVIDIA {version}")


def test_a_gpu_is_needed_by_backends_that_use_it(empty: Machine) -> None:
    for backend in Backend:
        found = check_cuda(Plan(bundle=empty.root, backend=backend), empty)
        assert found.state is State.MISSING
        assert found.fix == INSTALL_DRIVER
        assert found.is_broken == (backend in (Backend.CUDA, Backend.TRT))


def test_a_driver_whose_gpu_does_not_answer_is_wrong(empty: Machine) -> None:
    write(empty.root, "proc/driver/nvidia/version", DRIVERS["550.54.15"])
    found = check_cuda(Plan(bundle=empty.root, backend=Backend.CUDA), empty)
    assert found.state is State.WRONG


def test_a_gpu() -> None:
    machine = Machine(gpu=lambda: Gpu(name="Orin", capability="sm_87"))
    found = check_cuda(Plan(bundle=Path()), machine)
    assert (found.state, found.text) == (State.OK, "Orin, sm_87")


def test_memory_is_compared_with_the_bundle(empty: Machine, tmp_path: Path) -> None:
    bundle = tmp_path / "engines" / "bundle"  # only engines of the bundle itself do not count
    write(bundle, "graphs/llm.weights", "x" * 5000)
    write(bundle, "engines/tensorrt/llm.engine", "x" * 900_000)
    plan = Plan(bundle=bundle)
    assert check_memory(plan, empty).state is State.MISSING
    write(empty.root, "proc/meminfo", "MemTotal:  8000 kB\nMemFree: 1 kB\nMemAvailable:  5 kB\n")
    assert check_memory(plan, empty).state is State.OK
    write(empty.root, "proc/meminfo", "MemTotal:  8000 kB\nMemFree: 1 kB\nMemAvailable:  4 kB\n")
    found = check_memory(plan, empty)
    assert found.state is State.WRONG
    assert found.is_broken
    assert found.fix


def test_memory_that_is_not_told_stops_nothing(empty: Machine) -> None:
    assert not check_memory(Plan(bundle=empty.root), empty).is_broken


def test_cameras(empty: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_cameras(empty).state is State.MISSING
    for number in (0, 1):
        write(empty.root, f"dev/video{number}", "")
    assert check_cameras(empty).text == "/dev/video0, /dev/video1"
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).endswith("1"))
    found = check_cameras(empty)
    assert found.state is State.WRONG
    assert not found.is_broken
    assert "no permission for /dev/video1" in found.text
    assert found.fix is not None
    assert "usermod -aG video" in found.fix


def test_gstreamer(empty: Machine) -> None:
    found = check_gstreamer(empty)
    assert found.state is State.MISSING
    assert not found.is_broken
    assert found.fix == "sudo apt install gstreamer1.0-tools gstreamer1.0-plugins-good"
    there = Machine(which=lambda name: f"/usr/bin/{name}")
    assert check_gstreamer(there).text == "/usr/bin/gst-launch-1.0"


def test_the_gauges_of_a_jetson(empty: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_vlm_runtime.doctor.machine.open_gpus", lambda: None)
    found = check_gauges(empty)
    assert found.state is State.MISSING
    assert not found.is_broken
    sensor = "sys/class/hwmon/hwmon1"
    write(empty.root, f"{sensor}/name", "ina3221\n")
    for name, text in {"in1_label": "VDD_IN", "in1_input": "5000", "curr1_input": "900"}.items():
        write(empty.root, f"{sensor}/{name}", text)
    assert check_gauges(empty).text == "power of VDD_IN"
