"""What serving needs, on machines that have it and that do not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_vlm.errors import (
    CudaError,
    EngineError,
    GpuMissing,
    MissingExtraError,
    OutOfDeviceMemory,
    TrtMissing,
)
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm_runtime.cli.doctor import as_text, coloured, exit_code
from edge_vlm_runtime.cli.doctor import doctor as command
from edge_vlm_runtime.doctor import doctor
from edge_vlm_runtime.doctor.machine import Check, Machine, Plan, State
from edge_vlm_runtime.engines.cuda import Gpu
from edge_vlm_runtime.engines.names import Backend
from edge_vlm_runtime.engines.store import EngineStore, Fingerprint
from tests.runtime.command_line import command_line
from tests.tiny import tiny_bundle

ROOT = Path(__file__).parents[3]
ORIN = Gpu(name="Orin", capability="sm_87")
CPU_ONLY = ("CPUExecutionProvider",)


def having(*names: str) -> Callable[[str], str]:
    def version(name: str) -> str:
        if name not in names:
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    return version


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*arguments: object) -> Any:
        raise error

    return fail


MACHINE = Machine(
    version=having("onnxruntime", *doctor.SERVING),
    gpu=lambda: ORIN,
    ort=lambda: ("1.20.0", CPU_ONLY),
    trt=lambda name: SimpleNamespace(name=name, version="10.3.0"),  # type: ignore[arg-type, return-value]
)


@pytest.fixture
def plan() -> Plan:
    return Plan(bundle=tiny_bundle(), threads=1)


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_this_machine_can_serve(plan: Plan) -> None:
    checks = doctor.examine(plan, Machine())
    assert exit_code(checks) == 0
    found = by_name(checks)
    for name in ("python", "libraries", "onnxruntime", "bundle", "run"):
        assert found[name].state is State.OK, found[name]
    assert "CPUExecutionProvider" in found["onnxruntime"].text


def test_every_gap_but_gauges_says_what_closes_it(plan: Plan, tmp_path: Path) -> None:
    nothing = Machine(
        root=tmp_path,
        which=lambda name: None,
        version=having(),
        gpu=raising(GpuMissing("no driver")),
        ort=raising(MissingExtraError.for_library("onnxruntime", "ort")),
        trt=raising(TrtMissing("tensorrt is not installed")),
    )
    checks = doctor.examine(replace(plan, bundle=tmp_path / "none"), nothing)
    gaps = [check for check in checks if check.state is not State.OK]
    assert {"libraries", "onnxruntime", "bundle", "run", "cuda"} <= {c.name for c in gaps}
    assert [c.name for c in gaps if c.fix is None] == ["memory", "gauges"]
    assert exit_code(checks) == 1


def test_what_nothing_needs_is_not_called_missing(plan: Plan) -> None:
    checks = doctor.examine(plan, replace(Machine(), gpu=raising(GpuMissing("no driver"))))
    lines = as_text(checks, Backend.ORT).splitlines()
    assert any(line.startswith("not needed") and " cuda " in line for line in lines)
    assert not [line for line in lines if line.startswith("missing")]
    needed = as_text([replace(check, needed=True) for check in checks], Backend.ORT)
    assert any(line.startswith("missing") and "cuda" in line for line in needed.splitlines())


def test_colours_leave_the_text_as_it_is(plan: Plan) -> None:
    text = as_text(doctor.examine(plan, Machine()), Backend.ORT)
    shown = coloured(text)
    assert "\033[32mok\033[0m" in shown
    assert re.sub(r"\033\[[\d;]*m", "", shown) == text


def test_libraries_that_are_missing_are_named(plan: Plan) -> None:
    names = [name for name in doctor.SERVING if name != "uvicorn"]
    found = doctor.check_libraries(replace(MACHINE, version=having(*names)))
    assert (found.state, found.text) == (State.MISSING, "uvicorn")
    assert found.fix == "pip install 'edge-vlm[ort]'"


@pytest.mark.parametrize(
    ("backend", "ort", "installed", "state", "broken", "fix"),
    [
        ("ort", lambda: ("1.2", CPU_ONLY), ["onnxruntime"], "ok", False, None),
        ("cuda", lambda: ("1.2", CPU_ONLY), ["onnxruntime"], "missing", True, "edge-vlm[gpu]"),
        (
            "cuda",
            lambda: ("1.2", ("CUDAExecutionProvider", *CPU_ONLY)),
            ["onnxruntime-gpu"],
            *("ok", False, None),
        ),
        (
            "cuda",
            lambda: ("1.2", CPU_ONLY),
            ["onnxruntime", "onnxruntime-gpu"],
            *("wrong", True, "edge-vlm[gpu]"),
        ),
        (
            "ort",
            lambda: ("1.2", CPU_ONLY),
            ["onnxruntime", "onnxruntime-gpu"],
            *("wrong", False, "uninstall -y onnxruntime-gpu"),
        ),
        (
            "ort",
            raising(EngineError("libstdc++ is too old")),
            ["onnxruntime"],
            *("wrong", True, "--force-reinstall"),
        ),
        (
            "trt",
            raising(MissingExtraError.for_library("onnxruntime", "ort")),
            [],
            *("missing", False, "edge-vlm[ort]"),
        ),
    ],
)
def test_onnxruntime(
    plan: Plan, backend: str, ort: Any, installed: list[str], state: str, broken: bool, fix: str
) -> None:
    machine = replace(MACHINE, ort=ort, version=having(*installed))
    found = doctor.check_onnxruntime(replace(plan, backend=Backend(backend)), machine)
    assert (found.state.value, found.is_broken) == (state, broken)
    assert found.fix is None if fix is None else fix in (found.fix or "")


def test_tensorrt(plan: Plan, tmp_path: Path) -> None:
    by_trt = replace(plan, backend=Backend.TRT)
    assert doctor.check_tensorrt(by_trt, MACHINE).state is State.OK
    absent = replace(MACHINE, root=tmp_path, trt=raising(TrtMissing("tensorrt is not installed")))
    found = doctor.check_tensorrt(by_trt, absent)
    assert (found.state, found.is_broken) == (State.MISSING, True)
    assert not doctor.check_tensorrt(plan, absent).is_broken
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/model").write_text("NVIDIA Jetson AGX Orin\0")
    assert doctor.check_tensorrt(plan, absent).fix == "sudo apt install python3-libnvinfer"
    old = replace(absent, trt=raising(TrtMissing("tensorrt 8.6 is too old", remedy="need 10.3")))
    assert doctor.check_tensorrt(plan, old).state is State.WRONG


def test_a_damaged_bundle_is_wrong_and_nothing_is_run(plan: Plan, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(plan.bundle, copy)
    (copy / "tokenizer.json").write_text("{}")
    found = by_name(doctor.examine(replace(plan, bundle=copy), MACHINE))
    assert found["bundle"].state is State.WRONG
    assert "E-BUNDLE-HASH: tokenizer.json" in found["bundle"].text
    assert found["run"].text == "not tried: bundle"


def test_a_bundle_that_does_not_open_is_wrong(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "edge_vlm_runtime.inference.bundle_model.warm_up", raising(EngineError("no such kernel"))
    )
    found = doctor.check_run(plan, [])
    assert (found.state, found.text) == (State.WRONG, "E-ENGINE: no such kernel")
    monkeypatch.setattr(
        "edge_vlm_runtime.inference.bundle_model.warm_up", raising(RuntimeError("a library's"))
    )
    assert "a library's" in doctor.check_run(plan, []).text


def store_engines(bundle: EngineBundle, folder: Path, gpu: Gpu, version: str) -> None:
    store = EngineStore(folder, "tensorrt")
    store.folder.mkdir(parents=True)
    for name in bundle.specs:
        engine = store.folder / "new"
        engine.write_bytes(name.encode())
        fingerprint = Fingerprint.of(
            bundle,
            name,
            library="tensorrt",
            library_version=version,
            gpu=gpu.name,
            capabilities=(gpu.capability,),
            options={},
        )
        store.write(name, engine, fingerprint, {})


def test_engines_are_compared_with_this_device(plan: Plan, tmp_path: Path) -> None:
    bundle = EngineBundle.open(plan.bundle)
    by_trt = replace(plan, backend=Backend.TRT, engines=tmp_path)
    none = doctor.check_engines(by_trt, bundle, MACHINE)
    assert (none.state, none.is_broken) == (State.MISSING, True)
    assert none.fix == f"edge-vlm build {plan.bundle} --engines {tmp_path}"

    store_engines(bundle, tmp_path, ORIN, "10.3.0")
    assert doctor.check_engines(by_trt, bundle, MACHINE).state is State.OK

    other = replace(MACHINE, gpu=lambda: Gpu(name="Thor", capability="sm_110"))
    found = doctor.check_engines(by_trt, bundle, other)
    assert found.state is State.WRONG
    assert found.is_broken
    assert "E-ENGINE-STALE" in found.text
    assert "'Thor'" in found.text

    (tmp_path / "tensorrt" / "llm.engine").unlink()
    assert doctor.check_engines(by_trt, bundle, MACHINE).state is State.MISSING
    for error in (GpuMissing("no driver"), CudaError("error 999"), OutOfDeviceMemory("full")):
        no_gpu = replace(MACHINE, gpu=raising(error))
        assert doctor.check_engines(by_trt, bundle, no_gpu).fix == "see cuda and tensorrt"


def test_the_command_prints_lines_and_an_object(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--bundle", str(plan.bundle), "--threads", "1"]
    assert command_line(command, arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "this machine can serve with --backend ort"
    assert lines[0].split()[:2] == ["ok", "python"]

    file = tmp_path / "edge-vlm.toml"
    file.write_text('bundle = "none"\nport = 1\n')
    assert command_line(command, ["--config", str(file), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["can_serve"] is False
    bundle = next(check for check in found["checks"] if check["name"] == "bundle")
    assert (bundle["state"], bundle["needed"]) == ("missing", True)
    assert str(tmp_path / "none") in bundle["text"]


def test_it_runs_where_nothing_is_installed_and_brings_no_torch() -> None:
    """As after `pip install edge-vlm`, without any extra."""
    code = f"""
import argparse, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "runtime")!r}]
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {[*doctor.SERVING, "PIL", "onnxruntime", "torch"]!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from edge_vlm_runtime.cli.doctor import doctor
parser = argparse.ArgumentParser()
doctor.add_arguments(parser)
sys.exit(doctor.run(parser.parse_args([])))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "onnxruntime is not installed" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("this machine cannot serve")
