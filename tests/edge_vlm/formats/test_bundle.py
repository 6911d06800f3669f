"""A bundle is opened whole and unharmed or not at all, and written the same way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_vlm.errors import (
    BundleError,
    BundleFileMissing,
    BundleHashMismatch,
    BundleNotFound,
    BundleSchemaError,
)
from edge_vlm.errors.export import RangeFp16
from edge_vlm.formats.bundle import (
    EMBED_TABLE,
    MANIFEST,
    TOKENIZER,
    BundleWriter,
    EngineBundle,
    write_bundle,
)
from edge_vlm.formats.graph_spec import DynamicDim, GraphSpec, TensorSpec
from edge_vlm.formats.usage import SECTIONS, Usage
from edge_vlm.presets import tiny

SPEC = GraphSpec(
    name="llm",
    inputs=(TensorSpec(name="x", dtype="float32", shape=("s", 2)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("s", 2)),),
    dims={"s": DynamicDim(min=1, opt=2, max=3)},
)


def _write(path: Path, *, overwrite: bool = False, name: str = "one") -> None:
    with write_bundle(path, overwrite=overwrite) as writer:
        writer.graph_file(SPEC).write_bytes(b"graph")
        writer.embed_table(np.arange(6, dtype=np.float32).reshape(3, 2))
        (writer.folder / TOKENIZER).write_text("{}")
        writer.reference("llm", {"inputs/x": np.ones((2, 2), np.float32)})
        writer.finish(name=name, config=tiny(), defaults={"keep_ratio": 0.5}, source={"a": "b"})


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    _write(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_what_was_written_is_read(bundle: Path) -> None:
    opened = EngineBundle.open(bundle)
    assert opened.name == "one"
    assert opened.config == tiny()
    assert opened.specs == {"llm": SPEC}
    assert opened.defaults == {"keep_ratio": 0.5}
    assert opened.source == {"a": "b"}
    assert opened.graph_path("llm").read_bytes() == b"graph"
    assert opened.reference("llm")["inputs/x"].shape == (2, 2)
    table = opened.embed_table
    assert isinstance(table, np.memmap)
    assert table.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_what_is_known_of_a_model_travels_with_it(bundle: Path) -> None:
    assert EngineBundle.open(bundle).card is None  # nobody described it
    demo = Path(__file__).parents[3]
    shown = EngineBundle.open(demo / "runtime" / "edge_vlm_runtime" / "demo" / "bundle").card
    config = json.loads((demo / "training" / "checkpoints" / "demo" / "config.json").read_text())
    told = Usage.from_dict({name: config[name] for name in SECTIONS if name in config})
    assert shown == told.card == Usage.from_dict(told.to_dict()).card
    assert shown is not None
    assert shown.is_toy
    assert "card" not in Usage().to_dict()


def test_the_folder_can_be_moved(bundle: Path, tmp_path: Path) -> None:
    bundle.rename(tmp_path / "elsewhere")
    EngineBundle.open(tmp_path / "elsewhere")


def test_unknown_path(tmp_path: Path) -> None:
    with pytest.raises(BundleNotFound, match="no such bundle"):
        EngineBundle.open(tmp_path / "nothing")


def test_a_folder_without_manifest_is_not_a_bundle(bundle: Path) -> None:
    (bundle / MANIFEST).unlink()
    with pytest.raises(BundleNotFound, match=r"not a bundle.*folder that `edge-vlm export` wrote"):
        EngineBundle.open(bundle)
    (bundle / "config.json").write_text("{}")
    with pytest.raises(BundleNotFound, match=f"edge-vlm export {bundle} -o my-bundle"):
        EngineBundle.open(bundle)


@pytest.mark.parametrize("name", ["graphs/llm.onnx", EMBED_TABLE, TOKENIZER, "reference/llm.npz"])
def test_every_file_must_be_there_and_unchanged(bundle: Path, name: str) -> None:
    file = bundle / name
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleHashMismatch, match=name):
        EngineBundle.open(bundle)
    file.write_bytes(content[:-1])
    with pytest.raises(BundleHashMismatch, match=name):
        EngineBundle.open(bundle)
    file.unlink()
    with pytest.raises(BundleFileMissing, match=name):
        EngineBundle.open(bundle)


def _damage_manifest(bundle: Path, damage: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    damage(data)
    (bundle / MANIFEST).write_text(json.dumps(data))


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.update(schema_version=3),
        lambda d: d.update(schema_version=True),
        lambda d: d.pop("precision"),
        lambda d: d["precision"].update(llm="int3"),
        lambda d: d.update(variant="fast"),
        lambda d: d.update(kv_layout="rows"),
        lambda d: d["prompt"].update(own_frame_markers=True, unknown=True),
        lambda d: d.pop("schema_version"),
        lambda d: d.pop("files"),
        lambda d: d["files"].pop(TOKENIZER),
        lambda d: d["files"].update({"../outside": "0" * 64}),
        lambda d: d["files"].update({"/etc/passwd": "0" * 64}),
        lambda d: d["model"].pop("vision"),
        lambda d: d["model"]["language"].update(width=-1),
        lambda d: d["graphs"]["llm"].pop("spec"),
        lambda d: d["graphs"]["llm"].update(file="graphs/other.onnx"),
        lambda d: d.update(defaults=3),
        lambda d: d.update(card={"summary": " "}),
        lambda d: d.update(card={"summary": "all", "questions": "What?"}),
        lambda d: d.update(card={"summary": "all", "is_toy": "yes"}),
        lambda d: d.update(card={"summary": "all", "more": 1}),
    ],
)
def test_a_manifest_we_cannot_read_is_refused(
    bundle: Path, damage: Callable[[dict[str, Any]], object]
) -> None:
    _damage_manifest(bundle, damage)
    with pytest.raises(BundleSchemaError):
        EngineBundle.open(bundle)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"manifest"'])
def test_a_manifest_that_is_not_json_is_refused(bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_text(text)
    with pytest.raises(BundleSchemaError):
        EngineBundle.open(bundle)


def test_an_unknown_graph_is_named(bundle: Path) -> None:
    with pytest.raises(BundleSchemaError, match="no graph 'stem'"):
        EngineBundle.open(bundle).graph_path("stem")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_export_leaves_nothing(tmp_path: Path, stop: type[BaseException]) -> None:
    with pytest.raises(stop), write_bundle(tmp_path / "bundle") as writer:
        writer.graph_file(SPEC).write_bytes(b"half")
        raise stop
    assert list(tmp_path.iterdir()) == []


def test_a_killed_export_is_not_taken_for_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), write_bundle(tmp_path / "bundle") as writer:
        writer.graph_file(SPEC).write_bytes(b"half")
        assert not (tmp_path / "bundle").exists()
        shutil.copytree(writer.folder, tmp_path / "left-behind")  # what a kill would leave
        raise RuntimeError
    with pytest.raises(BundleNotFound):
        EngineBundle.open(tmp_path / "left-behind")


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    abandoned = tmp_path / f".bundle.partial-{dead.pid}-abc"
    at_work = tmp_path / f".bundle.partial-{os.getpid()}-abc"
    foreign = tmp_path / f".other.partial-{dead.pid}-abc"
    for folder in (abandoned, at_work, foreign):
        (folder / "graphs").mkdir(parents=True)
    _write(tmp_path / "bundle")
    assert not abandoned.exists()
    assert at_work.exists()
    assert foreign.exists()


def test_an_unfinished_bundle_never_appears(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="never finished"), write_bundle(tmp_path / "bundle"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_existing_bundle_is_replaced_only_when_asked(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="exists already"):
        _write(bundle, name="two")
    assert EngineBundle.open(bundle).name == "one"
    _write(bundle, name="two", overwrite=True)
    assert EngineBundle.open(bundle).name == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_failed_replacement_leaves_the_old_bundle(bundle: Path) -> None:
    with pytest.raises(RuntimeError), write_bundle(bundle, overwrite=True):
        raise RuntimeError
    assert EngineBundle.open(bundle).name == "one"


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    with pytest.raises(BundleError, match="not a bundle"):
        _write(tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_embeddings_may_be_float16(tmp_path: Path) -> None:
    writer = BundleWriter(tmp_path)
    table = np.array([[0.1, -2.0], [65504.0, 0.0]], np.float32)
    writer.embed_table(table, "float16")
    written = np.load(tmp_path / "embed_table.npy")
    assert written.dtype == np.float16
    np.testing.assert_allclose(written, table, rtol=1e-3)
    with pytest.raises(RangeFp16, match="embed=float32"):
        writer.embed_table(table * 2, "float16")
