"""A measurement of the demo bundle from the command line, and of a server; what it does when it is
cut short; its parts where a machine would be needed."""

from __future__ import annotations

import copy
import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

from edge_vlm.errors import ConfigError, MissingExtraError
from edge_vlm_runtime.bench import run as run_module
from edge_vlm_runtime.bench.compare import comparison, read_comparable
from edge_vlm_runtime.bench.layers import WARMUPS, ort_nodes
from edge_vlm_runtime.bench.machine import System, Watch
from edge_vlm_runtime.bench.meters import Meters, open_meters
from edge_vlm_runtime.bench.record import SCHEMA, SECTIONS, as_json, read_record
from edge_vlm_runtime.bench.report import as_csv, as_markdown
from edge_vlm_runtime.bench.samples import Series, percentile, ratio_of_turns
from edge_vlm_runtime.bench.stages import around
from edge_vlm_runtime.bench.trace import nvtx_range
from edge_vlm_runtime.bench.workload import (
    Workload,
    a_b_a,
    notes_on_cells,
    synthetic_pictures,
)
from edge_vlm_runtime.cli import bench as command_module
from edge_vlm_runtime.cli.bench import bench
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.engines.trt_library import TrtLibrary
from edge_vlm_runtime.server import memory_need
from edge_vlm_runtime.server.app import Server
from tests.runtime.command_line import command_line
from tests.runtime.machine.test_gauges import write_sensor
from tests.runtime.server.live import TIMEOUT_S

