"""What a machine has: its system, GPU, memory and cameras. No check raises: it says what is.

Files of the system are read below `Machine.root`, so that another machine's can be looked at.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path

from edge_vlm.errors import EdgeVlmError
from edge_vlm_runtime.engines.cuda import Cuda, Gpu
from edge_vlm_runtime.engines.names import Backend
from edge_vlm_runtime.engines.ort import ort_library
from edge_vlm_runtime.engines.trt_library import TrtLibrary, load_library
from edge_vlm_runtime.server.gauges import open_gpus, rail_watts
from edge_vlm_runtime.sources.gstreamer import PROGRAM

OLDEST_PYTHON = (3, 10)
JETPACKS = {"35": "JetPack 5", "36": "JetPack 6", "38": "JetPack 7"}
"""By the major release of Jetson Linux."""
INSTALL_DRIVER = "sudo ubuntu-drivers install"


NOT_NEEDED = "not needed"


class State(str, Enum):
    OK = "ok"
    MISSING = "missing"
    WRONG = "wrong"


@dataclass(frozen=True, kw_only=True)
class Check:
    name: str
    state: State
    text: str
    fix: str | None = None
    """The one command, or the one thing to do; None where nothing needs to be done."""
    needed: bool = False
    """Without it this bundle cannot be served here by this backend."""

    @property
    def is_broken(self) -> bool:
        return self.needed and self.state is not State.OK

    @property
    def shown(self) -> str:
        """The state for a person, to whom "missing" would sound like work to be done."""
        absent = self.state is State.MISSING and not self.needed
        return NOT_NEEDED if absent else self.state.value


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the checks look. The defaults are this machine."""

    root: Path = Path("/")
    which: Callable[[str], str | None] = shutil.which
    version: Callable[[str], str] = metadata.version
    gpu: Callable[[], Gpu] = lambda: Cuda().gpu
    ort: Callable[[], tuple[str, tuple[str, ...]]] = ort_library
    trt: Callable[[str], TrtLibrary] = load_library

    def read(self, path: str) -> str | None:
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace").strip("\0\n ")
        except OSError:
            return None

    def has(self, distribution: str) -> bool:
        try:
            self.version(distribution)
        except metadata.PackageNotFoundError:
            return False
        return True

    @property
    def jetson(self) -> str | None:
        """Its name, None where this is no Jetson."""
        model = self.read("proc/device-tree/model") or ""
        return model if "jetson" in model.lower() or "orin" in model.lower() else None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be served, and how."""

    bundle: Path
    backend: Backend = Backend.ORT
    engines: Path | None = None
    threads: int = 2
    calibration: Path | None = None


def check_python() -> Check:
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info[:2] < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        return Check(
            name="python",
            state=State.WRONG,
            text=f"{text}, need {wanted} or later",
            fix=f"python{wanted} -m venv venv",
            needed=True,
        )
    return Check(name="python", state=State.OK, text=text, needed=True)


def check_jetpack(machine: Machine) -> Check:
    release = machine.read("etc/nv_tegra_release")
    if release is None:
        if machine.jetson is None:
            return Check(name="jetpack", state=State.OK, text="not a Jetson, not needed")
        return Check(
            name="jetpack",
            state=State.MISSING,
            text=f"{machine.jetson} without /etc/nv_tegra_release",
            fix="sudo apt install nvidia-jetpack",
        )
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", release)
    if found is None:
        return Check(
            name="jetpack",
            state=State.WRONG,
            text=f"/etc/nv_tegra_release is not understood: {release.splitlines()[:1]}",
            fix="sudo apt install --reinstall nvidia-l4t-core",
        )
    major, revision = found.groups()
    name = JETPACKS.get(major, "a JetPack unknown to us")
    board = machine.jetson or "a Jetson"
    return Check(
        name="jetpack", state=State.OK, text=f"{name}, Jetson Linux {major}.{revision}, {board}"
    )


def check_driver(machine: Machine) -> Check:
    text = machine.read("proc/driver/nvidia/version") or ""
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    version = found.group(1) if found else machine.read("sys/module/nvidia/version")
    if version:
        return Check(name="driver", state=State.OK, text=f"NVIDIA {version}")
    if machine.jetson is not None:
        return Check(name="driver", state=State.OK, text="part of Jetson Linux")
    return Check(
        name="driver",
        state=State.MISSING,
        text="no NVIDIA driver is loaded; --backend ort needs none",
        fix=f"{INSTALL_DRIVER}  # where there is an NVIDIA GPU",
    )


def check_cuda(plan: Plan, machine: Machine) -> Check:
    needed = plan.backend.is_on_gpu
    try:
        gpu = machine.gpu()
    except EdgeVlmError as error:
        driver = check_driver(machine).state is State.OK
        return Check(
            name="cuda",
            state=State.WRONG if driver else State.MISSING,
            text=error.what,
            fix="sudo modprobe nvidia-uvm" if driver else INSTALL_DRIVER,
            needed=needed,
        )
    return Check(name="cuda", state=State.OK, text=f"{gpu.name}, {gpu.capability}", needed=needed)


def check_memory(plan: Plan, machine: Machine) -> Check:
    """Against the size of the bundle: all of it is in memory while it is served."""
    sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB", machine.read("proc/meminfo") or "", re.M))
    if "MemTotal" not in sizes or "MemAvailable" not in sizes:
        return Check(name="memory", state=State.MISSING, text="the system does not say")
    total, free = int(sizes["MemTotal"]) << 10, int(sizes["MemAvailable"]) << 10
    size = sum(
        _size(path)
        for path in plan.bundle.rglob("*")
        if path.relative_to(plan.bundle).parts[0] != "engines"
    )
    text = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if size:
        text += f", the bundle has {size / 1e9:.2f} GB"
    enough = free > size
    return Check(
        name="memory",
        state=State.OK if enough else State.WRONG,
        text=text,
        fix=None if enough else "edge-vlm export CHECKPOINT -o BUNDLE --precision int4",
        needed=True,
    )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def check_cameras(machine: Machine) -> Check:
    devices = sorted((machine.root / "dev").glob("video*"))
    names = ", ".join(f"/dev/{device.name}" for device in devices)
    if not devices:
        return Check(
            name="cameras",
            state=State.MISSING,
            text="no /dev/video*; files, RTSP and browsers need none",
            fix="connect one, or: edge-vlm watch --source rtsp://HOST/PATH",
        )
    closed = [device for device in devices if not os.access(device, os.R_OK | os.W_OK)]
    if closed:
        return Check(
            name="cameras",
            state=State.WRONG,
            text=f"{names}: no permission for {', '.join(f'/dev/{d.name}' for d in closed)}",
            fix='sudo usermod -aG video "$USER"  # then log in again',
        )
    return Check(name="cameras", state=State.OK, text=names)


def check_gstreamer(machine: Machine) -> Check:
    path = machine.which(PROGRAM)
    if path is None:
        return Check(
            name="gstreamer",
            state=State.MISSING,
            text=f"no {PROGRAM}; only the sources csi and gst: need it",
            fix="sudo apt install gstreamer1.0-tools gstreamer1.0-plugins-good",
        )
    return Check(name="gstreamer", state=State.OK, text=path)


def check_gauges(machine: Machine) -> Check:
    """Power and GPU memory in /metrics: by NVML, or the sensors of a Jetson, or not at all."""
    rails = rail_watts(machine.root / "sys/class/hwmon")
    gpus = open_gpus()
    found = [f"power of {', '.join(rails)}"] if rails else []
    found += ["NVML"] if gpus is not None else []
    if not found:
        return Check(
            name="gauges", state=State.MISSING, text="power and GPU memory: none, and none needed"
        )
    return Check(name="gauges", state=State.OK, text=", ".join(found))
