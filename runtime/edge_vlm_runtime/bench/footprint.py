"""Memory, energy and the time a new process needs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from edge_vlm.errors import EngineError
from edge_vlm.memory import row_bytes, run_bytes
from edge_vlm_runtime.bench.meters import Meters
from edge_vlm_runtime.bench.workload import Workload
from edge_vlm_runtime.engines.names import Backend
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.protocol.settings import ModelLimits, ServerLimits
from edge_vlm_runtime.recording.report import peak_resident_bytes
from edge_vlm_runtime.server.gauges import MachineGauges
from edge_vlm_runtime.session.budget import cache_capacity

COLD_START_S = 600.0
ENERGY_S = 3.0
"""That a counter is watched at least: it steps in tenths of a second."""
COLD_START = """
import sys
from pathlib import Path
from edge_vlm_runtime.engines.names import Backend
from edge_vlm_runtime.inference.bundle_model import LoadedBundle, warm_up
bundle, threads, backend, engines = sys.argv[1:]
with LoadedBundle.open(bundle, int(threads), Backend(backend), engines or None) as engines:
    warm_up(engines)
"""


def memory_of(engines: LoadedBundle, workload: Workload) -> dict[str, Any]:
    """Bytes by part, after everything else was measured: null where nothing tells.

    `cache` is one session's at its fullest; `activations` what one frame's prefill holds besides,
    by the formula that serving plans with.
    """
    bundle = engines.bundle
    spec, language = bundle.specs["llm"], bundle.config.language
    rows = cache_capacity(ModelLimits.from_bundle(bundle), ServerLimits())
    new = workload.room(bundle.config)
    sample = MachineGauges().sample()
    files = [path for path in (bundle.path / "graphs").iterdir() if path.is_file()]
    return {
        "weights_bytes": sum(path.stat().st_size for path in files),
        "embeddings_bytes": engines.bundle.embed_table.nbytes,
        "cache_bytes": rows * row_bytes(language, spec),
        "cache_tokens": rows,
        "cache_token_bytes": row_bytes(language, spec),
        "activations_bytes": run_bytes(language, spec, new, rows - new),
        "resident_bytes": sample.resident_bytes,
        "resident_most_bytes": _at_least(sample.resident_bytes, peak_resident_bytes()),
        "gpu_used_bytes": sum(sample.gpu_used_bytes.values()) if sample.gpu_used_bytes else None,
    }


def _at_least(now: int | None, most: int | None) -> int | None:
    """Systems note the high water mark less often than what is in use."""
    return None if most is None else max(now or 0, most)


def cold_start_s(bundle: str, threads: int, backend: Backend, engines: str | None) -> float:
    """From nothing to the first frame and token, in a new process. Raises EngineError."""
    begin = time.monotonic()
    command = [sys.executable, "-c", COLD_START, bundle, str(threads), backend.value, engines or ""]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COLD_START_S)
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines()[-1:] or ["it gives no reason"]
        raise EngineError(f"a new process does not start: {said[0]}") from error
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"a new process is not ready after {COLD_START_S:.0f} s") from error
    return round(time.monotonic() - begin, 3)


def energy_of(
    meters: Meters,
    encode: Callable[[], None],
    answer: Callable[[], int],
) -> dict[str, Any]:
    """Watts while nothing is done and while frames are, joules of a frame and an answer, for each
    meter. `encode` does one frame, `answer` one answer and returns its tokens."""
    readings: dict[str, dict[str, Any]] = {}
    if meters.found:
        _, idle, seconds = _watched(meters, lambda: time.sleep(SETTLE_S))
        for name, joules in idle.items():
            readings.setdefault(name, {})["idle_w"] = round(joules / seconds, 2)
        frames, spent, seconds = _watched(meters, encode)
        for name, joules in spent.items():
            readings.setdefault(name, {})["frames_w"] = round(joules / seconds, 2)
            readings[name]["j_per_frame"] = round(joules / frames, 4)
        tokens = 0

        def count() -> None:
            nonlocal tokens
            tokens += answer()

        answers, spent, _ = _watched(meters, count)
        for name, joules in spent.items():
            readings.setdefault(name, {})["j_per_answer"] = round(joules / answers, 4)
            readings[name]["tokens_per_j"] = round(tokens / joules, 3) if joules else None
    return {
        "readings": [{"meter": name, **values} for name, values in readings.items()],
        "absent": dict(meters.absent),
    }


SETTLE_S = 0.1


def _watched(meters: Meters, work: Callable[[], Any]) -> tuple[int, dict[str, float], float]:
    """How often it was done in ENERGY_S, the joules of each meter, the seconds."""
    before, begin, times = meters.joules(), time.monotonic(), 0
    while not times or time.monotonic() - begin < ENERGY_S:
        work()
        times += 1
    after = meters.joules()
    seconds = time.monotonic() - begin
    return times, {name: after[name] - before[name] for name in after if name in before}, seconds
