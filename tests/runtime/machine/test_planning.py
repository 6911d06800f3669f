"""Costs from shapes, the forecast of a device, and the bounds beside a measurement."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.checker import check_model

from benchmarks.runtime import plan_check
from edge_vlm.config import ModelConfig
from edge_vlm.errors import ConfigError
from edge_vlm.flops import language_flops, vision_flops
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.formats.precision import FP32, PRESETS, Precision
from edge_vlm.presets import molmo2_4b, molmo2_8b, molmo2_o_7b, tiny
from edge_vlm_runtime.cli.plan import plan
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.engines import ort
from edge_vlm_runtime.engines.ort import ModelInMemory, OrtEngine
from edge_vlm_runtime.planning import bounds
from edge_vlm_runtime.planning import check as check_module
from edge_vlm_runtime.planning.check import Check, bind_noise, cases_of
from edge_vlm_runtime.planning.costs import language_work, stem_work, trunk_work
from edge_vlm_runtime.planning.devices import DEVICES, device_called, device_named
from edge_vlm_runtime.planning.onnx_bytes import Node, chain, model
from edge_vlm_runtime.planning.plan import Wanted, forecast_device, forecast_this, memory_parts
from edge_vlm_runtime.planning.probe import Rates, median_s
from tests.runtime.command_line import command_line
from tests.tiny import tiny_variant

RATES = Rates(
    copy_gb_s=20,
    read_gb_s=10,
    products={1e5: {1: 5, 100: 50}, 1e7: {1: 5, 100: 200}},
    attention={1: 1, 100: 50},
    passes={
        "moved": {1 << 10: 10, 1 << 20: 2.5},
        "copied": {1 << 10: 10},
        "joined": {1 << 10: 5},
        "softmax": {1 << 10: 2},
        "gelu": {1 << 10: 1},
    },
    node_us=1,
)


@pytest.mark.parametrize("cfg", [tiny(), molmo2_4b(), molmo2_8b(), molmo2_o_7b()])
def test_products_are_those_that_pruning_is_counted_by(cfg: ModelConfig) -> None:
    cells = cfg.vision.num_cells // 2
    vision = stem_work(cfg, FP32).flops + trunk_work(cfg, FP32, cells).flops
    assert vision == vision_flops(cfg, [cells])
    language = cfg.language
    head = 2 * language.width * language.base_vocab
    work = language_work(language, FP32, 40, 100)
    assert work.flops - head == language_flops(language, 40, 100)


def test_weights_and_cache_of_molmo2_4b() -> None:
    """Parameters as published: 3.633 B in the blocks, 0.389 B in the head."""
    cfg = molmo2_4b()
    work = language_work(cfg.language, Precision(cache="float16"), 1, 2000)
    assert work.weight_bytes / 4 == pytest.approx(3.633e9 + 0.389e9, rel=1e-3)
    assert work.cache_bytes == 2000 * 147_456
    int4 = language_work(cfg.language, PRESETS["int4"], 1, 0)
    assert int4.weight_bytes == pytest.approx(1.93e9 + 0.389e9, rel=0.01)


def test_decode_bound_is_bandwidth_over_bytes() -> None:
    """24.5 tokens/s in fp16 on an AGX Orin behind 2,048 tokens."""
    cfg = molmo2_4b()
    work = language_work(cfg.language, PRESETS["fp16"], 1, 2048)
    device = device_named("orin-agx")
    assert device.bandwidth_gb_s * 1e9 / work.bytes == pytest.approx(24.5, rel=0.02)


def test_written_models_are_onnx_and_compute(tmp_path: Path) -> None:
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    made = chain([("MatMul", weights), ("Relu", None), ("Add", np.full(3, 300.0, "f4"))], ["m", 2])
    check_model(onnx.load_from_string(made))
    x = np.array([[1, -2], [3, 4]], np.float32)
    graph = ModelInMemory(made, 1)
    (y,) = graph.run({"x": x})
    np.testing.assert_allclose(y, np.maximum(x @ weights, 0) + 300)
    turned = model([Node("Transpose", ("x",), "y", (1, 0, 2))], {}, ["a", "b", 4])
    check_model(onnx.load_from_string(turned))
    cube = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    (back,) = ModelInMemory(turned, 1).run({"x": cube})
    np.testing.assert_array_equal(back, cube.transpose(1, 0, 2))


def test_rates_are_read_between_their_sizes() -> None:
    small, large = RATES.product_s(1, 100, 1000), RATES.product_s(100, 100, 1000)
    assert small == pytest.approx(2e5 / 5e9)
    assert large == pytest.approx(2e7 / 50e9)
    between = 2 * 100 * 1000 * 1000 / RATES.product_s(100, 1000, 1000) / 1e9
    assert between == pytest.approx(100)  # half way in logarithms from 50 to 200
    assert RATES.product_s(1000, 10_000, 10_000) == pytest.approx(2e11 / 200e9)
    work = language_work(tiny().language, FP32, 8, 8)
    assert RATES.seconds(work) > work.nodes * 1e-6


def test_a_device_that_fits_and_one_that_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--device", "orin-agx", "--model", "4b", "--precision", "edge", "--json"]
    assert command_line(plan, asked) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["fits"]
    assert data["needed_bytes"] == sum(data["memory_bytes"].values())
    stages = data["stages_ms"]
    frame = sum(stages[name] for name in ("vit_stem", "vit_trunk", "prefill"))
    assert data["frame_ms"] == pytest.approx(frame, abs=0.01)
    assert 0.5 < data["tokens_per_s"] / data["decode_bound_per_s"] < 0.8
    assert command_line(plan, ["--device", "orin-nano", "--model", "8b", "--precision=fp16"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out
    # That it is too slow is said beside that it fits, not far below alone.
    asked = ["--device", "orin-agx", "--model", "allenai/Molmo2-4B", "--fps", "30"]
    assert command_line(plan, asked) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith(": fits, but DOES NOT KEEP UP")


def test_a_forecast_says_of_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--device", "thor", "--model", str(DEMO_BUNDLE)]
    assert command_line(plan, [*asked, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["model"], data["precision"], data["fps"]) == (str(DEMO_BUNDLE), "fp32", 2.0)
    # As many as its positions take, and not one more.
    most = data["window"]
    assert most < 64
    assert command_line(plan, [*asked, "--window", str(most)]) == 0
    assert f"{most} frames remembered" in capsys.readouterr().out
    assert command_line(plan, [*asked, "--window", str(most + 1)]) == 2
    assert f"768 positions: {most} frames or less" in capsys.readouterr().err


def test_what_prunes_more_takes_less() -> None:
    frames = [
        forecast_device(device, Wanted(cfg=molmo2_4b(), precision=PRESETS["edge"], keep=keep))
        for device in DEVICES
        for keep in (1.0, 0.5, 0.2)
    ]
    for whole, half, fifth in zip(frames[::3], frames[1::3], frames[2::3], strict=True):
        assert whole.frame_s > half.frame_s > fifth.frame_s
        assert whole.memory["cache"] > half.memory["cache"] > fifth.memory["cache"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "orin-ago"], "did you mean orin-agx?"),
        (["--device", "h200", "--model", "4-b"], "did you mean 4b?"),
        (["--device", "h200", "--keep", "1.5"], "keep 1.5"),
        (["--device", "h200", "--window", "100000"], "36864 positions"),
        (["--device", "h200", "--fps", "0"], "fps 0"),
        (["--device", "h200", "--precision", "int5"], "unknown precision"),
        (["--check", "wide", "--device", "h200", "--keep", "0.2"], "--device, --keep with --check"),
    ],
)
def test_bad_plans_are_told(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(plan, arguments) == 2
    assert said in capsys.readouterr().err


def test_a_cache_of_float16_takes_half_the_memory() -> None:
    plain, half = (
        memory_parts(Wanted(cfg=tiny(), precision=Precision.parse(text), window=4))
        for text in ("int4", "int4,cache=float16")
    )
    assert plain["cache"] == 2 * half["cache"]
    assert plain["language weights"] == half["language weights"]
    for is_joined in (True, False):
        works = [
            language_work(tiny().language, Precision.parse(text), 1, 64, is_joined=is_joined)
            for text in ("int4", "int4,cache=float16")
        ]
        assert works[0].cache_bytes == 2 * works[1].cache_bytes
        # Where past and new rows are joined they are cast too.
        assert (RATES.seconds(works[0]) < RATES.seconds(works[1])) == is_joined


def test_this_machine_has_to_say_what_is_free() -> None:
    wanted = Wanted(cfg=tiny(), precision=FP32, window=4)
    assert forecast_this("cpu", RATES, 10**10, wanted).fits
    assert not forecast_this("cpu", RATES, sum(memory_parts(wanted).values()) - 1, wanted).fits
    with pytest.raises(ConfigError, match="does not say"):
        forecast_this("cpu", RATES, None, wanted)


def test_devices_by_what_they_call_themselves() -> None:
    assert device_called("NVIDIA H200") == device_named("h200")
    assert device_called("NVIDIA GeForce RTX 4090") == device_named("rtx4090")
    assert device_called("NVIDIA GeForce GTX 1080") is None


def test_what_is_read_is_kept_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime keeps equal weights once: a cache's rate would pass for the memory's."""
    chains = []

    def noted(ops: Sequence[tuple[str, np.ndarray]], shape: list[int | str]) -> bytes:
        chains.append([constant.tobytes()[:64] for _, constant in ops])
        return chain(ops, shape)

    monkeypatch.setattr(bounds, "chain", noted)
    monkeypatch.setattr(bounds, "SIDE", 64)
    assert bounds.measured_bounds(1).read_gb_s > 0
    assert len(chains) == 2
    assert all(len(set(weights)) == len(weights) >= 4 for weights in chains)