WITHOUT_CONTEXT = [
    *("--threads", "1", "--repeat", "2", "--samples", "3", "--warmups", "1"),
    *("--point-seconds", "0.2", "--stream-seconds", "0.2", "--keep-ratio", "1,0.25"),
    *("--fps", "20,max"),
]
SHORT = [*WITHOUT_CONTEXT, "--context", "0,32"]
VALIDATOR = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the result and the trace of one measurement with everything in it."""
    place = tmp_path_factory.mktemp("bench")
    files = ["--json", str(place / "result.json"), "--trace", str(place / "trace.json")]
    assert command_line(bench, [*SHORT, *files, "--layers", "-o", "csv"]) == 0
    return place


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    return read_record(folder / "result.json")


def test_the_record_is_what_its_schema_says(record: dict[str, Any]) -> None:
    VALIDATOR.validate(record)
    assert record["complete"]
    assert all(record[section] for section in SECTIONS)
    for broken in ({**record, "more": 1}, {**record, "frames": [{}]}):
        with pytest.raises(jsonschema.ValidationError):
            VALIDATOR.validate(broken)


def test_frames_of_the_record(record: dict[str, Any]) -> None:
    whole, quarter = record["frames"]
    assert (whole["cells"], quarter["cells"]) == (16, 4)
    assert whole["tokens"] - quarter["tokens"] == 12
    assert whole["stages_ms"]["frame"]["n"] == 2 * 2 * 3  # A B A, two turns of three samples
    assert quarter["stages_ms"]["frame"]["n"] == 2 * 3
    assert whole["stages_ms"]["frame"]["p99"] is None
    for name in ("frame", "processor"):
        assert quarter["speed_up"][name]["turns"] == 2
    parts = ("preprocess", "vit_stem", "select", "vit_trunk", "prefill")
    means = whole["stages_ms"]
    assert sum(means[name]["mean"] for name in parts) <= means["frame"]["mean"] * 1.01


def test_answers_streams_and_layers_of_the_record(record: dict[str, Any]) -> None:
    assert [point["context"] for point in record["answers"]] == [0, 32]
    assert record["answers"][0]["itl_ms"]["n"] == 31 * record["answers"][0]["ttft_ms"]["n"]
    paced, fastest = record["stream"]["rates"]
    for point in (paced, fastest):
        assert point["sent"] == point["processed"] + sum(point["dropped"].values())
        assert point["without_outcome"] == 0
    assert paced["processed_per_s"] <= float(paced["rate"])
    assert fastest["dropped"] == {}
    assert record["stream"]["session"]["questions"] >= 3
    assert record["memory"]["cache_bytes"] == 768 * record["memory"]["cache_token_bytes"]
    graphs = [layer["graph"].partition(" ")[0] for layer in record["layers"]]
    assert graphs == ["vit_stem", "vit_trunk", "prefill", "decode"]
    for layer in record["layers"]:
        assert sum(op["share"] for op in layer["ops"]) == pytest.approx(1, abs=0.01)


def test_a_trace_opens_and_holds_every_graph(folder: Path) -> None:
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    names = {event["name"] for event in events if event["ph"] == "X"}
    assert names == {"vit_stem", "vit_trunk", "llm"}
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")


def test_every_section_is_on_the_page_and_in_the_table(record: dict[str, Any]) -> None:
    page = as_markdown(record)
    for title in ("A frame", "An answer", "A live stream", "Memory", "Energy", "Start", "Layers"):
        assert f"## {title}" in page
    assert record["model"]["sha256"][:12] in page
    rows = list(csv.DictReader(io.StringIO(as_csv(record))))
    found = {(row["section"], row["point"], row["figure"]): row["value"] for row in rows}
    frame = record["frames"][1]["stages_ms"]["frame"]["p50"]
    assert float(found["frames", "keep_ratio=0.25", "stages_ms.frame.p50"]) == frame


def test_comparing_refuses_what_is_unlike(record: dict[str, Any], tmp_path: Path) -> None:
    now = copy.deepcopy(record)
    now["frames"][1]["stages_ms"]["frame"]["p50"] /= 2
    row = next(line for line in comparison(record, now) if "keep 0.25: frame" in line)
    assert row.endswith("2.00 |")
    now["model"]["shape"]["cells"] = 81
    now["workload"]["contexts"] = [0]
    with pytest.raises(ConfigError, match=r"contexts \[0, 32\] and \[0\].*cells 16 and 81"):
        comparison(record, now)
    (tmp_path / "other.json").write_text('{"format": "another"}')
    with pytest.raises(ConfigError, match="format 'another'"):
        read_record(tmp_path / "other.json")


def test_the_command_refuses_to_compare_before_it_measures(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*SHORT, "--context", "0", "--compare", str(folder / "result.json")]
    assert command_line(bench, asked) == 2
    assert "unlike measurements" in capsys.readouterr().err


def stop_at(monkeypatch: pytest.MonkeyPatch, step: str, stop: Callable[[], None]) -> None:
    """`stop` is called when the measurement comes to that step."""

    @contextmanager
    def told(total: int) -> Iterator[Callable[[str], None]]:
        def say(what: str) -> None:
            if what.startswith(step):
                stop()

        yield say

    monkeypatch.setattr(command_module, "progress", told)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_what_was_measured_is_kept_when_it_is_interrupted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at(monkeypatch, "turn 2: keep 0.25", interrupt)
    assert command_line(bench, [*SHORT, "--json", str(tmp_path / "cut.json")]) == 130
    record = read_record(tmp_path / "cut.json")
    VALIDATOR.validate(record)
    assert (record["complete"], record["ended_by"]) == (False, "interrupted")
    assert record["frames"][1]["stages_ms"]["frame"]["n"] == 3  # of the first turn
    assert record["answers"] is None
    assert "not complete: interrupted" in capsys.readouterr().out


def test_what_was_measured_is_kept_when_the_process_is_to_end(tmp_path: Path) -> None:
    """As `timeout` and `docker stop` end it."""
    result = tmp_path / "cut.json"
    # It streams for longer than the test runs: however late the signal, it is not over by itself.
    endless = [*SHORT, "--stream-seconds", "3600", "--json", str(result)]
    command = [sys.executable, "-m", "edge_vlm", "bench", *endless]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        try:
            assert any("turn 2" in line for line in process.stderr), "it never came to a turn 2"
            process.terminate()
            out, _ = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "not complete: interrupted" in out
    assert read_record(result)["frames"][0]["stages_ms"]["frame"]["n"] >= 3


def test_a_file_that_fills_the_disk_keeps_nothing_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "result.json"

    def block() -> None:
        result.mkdir()
        interrupt()

    stop_at(monkeypatch, "turn 2", block)
    assert command_line(bench, [*SHORT, "--json", str(result)]) == 2
    said = capsys.readouterr()
    assert "cannot be written: Is a directory" in said.err
    assert "## A frame" in said.out


def test_contexts_that_nobody_asked_for_are_left_out_where_they_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stop_at(monkeypatch, "turn 1", interrupt)
    monkeypatch.setattr(run_module, "longest_context", lambda bundle, workload: 100)
    assert command_line(bench, [*WITHOUT_CONTEXT, "--json", str(tmp_path / "cut.json")]) == 130
    record = read_record(tmp_path / "cut.json")
    assert record["workload"]["contexts"] == [0, 64]
    assert "context 512 left out" in record["notes"][0]


def test_a_bundle_that_is_too_large_for_the_machine_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory_need, "free_memory", lambda: 10_000_000)
    assert command_line(bench, SHORT) == 2
    assert "and 0.01 GB are free" in capsys.readouterr().err


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server.open(DEMO_BUNDLE, threads=1) as running:
        running.start()
        yield running


def test_a_server_is_measured_from_outside(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "served.json"
    short = [*WITHOUT_CONTEXT, "--repeat", "1"]
    assert command_line(bench, [*short, "--url", server.url, "--json", str(result)]) == 0
    record = read_record(result)
    VALIDATOR.validate(record)
    assert [point["keep_ratio"] for point in record["frames"]] == [1.0, 0.25]
    for point in record["frames"]:
        parts = point["stages_ms"]
        assert parts["frame"]["n"] == parts["prefill"]["n"]  # none is prefilled with another
        assert parts["frame"]["min"] > parts["prefill"]["min"]
    assert record["frames"][0]["stages_ms"]["frame"]["n"] == 2 * 3
    assert record["stream"]["path"] == "through the server's websocket"
    assert record["memory"] is None
    assert server.url not in capsys.readouterr().out


def test_a_server_that_goes_away_leaves_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Server.open(DEMO_BUNDLE, threads=1) as running:
        running.start()
        stop_at(monkeypatch, "a stream of max", running.stop)
        asked = [
            *WITHOUT_CONTEXT,
            "--repeat",
            "1",
            "--url",
            running.url,
            "--json",
            str(tmp_path / "cut"),
        ]
        assert command_line(bench, asked) == 8
    record = read_record(tmp_path / "cut")
    VALIDATOR.validate(record)
    assert not record["complete"]
    assert len(record["frames"]) == 2
    assert [point["rate"] for point in record["stream"]["rates"]] == ["20"]
    assert "not complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nowhere"], 4, "no such bundle"),
        (["--context", "0,100000"], 2, "does not fit"),
        (["--source", "nothing.mp4"], 5, "no such file"),
        (["--json", "nowhere/result.json"], 2, "no such folder"),
        (["--backend", "auto", "--layers"], 2, "backend auto gives no profile by layer"),
        (["--json", "."], 2, "cannot be written"),
        (["--trace", "."], 2, "cannot be written"),
        (["--compare", "nothing.json"], 2, "cannot be read"),
        (["--url", "127.0.0.1:1", "--layers", "--context", "0"], 2, "--context, --layers with a"),
        (["--url", "127.0.0.1:1"], 8, "no edge-vlm server answers"),
    ],
)
def test_bad_input_is_told(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(bench, arguments) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep_ratios": (0.0,)},
        {"keep_ratios": (1.0, 1.0)},
        {"contexts": (-1,)},
        {"rates": (0.0,)},
        {"repeat": 0},
        {"point_s": 0.0},
    ],
)
def test_a_workload_that_means_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Workload(**wrong)


# ---- its parts ---------------------------------------------------------------------------------


def test_order_and_statistics() -> None:
    assert a_b_a("ABC") == ["A", "B", "A", "C", "A"]
    assert around([1, 3, 5]) == [2, 4]
    series = Series()
    for turn in range(4):
        series.begin_turn()
        for value in range(25):
            series.add(turn * 25.0 + value)
    summary = series.summary()
    assert summary is not None
    assert (summary["n"], summary["p50"], summary["p99"]) == (100, 49.5, 98.01)
    assert summary["spread"] == pytest.approx(75 / 49.5, rel=1e-4)
    assert percentile([1.0, 2.0], 0.5) == 1.5
    assert ratio_of_turns([2, 4, 8], [1, 1, 1]) == {
        "median": 4,
        "least": 2,
        "most": 8,
        "turns": 3,
    }
    assert Series().summary() is None
    assert ratio_of_turns([], []) is None


def test_shares_that_whole_cells_do_not_reach_are_told() -> None:
    assert notes_on_cells((1.0, 0.5, 0.3, 0.2), 16) == []
    assert notes_on_cells((1.0, 0.01, 0.001), 16) == [
        "keep 0.01 is not reached: 1 of 16 cells are 0.0625",
        "keep 0.001 is not reached: 1 of 16 cells are 0.0625",
        "keep 0.01, 0.001 are all 1 of 16 cells",
    ]


def test_a_record_with_parts_missing_is_not_compared(
    record: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "part.json"
    for name in ("workload", "model", "device"):
        path.write_text(as_json({key: record[key] for key in record if key != name}))
        with pytest.raises(ConfigError, match="not a whole result"):
            read_comparable(path)
    shapes: tuple[Any, ...] = ([], None, "large")
    for shape in shapes:
        path.write_text(as_json({**record, "model": {**record["model"], "shape": shape}}))
        with pytest.raises(ConfigError, match="not a whole result"):
            read_comparable(path)
    empty = dict.fromkeys(("frames", "answers", "stream"))
    path.write_text(as_json({**record, **empty}))
    with pytest.raises(ConfigError, match="no figure in it"):
        read_comparable(path)
    early = "\n".join(comparison({**record, "complete": False}, record))
    assert "before was ended early" in early
    assert "now was ended early" not in early


def test_made_up_pictures_are_the_same_every_time_and_move() -> None:
    first, again = synthetic_pictures(64, 48, 4), synthetic_pictures(64, 48, 4)
    assert first[0].shape == (48, 64, 3)
    for index, picture in enumerate(first):
        assert (picture == again[index]).all()
        assert index == 0 or (picture != first[index - 1]).any()


def test_nodes_of_a_profile_without_the_warm_ups() -> None:
    run = [
        {"name": "a_kernel_time", "cat": "Node", "dur": 5, "args": {"op_name": "MatMul"}},
        {"name": "a_fence_before", "cat": "Node", "dur": 9, "args": {"op_name": "MatMul"}},
        {"name": "model_run", "cat": "Session", "dur": 9},
    ]
    assert ort_nodes(run * (WARMUPS + 2)) == [("MatMul", 5.0)] * 2


def test_layers_that_tensorrt_reports() -> None:
    class IProfiler:
        pass

    class ILogger:
        pass

    module = SimpleNamespace(__version__="10.3.0", IProfiler=IProfiler, ILogger=ILogger)
    profiler, layers = TrtLibrary("tensorrt", module).profiler()
    assert IProfiler in type(profiler).__mro__
    profiler.report_layer_time("conv", 0.5)
    profiler.report_layer_time("conv", 0.25)
    assert layers == [("conv", 0.5), ("conv", 0.25)]


def write_rapl(folder: Path, micros: int) -> Path:
    zone = folder / "intel-rapl:0"
    zone.mkdir(exist_ok=True, parents=True)
    (zone / "name").write_text("package-0\n")
    (zone / "max_energy_range_uj").write_text("999999\n")
    (zone / "energy_uj").write_text(f"{micros}\n")
    return zone


def test_meters_that_are_there_and_those_that_are_not(tmp_path: Path) -> None:
    write_rapl(tmp_path / "powercap", 900_000)
    meters = open_meters(powercap=tmp_path / "powercap", hwmon=tmp_path / "none")
    assert [meter.name for meter in meters.found] == ["RAPL"]
    assert "not a Jetson" in meters.absent["INA"]
    assert "no NVIDIA driver" in meters.absent["NVML"]
    write_rapl(tmp_path / "powercap", 400_000)  # past its end once
    assert meters.joules()["RAPL"] == pytest.approx(0.5)


def test_a_meter_that_fails_is_named_and_does_not_end_anything(tmp_path: Path) -> None:
    zone = write_rapl(tmp_path, 0)
    meters = open_meters(powercap=tmp_path, hwmon=tmp_path / "none")
    (zone / "energy_uj").write_text("gibberish")
    assert meters.joules() == {}
    assert meters.found == []
    assert "failed while it was read" in meters.absent["RAPL"]
    assert Meters().joules() == {}


def test_a_board_s_rail_is_added_up(tmp_path: Path) -> None:
    write_sensor(tmp_path / "hwmon0", "ina3221", {"VDD_IN": ("5000", "2000")})
    meters = open_meters(powercap=tmp_path / "none", hwmon=tmp_path)
    (rail,) = meters.found
    try:
        while meters.joules()["INA VDD_IN"] < 0.5:  # 10 W: bounded by the test's own time-out
            pass
    finally:
        meters.close()
    assert rail.name == "INA VDD_IN"
    write_sensor(tmp_path / "other" / "hwmon0", "ina3221", {"VDD_CPU": ("5000", "2000")})
    absent = open_meters(powercap=tmp_path / "none", hwmon=tmp_path / "other").absent
    assert "none that feeds the whole board" in absent["INA"]


def test_clocks_that_moved_and_others_that_computed_are_warned_of(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    cpuinfo, stat = tmp_path / "proc/cpuinfo", tmp_path / "proc/stat"
    cpuinfo.write_text("model name\t: A chip\ncpu MHz\t\t: 2000.0\ncpu MHz\t\t: 3000.0\n")
    stat.write_text("cpu  100 0 100 0 0 0 0 0 0 0\n")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.0\nmore")

    def tool(command: Any) -> str | None:
        return "NV Power Mode: MAXN" if command[0] == "nvpmodel" else None

    system = System(root=tmp_path, run=tool, gpus=lambda: None)
    told = system.record()
    assert (told["name"], told["jetson_linux"]) == ("A chip", "# R36 (release), REVISION: 4.0")
    assert told["power_mode"] == {"nvpmodel": "NV Power Mode: MAXN"}
    watch = Watch(system)
    watch.begin()
    cpuinfo.write_text("cpu MHz\t\t: 1200.0\n")
    stat.write_text("cpu  1000000 0 100 0 0 0 0 1000000 0 0\n")
    run = watch.end()
    assert (run["clocks_before_mhz"], run["clocks_after_mhz"]) == ({"cpu": 2500}, {"cpu": 1200})
    clock, busy, stolen = run["warnings"]
    assert "from 2500 to 1200 MHz" in clock
    assert "the machine was busy" in busy
    assert "the host took" in stolen


def test_ranges_need_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nvtx", None)
    with pytest.raises(MissingExtraError, match="edge-vlm\\[trace\\]"):
        nvtx_range()
