"""What serving a bundle needs of a machine, part by part. No check raises: it says what is."""

from __future__ import annotations

import time

from edge_vlm.errors import (
    CudaError,
    EdgeVlmError,
    EngineMissing,
    GpuMissing,
    MissingExtraError,
    OutOfDeviceMemory,
    TrtMissing,
)
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm_runtime.doctor.machine import (
    Check,
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
from edge_vlm_runtime.engines.names import Backend
from edge_vlm_runtime.engines.ort import CUDA
from edge_vlm_runtime.engines.store import EngineStore
from edge_vlm_runtime.engines.trt_library import LIBRARIES

SERVING = ("av", "msgspec", "pillow", "rich", "starlette", "tokenizers", "uvicorn", "websockets")
"""Distributions that the server and its clients import, besides ONNX Runtime."""
EXPORT = "edge-vlm export CHECKPOINT -o BUNDLE"


def examine(plan: Plan, machine: Machine) -> list[Check]:
    """Every check, in the order in which gaps are best closed."""
    bundle, opened = check_bundle(plan)
    checks = [
        check_python(),
        check_libraries(machine),
        check_onnxruntime(plan, machine),
        check_jetpack(machine),
        check_driver(machine),
        check_cuda(plan, machine),
        check_tensorrt(plan, machine),
        check_memory(plan, machine),
        check_cameras(machine),
        check_gstreamer(machine),
        check_gauges(machine),
        bundle,
        check_engines(plan, opened, machine),
    ]
    return [*checks, check_run(plan, checks)]


def check_libraries(machine: Machine) -> Check:
    missing = [name for name in SERVING if not machine.has(name)]
    if missing:
        return Check(
            name="libraries",
            state=State.MISSING,
            text=", ".join(missing),
            fix="pip install 'edge-vlm[ort]'",
            needed=True,
        )
    text = ", ".join(f"{name} {machine.version(name)}" for name in SERVING)
    return Check(name="libraries", state=State.OK, text=text, needed=True)


def check_onnxruntime(plan: Plan, machine: Machine) -> Check:
    on_gpu = plan.backend is Backend.CUDA
    name = "onnxruntime"
    needed = plan.backend not in (Backend.TRT, Backend.OPENVINO)
    take_gpu = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'edge-vlm[gpu]'"
    install = take_gpu if on_gpu else "pip install 'edge-vlm[ort]'"
    try:
        version, providers = machine.ort()
    except MissingExtraError as error:
        return Check(name=name, state=State.MISSING, text=error.what, fix=install, needed=needed)
    except EdgeVlmError as error:
        again = take_gpu if on_gpu else "pip install --force-reinstall onnxruntime"
        return Check(name=name, state=State.WRONG, text=error.what, fix=again, needed=needed)
    text = f"{version}: {', '.join(providers)}"
    if machine.has("onnxruntime") and machine.has("onnxruntime-gpu"):
        return Check(
            name=name,
            state=State.WRONG,
            text=f"{text}; onnxruntime and onnxruntime-gpu are both installed, one hides the other",
            fix=take_gpu
            if on_gpu
            else "pip uninstall -y onnxruntime-gpu && pip install --force-reinstall onnxruntime",
            needed=needed and (CUDA not in providers if on_gpu else False),
        )
    if on_gpu and CUDA not in providers:
        return Check(
            name=name,
            state=State.MISSING,
            text=f"{text}; --backend cuda needs {CUDA}",
            fix=take_gpu,
            needed=True,
        )
    return Check(name=name, state=State.OK, text=text, needed=needed)


def check_tensorrt(plan: Plan, machine: Machine) -> Check:
    needed = plan.backend is Backend.TRT
    found, problems, remedy = [], [], None
    for name in LIBRARIES:
        try:
            found.append(f"{name} {machine.trt(name).version}")
        except TrtMissing as error:
            problems.append(error)
            remedy = error.remedy
    if found:
        return Check(name="tensorrt", state=State.OK, text=", ".join(found), needed=needed)
    # One that is here but cannot be used says more than the other's absence.
    wrong = [error for error in problems if "is not installed" not in error.what]
    if machine.jetson is not None:
        fix: str | None = "sudo apt install python3-libnvinfer"
    else:
        fix = "pip install 'edge-vlm[trt-rtx]'" if not wrong else remedy
    return Check(
        name="tensorrt",
        state=State.WRONG if wrong else State.MISSING,
        text="; ".join(error.what for error in (wrong or problems)),
        fix=fix,
        needed=needed,
    )


def _said(error: EdgeVlmError | OSError) -> str:
    return f"{error.code}: {error.what}" if isinstance(error, EdgeVlmError) else str(error)


def check_bundle(plan: Plan) -> tuple[Check, EngineBundle | None]:
    try:
        bundle = EngineBundle.open(plan.bundle)
    except (EdgeVlmError, OSError) as error:
        absent = not plan.bundle.is_dir()
        check = Check(
            name="bundle",
            state=State.MISSING if absent else State.WRONG,
            text=f"{_said(error)} ({plan.bundle})",
            fix=EXPORT,
            needed=True,
        )
        return check, None
    text = f"{bundle.name}, {len(bundle.specs)} graphs, every hash is right ({plan.bundle})"
    return Check(name="bundle", state=State.OK, text=text, needed=True), bundle


def check_engines(plan: Plan, bundle: EngineBundle | None, machine: Machine) -> Check:
    """Those of every library for which there are any, against this GPU and library version."""
    needed = plan.backend is Backend.TRT
    folder = plan.bundle / "engines" if plan.engines is None else plan.engines
    built = [name for name in LIBRARIES if (folder / name).is_dir()]
    fix = f"edge-vlm build {plan.bundle}" + (
        "" if plan.engines is None else f" --engines {plan.engines}"
    )
    if bundle is None or not built:
        text = "none built" if bundle is not None else "no bundle to compare them with"
        if not needed:
            text += "; only --backend trt runs them"
        return Check(name="engines", state=State.MISSING, text=text, fix=fix, needed=needed)
    try:
        gpu = machine.gpu()
        for name in built:
            store, version = EngineStore(folder, name), machine.trt(name).version
            for graph in bundle.specs:
                store.checked(bundle, graph, version, gpu)
    except (EdgeVlmError, OSError) as error:
        state = State.MISSING if isinstance(error, EngineMissing) else State.WRONG
        elsewhere = isinstance(error, (GpuMissing, CudaError, OutOfDeviceMemory, TrtMissing))
        return Check(
            name="engines",
            state=state,
            text=_said(error),
            fix="see cuda and tensorrt" if elsewhere else fix,
            needed=needed,
        )
    text = f"{', '.join(built)}: {len(bundle.specs)} graphs, built for this GPU"
    return Check(name="engines", state=State.OK, text=text, needed=needed)


def check_run(plan: Plan, before: list[Check]) -> Check:
    """Opens everything as `serve` does and reads one word. Not where a check found why not."""
    broken = [check.name for check in before if check.is_broken]
    if broken:
        text, fix = f"not tried: {', '.join(broken)}", "close the gaps above"
        return Check(name="run", state=State.MISSING, text=text, fix=fix, needed=True)
    # Imported here: they bring the whole server, and with it libraries that were checked by now.
    from edge_vlm_runtime.inference.bundle_model import LoadedBundle, warm_up

    start = time.perf_counter()
    try:
        engines = LoadedBundle.open(
            *(plan.bundle, plan.threads, plan.backend, plan.engines), calibration=plan.calibration
        )
        try:
            warm_up(engines)
        finally:
            engines.close()
    except EdgeVlmError as error:
        return Check(
            name="run",
            state=State.WRONG,
            text=f"{error.code}: {error.what}",
            fix=error.remedy or EXPORT,
            needed=True,
        )
    except Exception as error:  # noqa: BLE001  a library's own: this is the place to hear of it
        return Check(
            name="run", state=State.WRONG, text=f"E-INTERNAL: {error!r}", fix=EXPORT, needed=True
        )
    seconds = time.perf_counter() - start
    text = f"one picture and one word through every graph, opened and run in {seconds:.1f} s"
    return Check(name="run", state=State.OK, text=text, needed=True)