@pytest.mark.parametrize(("version", "spins"), [("1.20.1", "0"), ("1.32.0", "1"), ("2.0", "1")])
def test_threads_spin_only_where_it_can_be_short(version: str, spins: str) -> None:
    told: dict[str, str] = {}
    made = SimpleNamespace(add_session_config_entry=told.__setitem__)
    library = SimpleNamespace(__version__=version, SessionOptions=lambda: made)
    assert ort._options(library, 2).intra_op_num_threads == 2
    assert told["session.intra_op.allow_spinning"] == spins
    assert int(told["session.intra_op.spin_duration_us"]) < 1000


def test_bounds_and_the_share_rule() -> None:
    bundle = EngineBundle.open(DEMO_BUNDLE)
    made_up = bounds.Bounds(copy_gb_s=20, read_gb_s=10, matrix_gflop_s=100, source="made up")

    def point(keep: float, cells: int, stem: float, trunk: float, prefill: float) -> dict[str, Any]:
        stages = {"vit_stem": stem, "vit_trunk": trunk, "prefill": prefill}
        stages["frame"] = sum(stages.values())
        return {
            "keep_ratio": keep,
            "cells": cells,
            "tokens": cells + 6,
            "stages_ms": {name: {"p50": value} for name, value in stages.items()},
            "speed_up": {"frame": {"median": 1.5}},
        }

    frames = [point(1, 16, 4, 4, 2), point(0.5, 8, 4, 2, 1)]
    answers: list[dict[str, Any]] = [
        {"context": 0, "itl_ms": {"p50": 2.0}},
        {"context": 64, "itl_ms": None},
    ]
    found = bounds.roofline(bundle, made_up, frames, answers, 64)
    rows = {row["stage"]: row for row in found["stages"]}
    stem = rows["vit_stem, keep 1"]
    assert stem["by"] == "products"
    assert stem["bound_ms"] == pytest.approx(stem["flops"] / 100e9 * 1e3, rel=1e-3)
    assert stem["reached"] == pytest.approx(stem["bound_ms"] / 4, rel=1e-3)
    trunk = rows["vit_trunk, keep 0.5"]
    assert (trunk["share"], trunk["saving"]) == (0.4, 0.5)
    assert trunk["gain_at_most"] == pytest.approx(1.25)
    assert rows["decode, context 0"]["by"] == "bandwidth"
    assert rows["decode, context 64"]["reached"] is None
    assert "at most 1.43 times faster; in turns it was 1.50 times" in found["sentence"]


