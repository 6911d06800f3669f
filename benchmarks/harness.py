"""What benchmark scripts share: options, where they ran, taking times in turn, the result file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from edge_vlm import __version__

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CHECKPOINT = ROOT / "training" / "checkpoints" / "demo"
CLOCKS_NS = {"wall": time.monotonic_ns, "processor": time.process_time_ns}
"""`processor` counts seconds of computing, for a CPU that others use as well."""


def script_parser(doc: str | None, out: Path | None = None) -> argparse.ArgumentParser:
    """Options of a script with that docstring; `--out` names the result file."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=out, help="the result, as JSON")
    return parser


def made_folder(text: str) -> Path:
    """A folder that is made if it is not there, for argparse."""
    folder = Path(text)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def result_head(script: str, argv: Sequence[str] | None, device: torch.device) -> dict[str, Any]:
    """What every result file begins with; `script` is its `__file__`."""
    return {"command": command_line(script, argv), **device_record(device)}


def device_record(device: torch.device) -> dict[str, Any]:
    """Device, threads and versions, as every result file states them."""
    record: dict[str, Any] = {
        "edge_vlm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return record | {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "nvidia_smi": _nvidia_smi(),
        }
    return record | {
        "device": _cpu_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _nvidia_smi() -> str | None:
    """Driver, SM clock now and at most, power limit; None where the tool is missing."""
    query = "driver_version,clocks.sm,clocks.max.sm,power.limit"
    try:
        return subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def in_turn(
    cases: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmups: int,
    device: torch.device,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every case, once per round: A B C A B C ...

    A machine whose speed drifts slows all of them alike, so that ratios within a round hold.
    `clock=time.process_time` counts processor seconds (of all threads) instead of time that passes:
    for a CPU that others use as well.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(-warmups, rounds):
        for name, run in cases.items():
            _settle(device)
            begin = clock()
            run()
            _settle(device)
            took = clock() - begin
            if turn >= 0:
                seconds[name].append(took)
            say(f"{'warm-up' if turn < 0 else f'round {turn + 1}'}: {name} {took:.4f} s")
    return seconds


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def speed_up(baseline: list[float], case: list[float]) -> float:
    """Median over the rounds of how many times faster the case was."""
    return statistics.median(a / b for a, b in zip(baseline, case, strict=True))


def summary(seconds: list[float]) -> dict[str, Any]:
    return {
        "median_s": round(statistics.median(seconds), 5),
        "least_s": round(min(seconds), 5),
        "rounds_s": [round(value, 5) for value in seconds],
    }


def command_line(script: str, argv: Sequence[str] | None) -> str:
    """The command that makes a result again from the repository's root, wherever it was put.
    `script` is its `__file__`."""
    module = ".".join(Path(script).resolve().relative_to(ROOT).with_suffix("").parts)
    module = module.removesuffix(".__main__")
    arguments = list(sys.argv[1:] if argv is None else argv)
    for option in ("--out", "--scratch", "--tokenizer", "--node-modules"):  # places of one machine
        if option in arguments:
            place = arguments.index(option)
            del arguments[place : place + 2]
    return " ".join(["python -m", module, *arguments])


def commit() -> str | None:
    """With a + where files of it were changed; None outside a repository."""
    with suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        return f"{head}{'+' if changed else ''}"
    return None


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
