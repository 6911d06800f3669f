"""The page of `/metrics`: the same figures as ever, and nothing read on the event loop."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import edge_vlm
from edge_vlm_runtime import protocol
from edge_vlm_runtime.server.gauges import MachineSample
from edge_vlm_runtime.server.metrics import ServerMetrics
from tests.runtime.server.live import run
from tests.runtime.server.metrics_events import SecondsClock, live

PAGE = Path(__file__).with_name("metrics_page.txt")
"""What was rendered of `live` before a library did it."""
SAMPLE = MachineSample(
    resident_bytes=123456789,
    rail_watts={"VDD_IN": 9.5},
    gpu_watts={"0": 61.5},
    gpu_used_bytes={"0": 1000.0, "1": 1010.0},
)


class FakeMachine:
    """Tells what it is given, or fails; remembers the threads it was read on."""

    def __init__(self) -> None:
        self.result: MachineSample | Exception = SAMPLE
        self.threads: list[int] = []
        self.on_read: Callable[[], object] = lambda: None

    def sample(self) -> MachineSample:
        self.threads.append(threading.get_ident())
        self.on_read()
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def make(machine: FakeMachine) -> ServerMetrics:
    return ServerMetrics(
        bundle_name='a "bundle"', num_sessions=lambda: 2, clock_s=SecondsClock(), machine=machine
    )


def families(page: str) -> dict[str, tuple[str, str, dict[Any, float]]]:
    """Type, help and samples of each metric; `le` is a number."""
    found = {}
    for family in text_string_to_metric_families(page):
        samples: dict[Any, float] = {}
        for sample in family.samples:
            labels = {k: float(v) if k == "le" else v for k, v in sample.labels.items()}
            samples[sample.name, tuple(sorted(labels.items()))] = sample.value
        assert len(samples) == len(family.samples)
        found[family.name] = (family.type, family.documentation, samples)
    return found


def test_names_types_labels_and_values_are_those_of_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_vlm, "__version__", "0")
    metrics = make(FakeMachine())
    live(metrics)
    old, new = families(PAGE.read_text()), families(metrics.render().decode())
    assert old.keys() == new.keys()
    assert len(old) == 25
    for name, (kind, text, samples) in old.items():
        assert new[name][:2] == (kind, text)
        assert new[name][2] == pytest.approx(samples)


def test_a_new_server_counts_from_nothing() -> None:
    live(make(FakeMachine()))
    found = families(make(FakeMachine()).render().decode())
    assert found["edge_vlm_frames_processed"][2] == {("edge_vlm_frames_processed_total", ()): 0}
    assert found["edge_vlm_frames_dropped"][2] == {}
    buckets = [value for (name, _), value in found["edge_vlm_frame_age_seconds"][2].items()]
    assert buckets
    assert not any(buckets)


def test_what_cannot_be_read_and_what_is_not_finite() -> None:
    machine = FakeMachine()
    machine.result = MachineSample()
    metrics = make(machine)
    for event in (1.0, math.nan, math.inf):
        metrics._age.observe(event)
    found = families(metrics.render().decode())
    assert not {name for name in found if "gpu" in name or "rail" in name or "resident" in name}
    count = found["edge_vlm_frame_age_seconds"][2]["edge_vlm_frame_age_seconds_count", ()]
    assert count == 2  # what is not a number lies below no bound


def stats(metrics: ServerMetrics) -> tuple[int | None, float | None]:
    event = protocol.SessionStats(
        frames_received=1,
        frames_processed=1,
        frames_dropped={},
        fps_in=1.0,
        fps_processed=1.0,
        cells_seen=1,
        cells_kept=1,
        frames_in_memory=1,
        kv_tokens=1,
        kv_capacity_tokens=1,
        questions_waiting=0,
        ttft_s=None,
    )
    metrics.complete(event)
    return event.memory_bytes, event.power_watts


def test_the_machine_is_read_once_for_all_and_off_the_loop() -> None:
    async def follow() -> None:
        machine, loop, read = FakeMachine(), asyncio.get_running_loop(), asyncio.Event()
        metrics = make(machine)
        machine.on_read = lambda: loop.call_soon_threadsafe(read.set)
        assert len(machine.threads) == 1
        for _ in range(5):
            assert stats(metrics) == (123456789, 9.5)
            metrics.render()
        assert len(machine.threads) == 1

        async def until(wanted: tuple[int | None, float | None]) -> None:
            while stats(metrics) != wanted:
                read.clear()
                await read.wait()

        following = asyncio.create_task(metrics.follow_machine(period_s=0))
        machine.result = MachineSample(resident_bytes=5, gpu_watts={"0": 1.0, "1": 2.0})
        await until((5, 3.0))
        machine.result = OSError("the driver is gone")
        await until((None, None))  # unknown rather than old
        machine.result = SAMPLE
        await until((123456789, 9.5))  # and it goes on
        following.cancel()
        await asyncio.wait([following])
        assert threading.get_ident() not in machine.threads[1:]

    run(follow())