def test_forecasts_are_compared_with_what_really_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The graphs run; only this machine's rates are given, so that a forecast is known."""
    monkeypatch.setattr(check_module, "measure_rates", lambda threads, clock: RATES)
    monkeypatch.setattr(check_module, "median_s", lambda run, clock, times: median_s(run, clock, 1))
    arguments = ["--check", str(DEMO_BUNDLE), "--turns", "1", "--threads", "1", "--json"]
    code = command_line(plan, arguments)
    found = json.loads(capsys.readouterr().out)["checks"]
    bundle = EngineBundle.open(DEMO_BUNDLE)
    for row, case in zip(found, cases_of(bundle), strict=True):
        assert row["forecast_ms"] == pytest.approx(RATES.seconds(case.work) * 1e3, abs=1e-3)
        assert row["ratio"] == pytest.approx(row["forecast_ms"] / row["measured_ms"], rel=0.01)
    assert code == (0 if all(row["holds"] for row in found) else 1)

    def export(is_tiny: bool, precision: str, folder: Path) -> None:
        assert (is_tiny, precision) == (False, "fp32")
        shutil.copytree(DEMO_BUNDLE, folder)

    monkeypatch.setattr(plan_check, "export", export)
    out = tmp_path / "check.json"
    assert plan_check.main(["--turns", "1", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["command"] == "python -m benchmarks.runtime.plan_check --turns 1"
    assert [check["stage"] for check in result["checks"]] == [row["stage"] for row in found] * 2


@pytest.mark.parametrize("variant", ["both", "ort-int4"])
def test_graphs_of_every_layout_run_at_their_cases(variant: str) -> None:
    bundle = EngineBundle.open(tiny_variant(variant))
    for case in cases_of(bundle):
        engine = OrtEngine(bundle, case.graph, threads=1)
        bind_noise(engine, case.dims)
        engine.run()
        engine.close()


def test_a_forecast_holds_within_a_quarter() -> None:
    names = [case.stage for case in cases_of(EngineBundle.open(DEMO_BUNDLE))]
    assert names == ["vit_stem", "vit_trunk", "prefill", "decode"]
    for measured, holds in ((1.0, False), (1.3, True), (1.61, True), (2.2, False)):
        check = Check("b", "s", measured=[measured] * 3, forecast=[1.3] * 3)
        assert check.holds == holds, measured
