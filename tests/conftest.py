"""Settings of every test."""

from __future__ import annotations

import asyncio
import gc
import importlib
import math
import os
import sys
import threading
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

# Tests run side by side, and these models are small: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What is imported and compiled while tests are collected stays: to look through all of it for
# garbage again and again took more than half of the time.
gc.disable()

ROOT = Path(__file__).parents[1]
pytest_plugins = ["pytester"]

# Measured with `pytest --durations=0`: files whose tests or fixtures take more than about a second
# of a processor each. `make quick` leaves them out.
SLOW = (
    *("benchmarks/", "deployment/", "e2e/", "fuzz/", "golden/", "gpu/", "openai/"),
    *("training/trainer/", "docs/test_running.py"),
    *(f"calibration/test_{name}.py" for name in ("footage_settings", "precision", "reuse_level")),
    *(f"edge_vlm/console/test_{name}.py" for name in ("output", "wheel")),
    *(f"edge_vlm/pixels/test_{name}.py" for name in ("awkward_footage", "video")),
    *("edge_vlm/evaluation/test_points.py", "edge_vlm/formats/test_hub.py"),
    "edge_vlm/test_telemetry.py",
    *(
        f"export/parity/test_{name}.py"
        for name in ("change_scorer", "image_encoder", "openvino_runner", "reuse", "scorerless")
    ),
    *(
        f"export/test_{name}.py"
        for name in ("bad_input", "check_inputs", "export", "footage", "trt_lint", "variants")
    ),
    *("model/test_images.py", "model/test_inspect.py", "model/test_lora.py"),
    *("model/test_schedules.py", "model/test_transformers_parity.py"),
    *(
        f"model/published/test_{name}.py"
        for name in (
            *("published", "published_convert", "published_tokens", "published_training"),
            "weights_of_ones_own",
        )
    ),
    *(f"runtime/alerts/test_{name}.py" for name in ("alert_sinks", "home_assistant", "sinks")),
    *(
        f"runtime/cameras/test_{name}.py"
        for name in ("addresses", "cameras", "rtsp_server", "sources")
    ),
    *("runtime/client/test_client.py", "runtime/client/test_evil_server.py"),
    *(
        f"runtime/engines/test_{name}.py"
        for name in (
            *("clip_policy", "exact_prefill", "interleaved", "prompt_view", "reuse", "schedules"),
            *("stream_times", "token_budget"),
        )
    ),
    *("runtime/machine/test_bench.py", "runtime/machine/test_planning.py"),
    *("runtime/backends/test_backends.py", "runtime/protocol/test_resume.py"),
    *("runtime/server/test_hostile_input.py", "runtime/session/test_recording.py"),
    "runtime/session/test_session_subtitles.py",
    "training/objective/test_reuse.py",
    *(f"training/data/test_{name}.py" for name in ("forms", "train_on_records", "world_source")),
    "training/world/test_draw.py",
)

# Of these, what begins first, so that nobody waits for it at the end.
LONGEST = (
    *("docs/test_running.py", "model/published/test_published_convert.py"),
    *("e2e/commands/test_evaluate.py", "benchmarks/test_training_scripts.py"),
    *("runtime/backends/test_backends.py", "training/trainer/test_demo_recipes.py"),
)

# Of these, what waits more than it works, longest first. Two at the same time would leave a core
# with nothing to do, so they begin far from each other.
WAITING = (
    *("e2e/page/test_page_camera.py", "e2e/page/test_page_panels.py"),
    *("e2e/commands/test_commands.py", "e2e/page/test_page.py"),
    *("runtime/alerts/test_alert_sinks.py", "benchmarks/runtime/test_server_load.py"),
    *("benchmarks/runtime/test_soak.py", "runtime/cameras/test_sources.py"),
    *("e2e/connections/test_hostile_sockets.py", "e2e/page/test_page_line.py"),
    *("runtime/cameras/test_cameras.py", "benchmarks/runtime/test_attacks.py"),
    *("e2e/commands/test_street.py", "e2e/connections/test_doors.py"),
    *("e2e/page/test_page_proxy.py", "e2e/serving/test_snapshots.py"),
    *("e2e/serving/test_home_assistant.py", "e2e/commands/test_watch_cameras.py"),
)
APART = 8
"""Files."""


