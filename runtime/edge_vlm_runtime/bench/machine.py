"""Where a measurement was taken, and whether the machine stood still meanwhile.

Files of the system are read below a root, so that another machine's can be looked at.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

from edge_vlm import __version__
from edge_vlm_runtime.server.gauges import Gpus, open_gpus

LIBRARIES = (
    *("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx"),
    *("av", "pillow", "simplejpeg", "tokenizers"),
)
"""Whose versions are told where they are installed."""
BUSY_SHARE = 0.1
"""Of all cores, taken by others, from which on a measurement is called disturbed."""
CLOCK_SHARE = 0.05
"""By which a clock may have moved."""
TOOL_S = 20.0

Run = Callable[[Sequence[str]], "str | None"]


def run_tool(command: Sequence[str]) -> str | None:
    """What a tool of the system prints; None where it is missing or refuses."""
    try:
        done = subprocess.run(
            list(command), capture_output=True, text=True, timeout=TOOL_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@dataclass(frozen=True, kw_only=True)
class System:
    """Where it is looked. The defaults are this machine."""

    root: Path = Path("/")
    run: Run = run_tool
    gpus: Callable[[], Gpus | None] = open_gpus

    def read(self, path: str) -> str | None:
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace").strip("\0\n ")
        except OSError:
            return None

    def clocks_mhz(self) -> dict[str, float]:
        """Of the processors (mean), of devices that change theirs (a Jetson's GPU and memory) and
        of NVIDIA cards, by name; empty where nothing tells."""
        found: dict[str, float] = {}
        folder = self.root / "sys/devices/system/cpu"
        steps = [
            self.read(f"{p.relative_to(self.root)}")
            for p in sorted(folder.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
        ]
        numbers = [int(step) / 1e3 for step in steps if step and step.isdigit()]
        if not numbers:
            text = self.read("proc/cpuinfo") or ""
            numbers = [float(value) for value in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", text, re.M)]
        if numbers:
            found["cpu"] = round(fmean(numbers), 1)
        for path in sorted((self.root / "sys/class/devfreq").glob("*/cur_freq")):
            hertz = self.read(str(path.relative_to(self.root)))
            if hertz and hertz.isdigit():
                found[path.parent.name] = round(int(hertz) / 1e6, 1)
        gpus = self.gpus()
        return found | ({} if gpus is None else gpus.clocks_mhz())

    def record(self) -> dict[str, Any]:
        """The machine and its software, as a result file states them."""
        gpus = self.gpus()
        release = self.read("etc/nv_tegra_release")
        model = self.read("proc/device-tree/model")
        return {
            "name": model or (", ".join(gpus.names()) if gpus else None) or self.cpu_name(),
            "cpu": self.cpu_name(),
            "cores": os.cpu_count(),
            "memory_gb": self._memory_gb(),
            "architecture": platform.machine(),
            "system": f"{platform.system()} {platform.release()}",
            "gpus": [] if gpus is None else gpus.names(),
            "driver": None if gpus is None else gpus.driver(),
            "jetson_linux": None if release is None else release.splitlines()[0],
            "power_mode": self._power_mode(),
            "governor": self.read("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            "versions": {"edge-vlm": __version__, "python": platform.python_version()} | versions(),
        }

    def cpu_name(self) -> str:
        text = self.read("proc/cpuinfo") or ""
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
        return found.group(1) if found else platform.processor() or platform.machine()

    def _memory_gb(self) -> float | None:
        found = re.search(r"^MemTotal:\s+(\d+) kB", self.read("proc/meminfo") or "", re.M)
        return round(int(found.group(1)) * 1024 / 1e9, 1) if found else None

    def _power_mode(self) -> dict[str, str] | None:
        """Of a Jetson: what nvpmodel and jetson_clocks say (the latter to root only)."""
        mode, clocks = self.run(["nvpmodel", "-q"]), self.run(["jetson_clocks", "--show"])
        found = {"nvpmodel": mode, "jetson_clocks": clocks}
        kept = {name: " ".join(text.split()) for name, text in found.items() if text}
        return kept or None


def versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass
class Watch:
    """From `begin` to `end`: did clocks move, and how much of the machine did others take?"""

    system: System = field(default_factory=System)
    _clocks: dict[str, float] = field(default_factory=dict)
    _ticks: tuple[float, float] | None = None
    _own_s: float = 0.0
    _begin_s: float = 0.0

    def begin(self) -> None:
        self._clocks = self.system.clocks_mhz()
        self._ticks = self._busy_and_stolen_s()
        self._own_s, self._begin_s = _own_seconds(), time.monotonic()

    def end(self) -> dict[str, Any]:
        """Figures, and `warnings` for people."""
        after = self.system.clocks_mhz()
        elapsed = max(time.monotonic() - self._begin_s, 1e-9)
        own = _own_seconds() - self._own_s
        warnings = [
            f"the clock of {name} moved from {before:g} to {after[name]:g} MHz"
            for name, before in self._clocks.items()
            if name in after and abs(after[name] - before) > CLOCK_SHARE * before
        ]
        others = stolen = None
        ticks = self._busy_and_stolen_s()
        if ticks is not None and self._ticks is not None:
            others = max(0.0, ticks[0] - self._ticks[0] - own) / elapsed
            stolen = max(0.0, ticks[1] - self._ticks[1]) / elapsed
            cores = os.cpu_count() or 1
            if others > BUSY_SHARE * cores:
                warnings.append(
                    f"the machine was busy: other programs took {others:.2f} of {cores} cores"
                )
            if stolen > BUSY_SHARE * cores:
                warnings.append(f"the host took {stolen:.2f} of {cores} cores away")
        return {
            "clocks_before_mhz": self._clocks,
            "clocks_after_mhz": after,
            "seconds": round(elapsed, 1),
            "own_cores": round(own / elapsed, 2),
            "others_cores": None if others is None else round(others, 2),
            "stolen_cores": None if stolen is None else round(stolen, 2),
            "warnings": warnings,
        }

    def _busy_and_stolen_s(self) -> tuple[float, float] | None:
        """Seconds of all cores since boot, from /proc/stat: used by programs; kept by the host."""
        text = self.system.read("proc/stat")
        if text is None or not text.startswith("cpu "):
            return None
        user, nice, kernel, _idle, _wait, irq, soft, steal = map(int, text.split()[1:9])
        tick = os.sysconf("SC_CLK_TCK")
        return (user + nice + kernel + irq + soft) / tick, steal / tick


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
