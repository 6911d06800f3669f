"""What can go wrong in an export: each a typed error, and never half a bundle."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import pytest

from edge_vlm.cli import main
from edge_vlm.errors import ConfigError, VideoError
from edge_vlm.errors.export import NoSpaceLeft, NotEnoughMemory, ParityError, RangeFp16
from edge_vlm.formats.precision import Precision, Variant
from edge_vlm.model.published.mapping import shapes
from edge_vlm_export import preflight
from edge_vlm_export.graphs.graphs import GraphLimits
from edge_vlm_export.graphs.weights import open_weights
from edge_vlm_export.progress import Silent
from edge_vlm_export.quantize import plan
from edge_vlm_export.to_onnx import ExportOptions, _Export, export_bundle
from edge_vlm_export.trace.graph_files import load_graph, save_graph
from tests.tiny import (
    ROOT,
    TINY_LIMITS,
    tiny_bundle,
    tiny_checkpoint,
    tiny_config,
    tiny_footage,
    traced_once,
)

LIMITS = GraphLimits(**TINY_LIMITS)


@pytest.fixture(autouse=True)
def _shared_traces() -> Iterator[None]:
    with traced_once():
        yield


class Interrupts(Silent):
    """Ctrl-C in the middle."""

    def stage(self, text: str) -> None:
        if text.startswith("writing vit_trunk"):
            raise KeyboardInterrupt


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    options = ExportOptions(limits=LIMITS)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(tiny_checkpoint(), tmp_path / "out", options, Interrupts())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_becomes_full_is_named(tmp_path: Path) -> None:
    model = load_graph(tiny_bundle() / "graphs" / "llm.onnx")
    (tmp_path / "llm.weights").symlink_to("/dev/full")
    with pytest.raises(NoSpaceLeft, match="full while llm") as caught:
        save_graph(model, tmp_path / "llm.onnx")
    assert caught.value.code == "E-NO-SPACE"


def test_a_disk_full_in_the_middle_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(model: ir.Model, path: Path, *rest: object, **named: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(NoSpaceLeft):
        export_bundle(tiny_checkpoint(), tmp_path / "out", ExportOptions(limits=LIMITS))
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_said_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(NoSpaceLeft, match=r"needs .* GB of disk"):
        export_bundle(tiny_checkpoint(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_footage_that_is_measured_needs_room_for_whole_graphs(tmp_path: Path) -> None:
    def needed(precision: str, *footage: Path) -> int:
        options = ExportOptions(precision=Precision.parse(precision), footage=footage)
        return _Export(open_weights(tiny_checkpoint()), options, Silent()).estimate(tmp_path).disk

    weights = sum(math.prod(shape) for shape in shapes(tiny_config()).values())
    for precision in ("int4,cache=float16", "fp16"):
        assert needed(precision, tiny_footage()) > 3 * weights
    assert needed("int4,cache=float16") == needed("int4") == needed("int4", tiny_footage())


def test_too_little_memory_is_said_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "free_memory", lambda: 1_000_000)
    with pytest.raises(NotEnoughMemory, match="of memory"):
        export_bundle(tiny_checkpoint(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp16", "int8", "edge"])
def test_a_precision_decided_by_ranges_needs_footage(tmp_path: Path, precision: str) -> None:
    options = ExportOptions(precision=Precision.parse(precision))
    with pytest.raises(ConfigError, match="--footage"):
        export_bundle(tiny_checkpoint(), tmp_path / "out", options)


@pytest.mark.parametrize(
    ("variant", "told"), [("portable", "new_[kv]_0 of graph"), ("ort", "present_[kv]_0 of graph")]
)
def test_a_cache_that_the_footage_fills_beyond_float16_ends_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str, told: str
) -> None:
    monkeypatch.setattr(plan, "FP16_LIMIT", 0.01)
    options = ExportOptions(
        precision=Precision.parse("cache=float16"),
        variant=Variant(variant),
        footage=(tiny_footage(),),
        max_frames=2,
        thorough=False,
    )
    said = f"{told} llm reached .* on the footage, .*: export with base=float32 and without cache="
    with pytest.raises(RangeFp16, match=said):
        export_bundle(tiny_checkpoint(), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_footage_that_is_no_video_ends_the_export(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("no pictures here")
    options = ExportOptions(limits=LIMITS, precision=Precision(base="float16"), footage=(text,))
    with pytest.raises(VideoError):
        export_bundle(tiny_checkpoint(), tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == [text]


def test_a_graph_that_differs_from_torch_is_never_a_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_vlm_export.verify import compare

    monkeypatch.setattr(compare, "TOLERANCE", 1e-12)
    with pytest.raises(ParityError, match="the first is cells of graph vit_stem"):
        export_bundle(tiny_checkpoint(), tmp_path / "out", ExportOptions(limits=LIMITS))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["export", "-o", "{tmp}/out"], "E-CONFIG"),
        (["export", "{checkpoint}", "-o", "{tmp}/out", "--precision", "fp8"], "E-CONFIG"),
        (["export", "{checkpoint}", "-o", "{tmp}/out", "--random-weights", "tiny"], "E-CONFIG"),
        (["export", "-o", "{tmp}/out", "--random-weights", "tiny"], "E-CONFIG"),
        (
            ["export", "-o", "{tmp}/out", "--random-weights", "huge", "--tokenizer", "{words}"],
            "E-CONFIG",
        ),
        (  # a tokenizer of more words than the model knows
            ["export", "-o", "{tmp}/out", "--random-weights", "tiny", "--tokenizer", "{more}"],
            "E-CONFIG",
        ),
        (
            ["export", "-o", "{tmp}/out", "--random-weights", "tiny", "--tokenizer", "{tmp}/no"],
            "E-CONFIG",
        ),
    ],
)
def test_contradicting_arguments_are_one_clear_line(
    arguments: list[str], code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {
        "tmp": tmp_path,
        "checkpoint": tiny_checkpoint(),
        "words": tiny_checkpoint() / "tokenizer.json",
        "more": ROOT / "training/checkpoints/demo/tokenizer.json",
    }
    assert main([text.format(**names) for text in arguments]) == 2
    err = capsys.readouterr().err
    assert f"edge-vlm: {code}: " in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def _without(libraries: list[str], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({libraries!r})); "
        f"from edge_vlm.cli import main; sys.exit(main({arguments!r}))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("library", ["onnxscript", "onnx", "torch"])
def test_a_missing_library_is_named_with_its_extra(library: str, tmp_path: Path) -> None:
    done = _without([library], ["export", str(tiny_checkpoint()), "-o", str(tmp_path / "out")])
    assert done.returncode == 9, done.stderr
    assert f"E-MISSING-EXTRA: {library} is not installed" in done.stderr
    assert "edge-vlm[export]" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_verified_without_torch() -> None:
    absent = ["torch", "onnx", "onnxscript", "onnx_ir", "safetensors"]
    done = _without(absent, ["verify", str(tiny_bundle())])
    assert done.returncode == 0, done.stderr
    assert "first 16 tokens: 16 the same" in done.stdout


def test_verifying_without_onnxruntime_names_the_extra() -> None:
    done = _without(["onnxruntime"], ["verify", str(tiny_bundle())])
    assert done.returncode == 9
    assert "onnxruntime is not installed" in done.stderr