def _is_slow(path: Path) -> bool:
    name = path.relative_to(ROOT / "tests").as_posix()
    return name.startswith(SLOW) or f"{name}/" in SLOW


_make_loop = asyncio.BaseEventLoop.__init__


def _make_debugged_loop(loop: asyncio.BaseEventLoop) -> None:
    """Event loops of tests check themselves: a call from another thread is an error, and a
    coroutine that nobody awaited is named with where it was made.

    Not by PYTHONASYNCIODEBUG, which programs that tests start would inherit and write about on the
    standard error that is their user's. How long a call took says how busy the machine is, no more.
    The stack in which each future was made (pytest's too, a hundred calls deep) took more time than
    what was tested: it is kept under `python -X dev -m pytest` only.
    """
    _make_loop(loop)
    loop.set_debug(True)
    loop.slow_callback_duration = math.inf


asyncio.BaseEventLoop.__init__ = _make_debugged_loop  # type: ignore[method-assign, assignment]
if not sys.flags.dev_mode:  # what futures and handles ask; the loop's own checks do not
    asyncio.BaseEventLoop.get_debug = lambda self: False  # type: ignore[method-assign]


def pytest_runtest_setup() -> None:
    """A command that a test has called sets torch's threads for itself."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


# What most tests import anyway, and takes longest.
LARGE = ("torch.onnx", "torch._dynamo", "torch.distributed.fsdp", "onnxscript.optimizer")


def pytest_collection() -> None:
    """A tracer (of coverage, before Python 3.12) would make these imports take twice as long, and
    has nothing to measure there."""
    watcher = sys.gettrace()
    if watcher is not None:
        sys.settrace(None)
        try:
            for name in LARGE:
                importlib.import_module(name)
        finally:
            sys.settrace(watcher)


def pytest_collection_finish() -> None:
    """What is there by now is never looked through: that took a tenth of the tests' time."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    gc.enable()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What is left out is not imported."""
    wanted = {"slow": True, "not slow": False}.get(config.getoption("markexpr"))
    if wanted is None or (wanted and collection_path.is_dir()):  # a folder may hold both
        return None
    return True if _is_slow(collection_path) != wanted else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _is_slow(item.path):
            item.add_marker(pytest.mark.slow)
    order = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    # Short ones fill what is left at the end.
    items.sort(key=lambda item: order.get(item.path, len(order) + (not _is_slow(item.path))))
    apart = {ROOT / "tests" / name: APART * place - 0.5 for place, name in enumerate(WAITING)}
    others = dict.fromkeys(item.path for item in items if item.path not in apart)
    places = {path: float(place) for place, path in enumerate(others)} | apart
    items.sort(key=lambda item: places[item.path])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Slow tests go without coverage where it is a tracer, which takes a third of their time."""
    watcher, of_threads = sys.gettrace(), threading.gettrace()
    by_coverage = type(watcher).__module__.startswith("coverage")  # not somebody's debugger
    if not by_coverage or not _is_slow(item.path):
        return (yield)
    sys.settrace(None)
    threading.settrace(None)
    try:
        return (yield)
    finally:
        threading.settrace(of_threads)
        sys.settrace(watcher)


# How long an example takes depends on what else the machine does; that is no failure. The examples
# are the same each time, so that a red run is red for whoever repeats it; new ones are drawn by
# `pytest --hypothesis-profile explore`.
settings.register_profile("explore", deadline=None)
settings.register_profile("repeatable", settings.get_profile("explore"), derandomize=True)
settings.load_profile("repeatable")
